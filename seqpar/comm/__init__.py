"""Communication between ranks: groups, primitives in dual pairs, agreement. All else is built on it."""

from seqpar.comm.agree import DesyncError, agree, agreed
from seqpar.comm.all_to_all import (
    AllToAll,
    Places,
    Ranges,
    heads_to_rows,
    rows_to_heads,
    serve,
    start_to_heads,
    start_to_rows,
)
from seqpar.comm.async_exchange import AsyncExchange
from seqpar.comm.backward import (
    WayBack,
    agree_on_backward,
    agreed_backward,
    arrival,
    backward_number,
)
from seqpar.comm.combine import combine, combine_elements
from seqpar.comm.gather import all_gather, reduce_scatter
from seqpar.comm.gather_pass import GatherSchedule, HomeSum, Piece, gather_pass, send_home
from seqpar.comm.grid import Grid
from seqpar.comm.group import Group
from seqpar.comm.kept import Kept
from seqpar.comm.packed_message import PackedMessage
from seqpar.comm.ranks import Ranks, RanksOfGrid, grid_of, group_of
from seqpar.comm.reduce import all_reduce, all_reduce_, replicate
from seqpar.comm.replay import Replay, current_replay, once, plays
from seqpar.comm.ring_pass import RingSum, ring_pass
from seqpar.comm.ring_schedule import RingSchedule
from seqpar.comm.silent import Listener, silent
from seqpar.comm.threads import simulate
from seqpar.comm.traffic import Count, Traffic
from seqpar.comm.transport import Message

__all__ = [
    "AllToAll",
    "AsyncExchange",
    "Count",
    "DesyncError",
    "GatherSchedule",
    "Grid",
    "Group",
    "HomeSum",
    "Kept",
    "Listener",
    "Message",
    "PackedMessage",
    "Piece",
    "Places",
    "Ranges",
    "Ranks",
    "RanksOfGrid",
    "Replay",
    "RingSchedule",
    "RingSum",
    "Traffic",
    "WayBack",
    "agree",
    "agree_on_backward",
    "agreed",
    "agreed_backward",
    "all_gather",
    "all_reduce",
    "all_reduce_",
    "arrival",
    "backward_number",
    "combine",
    "combine_elements",
    "current_replay",
    "gather_pass",
    "grid_of",
    "group_of",
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
