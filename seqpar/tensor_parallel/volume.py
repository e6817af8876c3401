"""What a rank sends under each policy, in closed form: to be compared with what `Collectives` counted.

Elements that rings send, per rank and step, P ranks: an all-reduce of x elements 2 (P - 1) / P x, an
all-gather (P - 1) times its input, a reduce-scatter (P - 1) / P of it. All weights learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeAlias

from seqpar.tensor_parallel.collectives import Kind, sent_fraction
from seqpar.tensor_parallel.cut import Form

Part: TypeAlias = Literal["layers", "norms", "embedding", "head", "loss", "weights"]
Elements: TypeAlias = Mapping[Part, Mapping[Kind, Fraction]]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model as Gemma's or Llama's, and how many tokens it is given.

    Args:
        tokens: rows of a rank's batch, all sequences together (A).
        width: of the model (D).
        num_heads, num_kv_heads, head_dim: n, kv and h.
        mlp: width of gate and of up (F).
        vocabulary: V.
        layers: number of blocks.
        norms: norms over the width in each layer: 4 in Gemma2, else 2.
        head_norms: norms over single heads in each layer: 2 in Qwen3 and Gemma3, else none.
    """

    tokens: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    layers: int = 1
    norms: int = 2
    head_norms: int = 0

    @staticmethod
    def of(config: Any, tokens: int) -> Sizes:
        """The sizes in the config of a transformers model."""
        kind = config.model_type
        return Sizes(
            tokens,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            config.intermediate_size,
            config.vocab_size,
            config.num_hidden_layers,
            norms=4 if kind in ("gemma2", "gemma3_text") else 2,
            head_norms=2 if kind in ("qwen3", "gemma3_text") else 0,
        )

    @property
    def q(self) -> int:
        """Features of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv(self) -> int:
        """Features of all key heads."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class PolicyVolume:
    """Elements that a rank sends, by part of the model and kind of collective."""

    forward: Elements
    backward: Elements

    def by_kind(self, direction: Literal["forward", "backward"]) -> dict[Kind, Fraction]:
        """Elements of all parts together; kinds that send nothing are left out."""
        total: dict[Kind, Fraction] = {}
        for kinds in getattr(self, direction).values():
            for kind, elements in kinds.items():
                total[kind] = total.get(kind, Fraction(0)) + elements
        return {kind: elements for kind, elements in total.items() if elements}

    def sent(self, part: Part | None = None) -> tuple[Fraction, Fraction]:
        """Elements forward and backward, of a part or of all."""
        forward, backward = (
            sum(
                (sum(kinds.values(), Fraction(0)) for p, kinds in x.items() if part in (None, p)),
                Fraction(0),
            )
            for x in (self.forward, self.backward)
        )
        return forward, backward


def megatron_volume(sizes: Sizes, num_ranks: int, *, logits: Form = "whole") -> PolicyVolume:
    """Under `megatron`: two all-reduces of [tokens, width] for each layer, forward and backward.

    Args:
        logits: as given to the policy; with "sharded" the loss is `vocabulary_cross_entropy`.

    Raises:
        ValueError: a size is not a multiple of the ranks.
    """
    _check(
        num_ranks, heads=sizes.num_heads, kv=sizes.num_kv_heads, mlp=sizes.mlp, v=sizes.vocabulary
    )
    reduce, gather = _sends("all_reduce", num_ranks), _sends("all_gather", num_ranks)
    stream = sizes.tokens * sizes.width
    whole = sizes.tokens * sizes.vocabulary // num_ranks if logits == "whole" else 0
    forward: Elements = {
        "layers": reduce(sizes.layers * 2 * stream),
        "embedding": reduce(stream),
        "head": gather(whole),
        "loss": _loss(sizes, num_ranks, logits),
    }
    backward: Elements = {
        "layers": reduce(sizes.layers * 2 * stream),
        "norms": reduce(sizes.layers * sizes.head_norms * sizes.head_dim),
        "head": reduce(stream),
    }
    return PolicyVolume(forward, backward)


def contracted_volume(sizes: Sizes, num_ranks: int, *, logits: Form = "whole") -> PolicyVolume:
    """Under `contracted`: an all-reduce of every projection forward, of o's and down's input backward.

    Args:
        logits: as given to the policy; with "sharded" the loss is `vocabulary_cross_entropy`.

    Raises:
        ValueError: a size is not a multiple of the ranks.
    """
    _check(num_ranks, width=sizes.width, q=sizes.q, kv=sizes.kv, mlp=sizes.mlp, v=sizes.vocabulary)
    reduce, gather = _sends("all_reduce", num_ranks), _sends("all_gather", num_ranks)
    scatter = _sends("reduce_scatter", num_ranks)
    tokens, scores = sizes.tokens, sizes.tokens * sizes.vocabulary
    norms = reduce((sizes.layers * sizes.norms + 1) * tokens)
    forward: Elements = {
        "layers": reduce(sizes.layers * tokens * (sizes.q + 2 * sizes.kv + 2 * sizes.mlp)),
        "norms": norms,
        "head": reduce(scores) if logits == "whole" else scatter(scores),
        "loss": _loss(sizes, num_ranks, logits),
    }
    backward: Elements = {
        "layers": reduce(sizes.layers * tokens * (sizes.q + sizes.mlp)),
        "norms": norms,
        "head": gather(0 if logits == "whole" else scores // num_ranks),
    }
    return PolicyVolume(forward, backward)


def weights_volume(
    sizes: Sizes, num_ranks: int, num_replicas: int, *, is_tied: bool
) -> PolicyVolume:
    """What `megatron` on a mesh of two axes sends along the second: weights gathered, gradients scattered.

    Along the first it is `megatron_volume`. The weights of a layer are gathered forward and again backward,
    those of the embedding, the head and the last norm forward only. No biases.

    Args:
        num_ranks, num_replicas: of the first and of the second axis.
        is_tied: whether the head is the embedding.

    Raises:
        ValueError: a weight's part has a number of rows that is no multiple of the replicas.
    """
    parts = {"heads": sizes.q, "kv": sizes.kv, "mlp": sizes.mlp, "v": sizes.vocabulary}
    _check(num_ranks, **parts)
    rows = {name: size // num_ranks for name, size in parts.items()} | {"width": sizes.width}
    _check(num_replicas, **rows, head_norms=sizes.head_norms and sizes.head_dim)
    cut = sizes.width * (2 * rows["heads"] + 2 * rows["kv"] + 3 * rows["mlp"])
    whole = sizes.norms * sizes.width + sizes.head_norms * sizes.head_dim
    layers = sizes.layers * (cut + whole)
    rest = sizes.width * ((1 if is_tied else 2) * rows["v"] + 1)
    gather = _sends("all_gather", num_replicas)
    scatter = _sends("reduce_scatter", num_replicas)
    forward: Elements = {"weights": gather((layers + rest) // num_replicas)}
    backward: Elements = {"weights": gather(layers // num_replicas) | scatter(layers + rest)}
    return PolicyVolume(forward, backward)


def _loss(sizes: Sizes, num_ranks: int, logits: Form) -> dict[Kind, Fraction]:
    """The maximum, then the sum and the target's logit together, of every token."""
    return _sends("all_reduce", num_ranks)(0 if logits == "whole" else 3 * sizes.tokens)


def _sends(kind: Kind, num_ranks: int) -> Callable[[int], dict[Kind, Fraction]]:
    return lambda elements: {kind: elements * sent_fraction(kind, num_ranks)}


def _check(num_ranks: int, **sizes: int) -> None:
    uneven = {name: size for name, size in sizes.items() if size % num_ranks}
    if uneven:
        raise ValueError(f"the sizes must be multiples of the {num_ranks} ranks, got {uneven}")
