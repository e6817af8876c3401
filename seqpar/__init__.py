"""Attention over sequences too long for one device: exact for any number of ranks.

Dimensions, in shapes throughout: `b` batch, `s` whole sequence, `sl` rows on this rank, `i` query rows
and `j` key columns of a block, `hq`, `hkv` heads, `hl` heads on this rank after an exchange, `d` width
of q and k, `vd` width of v. Tensors are `[b s h d]`, lse is `[b s h]`, natural log, float32 or wider.
"""

import os

from seqpar.requires import require, require_dependencies

require_dependencies()

if os.environ.get("SEQPAR_CHECK_SHAPES") == "1":  # for tests, and inherited by the ranks they start
    from jaxtyping import install_import_hook

    require("beartype", by="SEQPAR_CHECK_SHAPES=1")

    # docs/design.md: the shape check
    # Not what users call (Score, Dropout, attention, ...): that refuses by itself, and on all ranks.
    # Not the Triton kernels: their interpreter wants the functions as they were written.
    # Not what knows integers alone (bands, rectangles, layouts): there are no shapes, mypy has seen the
    # types, and most calls are there.
    _kernels = ["dispatch", "aten", "block", "partial", "reference", "row_softmax"]
    _kernels += ["triton_attention"]
    _checked = [
        *(f"seqpar_kernels.{name}" for name in _kernels),
        "seqpar.strategies.allgather",
        "seqpar.strategies.materialised",
        "seqpar.strategies.mesh",
        "seqpar.strategies.ring",
        "seqpar.strategies.stored_scores",
        "seqpar.strategies.ulysses",
    ]
    install_import_hook(_checked, "beartype.beartype")

from seqpar import biases, masks
from seqpar.checkpointing import keep_attention
from seqpar.comm import DesyncError, Grid, Group, simulate
from seqpar.data import shard_batch, shard_sequence, unshard_sequence
from seqpar.decode import KVCache
from seqpar.functional import attention, attention_with_lse, merge
from seqpar.gradients import backward, sum_gradients, summed_gradients
from seqpar.head_loss import tiled_loss
from seqpar.host_memory import saved_on_host
from seqpar.layout import Layout, Mask, balanced, contiguous, striped, zigzag
from seqpar.loader import ShardedLoader
from seqpar.logprobs import token_logprobs
from seqpar.loss import count_tokens, mean_loss
from seqpar.module import (
    AllGatherAttention,
    Attention,
    HybridAttention,
    MaterialisedAttention,
    MeshAttention,
    RingAttention,
    UlyssesAttention,
)
from seqpar.multihead import MultiheadAttention
from seqpar.packing import packed_documents, padded_documents
from seqpar.replicas import same_weights
from seqpar.strategies import Plan
from seqpar.tiled_modules import tiled, tiled_mlps
from seqpar.version import VERSION
from seqpar.warm import warm_up
from seqpar_kernels import Dropout, Score

__version__ = VERSION

__all__ = [
    "AllGatherAttention",
    "Attention",
    "DesyncError",
    "Dropout",
    "Grid",
    "Group",
    "HybridAttention",
    "KVCache",
    "Layout",
    "Mask",
    "MaterialisedAttention",
    "MeshAttention",
    "MultiheadAttention",
    "Plan",
    "RingAttention",
    "Score",
    "ShardedLoader",
    "UlyssesAttention",
    "attention",
    "attention_with_lse",
    "backward",
    "balanced",
    "biases",
    "contiguous",
    "count_tokens",
    "keep_attention",
    "masks",
    "mean_loss",
    "merge",
    "packed_documents",
    "padded_documents",
    "same_weights",
    "saved_on_host",
    "shard_batch",
    "shard_sequence",
    "simulate",
    "striped",
    "sum_gradients",
    "summed_gradients",
    "tiled",
    "tiled_loss",
    "tiled_mlps",
    "token_logprobs",
    "unshard_sequence",
    "warm_up",
    "zigzag",
]
