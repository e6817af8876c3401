"""How ranks talk: groups, primitives in dual pairs, agreement. The only importer of torch.distributed."""

from seqpar.comm.agree import DesyncError, agree, agreed
from seqpar.comm.gather import all_gather, reduce_scatter
from seqpar.comm.group import Group
from seqpar.comm.heads import HeadTrade, heads_to_rows, rows_to_heads
from seqpar.comm.reduce import all_reduce, all_reduce_, replicate
from seqpar.comm.ring import RingSum, ring_pass
from seqpar.comm.threads import simulate
from seqpar.comm.traffic import Count, Traffic

__all__ = [
    "Count",
    "DesyncError",
    "Group",
    "HeadTrade",
    "RingSum",
    "Traffic",
    "agree",
    "agreed",
    "all_gather",
    "all_reduce",
    "all_reduce_",
    "heads_to_rows",
    "reduce_scatter",
    "replicate",
    "ring_pass",
    "rows_to_heads",
    "simulate",
]
