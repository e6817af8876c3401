"""How ranks talk: groups, primitives in dual pairs, agreement. The wires of all else."""

from seqpar.comm.agree import DesyncError, agree, agreed
from seqpar.comm.combine import combine, combine_elements
from seqpar.comm.flight import Flight
from seqpar.comm.gather import all_gather, reduce_scatter
from seqpar.comm.grid import Grid
from seqpar.comm.group import Group
from seqpar.comm.heads import (
    HeadTrade,
    Places,
    Ranges,
    heads_to_rows,
    rows_to_heads,
    serve,
    start_to_heads,
    start_to_rows,
)
from seqpar.comm.parcel import Parcel
from seqpar.comm.pieces import Delivery, HomeSum, Piece, gather_pass, send_home
from seqpar.comm.reduce import all_reduce, all_reduce_, replicate
from seqpar.comm.ring import RingSum, Trip, ring_pass
from seqpar.comm.silent import Listener, silent
from seqpar.comm.tape import Tape, current_tape, once, plays
from seqpar.comm.threads import simulate
from seqpar.comm.traffic import Count, Traffic
from seqpar.comm.transport import Message

__all__ = [
    "Count",
    "Delivery",
    "DesyncError",
    "Flight",
    "Grid",
    "Group",
    "HeadTrade",
    "HomeSum",
    "Listener",
    "Message",
    "Parcel",
    "Piece",
    "Places",
    "Ranges",
    "RingSum",
    "Tape",
    "Traffic",
    "Trip",
    "agree",
    "agreed",
    "all_gather",
    "all_reduce",
    "all_reduce_",
    "combine",
    "combine_elements",
    "current_tape",
    "gather_pass",
    "heads_to_rows",
    "once",
    "plays",
    "reduce_scatter",
    "replicate",
    "ring_pass",
    "rows_to_heads",
    "send_home",
    "serve",
    "silent",
    "simulate",
    "start_to_heads",
    "start_to_rows",
]
