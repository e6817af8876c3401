"""The trial of a model: four runs on a few tokens, one for each way of giving it positions and a mask.

One of those is done again with labels.

|                 | no attention_mask                           | attention_mask                          |
|-----------------|---------------------------------------------|-----------------------------------------|
| no position_ids | `plain`: 1 sequence, the model's attention  | `masked`: 1 sequence, ours              |
| position_ids    | `numbered`: 2 sequences, the model's        | `both`: 5 sequences, ours                |

A run has one of these for all of its sequences, so there are no fewer. What each proves:

plain                 What one device gives, to compare with. It is one row per token. The same run with
                      labels says which of them the model's own loss compares a row with.
numbered              Sequence 0: given the positions that it counts itself, the model gives `plain` again.
                      So it counts from 0, or this run is done once more, with positions after the padding
                      token. Sequence 1: what it makes of positions that start anew.
both                  ALONE and MOVED: rows do not depend on each other but through the attention function.
                      Attention shows each of them only itself, and some rows are in both sequences, with the
                      same token and position, but elsewhere and between other rows. A module that is given
                      the same for them and does not return the same lets something pass between rows that
                      ranks would not see: attention of its own, a convolution, a state, positions counted
                      rather than taken from position_ids.
                      WHOLE: through the attention function, one rank gives what `plain` gave.
                      PACKED: as two documents, it gives what the model made of them, or does not pack.
masked                Rows after hidden ones are those of APART, the same document at the same positions: or
                      the model counts positions over what the mask shows.

The sequences of a batch prove what runs of their own would, since WHOLE is compared with `plain`, where the
same tokens were alone: what passes between sequences, or follows from the tokens of any of them, would show
there. `masked` has no special tokens either, and must run the same attention modules in the same order.
A model whose attention was replaced cannot do the runs without a mask any more. They were done before; of
what has changed since, APART is compared with `masked`, where its tokens were alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from seqpar.comm import Group, agreed
from seqpar.integrations.transformers.attention.call import Call
from seqpar.integrations.transformers.attention.patterns import as_bytes
from seqpar.integrations.transformers.attention.registration import NAME, MissingPlanError
from seqpar.integrations.transformers.attention.replacement import Handover, handover_of
from seqpar.integrations.transformers.internals import attention_name, name_attention
from seqpar.integrations.transformers.probe.before import Before, evaluating, run_before
from seqpar.integrations.transformers.probe.compare import Rows, difference, rows_of
from seqpar.integrations.transformers.probe.findings import Findings
from seqpar.integrations.transformers.probe.tokens import (
    APART,
    PACKED,
    PACKED_AT,
    SEQUENCES,
    WHOLE,
    Tokens,
)
from seqpar.integrations.transformers.probe.trace import Trace
from seqpar.layout import contiguous
from seqpar.strategies import Plan

LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


def try_out(inner: PreTrainedModel, stack: PreTrainedModel) -> Findings:
    """Tries a model, here alone, and switches its attention. Restores nothing where it raises.

    All ranks that its weights are sharded over must call.

    Args:
        stack: the part of it that attends over ranks, see `text_stack`.

    Raises:
        NotImplementedError: transformers cannot switch its attention; and as `run_before` and `run_after`.
    """
    handover = handover_of(inner)
    switch(stack, handover)
    known: Before | Findings | None
    if handover is not None:
        known, across = handover.findings, handover.group
    else:
        stack.set_attn_implementation("eager")
        known, across = run_before(inner, attention_name(stack.config)), Group.alone()
        stack.set_attn_implementation(NAME)
    assert known is not None, "a model whose attention was replaced was tried then"
    return run_after(inner, known, across=across)


def switch(inner: PreTrainedModel, handover: Handover | None) -> None:
    """Has a model make the masks of seqpar and, where it attends by itself, use its attention function.

    Raises:
        NotImplementedError: transformers cannot switch it.
    """
    if handover is not None and not handover.switches:
        name_attention(inner.config, NAME)  # for its masks; nothing else looks at it any more
    else:
        inner.set_attn_implementation(NAME)
    if attention_name(inner.config) != NAME:
        named = (
            f"{n} ({type(m).__name__})"
            for n, m in inner.named_modules()
            if "Attention" in type(m).__name__
        )
        raise NotImplementedError(
            f"{next(named, type(inner).__name__)} computes attention by itself and not through the attention "
            "function of transformers, so it cannot be switched; replace_attention of "
            "seqpar.integrations.transformers puts another in its place in models that it knows"
        )


def run_after(inner: PreTrainedModel, known: Before | Findings, *, across: Group) -> Findings:
    """Runs a model that was switched, with a mask. All ranks that its weights are sharded over must call.

    Args:
        known: the runs of the model as it was; or what was found by them, of a model that has changed since.
        across: the ranks that its heads are shared over.

    Raises:
        NotImplementedError: rows depend on each other, or the model does not pass its arguments on, or it
            returns something else than before.
        DesyncError: another rank of those raised.
    """
    tokens = Tokens.of(inner)
    # docs/design.md: a model is tried in four runs
    given, two = tokens.runs(inner, first=known.first_position), (0, PACKED_AT, tokens.num_rows)
    # Of the sequences that do not attend alone, WHOLE is one document, PACKED and APART are two.
    alone = Plan(Group.alone(), contiguous(tokens.num_rows, 1))
    trace = Trace(inner, tokens, Call(alone, (None, two, two)), num_alone=WHOLE)
    hidden = as_bytes(given.masked["attention_mask"])
    again = Trace(inner, tokens, Call(alone, (two,), hidden))
    with evaluating(inner):
        with _explained(inner), trace.watching():
            output = inner(**given.both, seqpar=trace)
        masked = inner(**given.masked, seqpar=again)
    with agreed(across, operation="trying out"):
        _check_rows(inner, trace, again)
        ours = [rows_of(output, sequence) for sequence in SEQUENCES]
        counts_seen = difference(ours[APART], rows_of(masked, 0), PACKED_AT) is not None
        if isinstance(known, Findings):
            packs = known.packs
            _check_unchanged(inner, known.counts_seen, counts_seen)
        else:
            packs = difference(known.packed, ours[PACKED], PACKED_AT) is None
            _check_equal(inner, known, ours[WHOLE])
    calls = Counter(trace.attending)
    once = [module for module in trace.attending if calls[module] == 1]
    return Findings(
        causal=all(terms.mask.causal for terms in trace.terms),
        first_position=known.first_position,
        counts_seen=counts_seen,
        packs=packs,
        labels=known.labels,
        masks=tuple(dict.fromkeys((terms.mask, terms.chunk) for terms in trace.terms)),
        numbers={module: number for number, module in enumerate(once)},
    )


@contextmanager
def _explained(inner: PreTrainedModel) -> Iterator[None]:
    """A run of which what fails is what the model does with a mask that is none, or with the plan."""
    try:
        yield
    except MissingPlanError as error:
        raise NotImplementedError(
            f"{type(inner).__name__} does not pass its keyword arguments on to its attention, so no plan can "
            "reach it"
        ) from error
    except (NotImplementedError, ValueError):
        raise
    except Exception as error:
        raise NotImplementedError(
            f"{type(inner).__name__} looks into its masks, which a shard does not have: {error}"
        ) from error


def _check_rows(inner: PreTrainedModel, trace: Trace, again: Trace) -> None:
    at_fault = list(trace.culprits)
    if trace.attending != again.attending:
        at_fault.append("the model, which runs other modules for other tokens,")
    if at_fault:
        raise NotImplementedError(
            f"{at_fault[0]} lets rows depend on each other outside of the attention function, which a shard "
            "would cut in silence"
        )
    if not trace.attending:
        raise NotImplementedError(
            f"no layer of {type(inner).__name__} calls the attention function"
        )
    # Few tokens may not reveal that a layer attends to a choice of what its mask shows.
    kinds = getattr(inner.config.get_text_config(), "layer_types", None)
    for number, kind in enumerate(kinds or ()):
        if kind not in LAYER_TYPES:
            raise NotImplementedError(
                f"layer {number} of {type(inner).__name__} is {kind!r}; known are {sorted(LAYER_TYPES)}"
            )


def _check_equal(inner: PreTrainedModel, known: Before, ours: Rows) -> None:
    found = difference(known.outputs, ours)
    if found is not None:
        raise NotImplementedError(
            f"{type(inner).__name__} returns other {found[0]} than with {known.attention} attention, off by "
            f"{found[1]:.2g}: layers do something that does not reach the attention function, or it numbers "
            "positions in a way of its own"
        )


def _check_unchanged(inner: PreTrainedModel, before: bool, now: bool) -> None:
    """Refuses a model that counts positions in another way than when its attention was replaced."""
    if before != now:
        raise NotImplementedError(
            f"{type(inner).__name__} lets rows depend on the other sequences of a batch, or counts positions "
            "in another way, since its attention was replaced"
        )
