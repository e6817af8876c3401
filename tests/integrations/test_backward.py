"""`sp.backward` and `sp.summed_gradients`: the gradients of one device, or an error on every rank."""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import seqpar
from seqpar.integrations.transformers import SequenceParallel, replace_attention
from seqpar.testing.models.fused import FUSED, exactly, whole_gradients
from seqpar.testing.models.tiny import SERVED, batch_of
from seqpar.testing.models.training_step import attend_by, gradients_of, one_device
from seqpar.testing.refusals import check_told, told

BATCHES = batch_of(2, 21), batch_of(2, 9)
FAMILY = SERVED["gpt_bigcode"]  # which has no step in float32


def want_of(model, batches):
    """The gradients of the mean over the tokens of all batches, on one device."""
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    total = {}
    for batch, count in zip(batches, counts, strict=True):
        for name, grad in one_device(model, batch, "next").gradients.items():
            total[name] = total.get(name, 0) + grad * count / sum(counts)
    return total


def check(got, want):
    assert got.keys() == want.keys()
    for name, grad in got.items():
        torch.testing.assert_close(
            grad, want[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def one_step(group, model, strategy):
    model = copy.deepcopy(model)
    sp = SequenceParallel(model, attend_by(strategy, group))
    sp.backward(sp.loss(BATCHES[0]))
    return gradients_of(model)


@pytest.mark.parametrize(
    ("size", "strategy"), [(1, "ring"), (2, "ulysses"), (3, "ring"), (4, "hybrid")]
)
def test_one_call_gives_the_gradients_of_one_device(size, strategy):
    model = FAMILY.make()
    want = want_of(model, BATCHES[:1])
    for got in seqpar.simulate(size, one_step, model, strategy):
        check(got, want)


def replicas(group, model):
    """A step of two replicas, each of another batch; and one of two micro-batches in a block."""
    grid = group.grid(ring=2)
    model = copy.deepcopy(model)
    sp = SequenceParallel(model, seqpar.RingAttention(grid.ulysses))
    batch = BATCHES[grid.index_of(group.rank)[0]]
    sp.backward(sp.loss(batch, everyone=group), everyone=group)
    at_once = gradients_of(model)
    model.zero_grad()
    total = torch.tensor(2 * sum(int((b["labels"][:, 1:] != -100).sum()) for b in BATCHES))
    with sp.summed_gradients(everyone=group):
        for batch in BATCHES:
            sp.loss(batch, everyone=group, num_tokens=total).backward()
    return at_once, gradients_of(model)


def test_replicas_and_micro_batches_give_the_gradients_of_one_device(worlds):
    model = FAMILY.make()
    want = want_of(model, BATCHES)
    for found in (*seqpar.simulate(4, replicas, model), *worlds.run(4, replicas, model)):
        for got in found:
            check(got, want)


def refusals(group, model):
    few = group.grid(ulysses=2).ulysses
    model = copy.deepcopy(model)
    sp = SequenceParallel(model, seqpar.RingAttention(few))
    loss = sp.loss(BATCHES[0], everyone=group)
    texts = [told(lambda: sp.backward(loss))]
    mean = sp.loss(BATCHES[0], gradients="mean")
    texts.append(told(lambda: sp.backward(mean)))
    sp.backward(sp.loss(BATCHES[0]))
    texts.append(told(lambda: sp.backward(sp.loss(BATCHES[1]))))
    model.zero_grad()

    def fails():
        with sp.summed_gradients(everyone=group):
            loss = sp.loss(BATCHES[0], everyone=group)
            if group.rank == 1:
                raise ValueError("out of luck")
            loss.backward()

    texts.append(told(fails))
    with pytest.raises(ValueError, match=r"kind must be one of .*did you mean 'zigzag'"):
        sp.shard(BATCHES[0], kind="zig-zag")
    return texts


SAID = (
    "the loss is the mean over the tokens of ranks .*0, 1, 2, 3., but gradients are summed over",
    "gradients='mean' is for wrappers that average, .* 2 times too large",
    "gradients of an earlier step are there",
    "ValueError: out of luck",
)


def test_what_would_be_wrong_gradients_is_refused_on_every_rank():
    for texts in seqpar.simulate(4, refusals, FAMILY.make()):
        for text, pattern in zip(texts, SAID, strict=True):
            check_told([text], pattern)


def in_ddp(group, model):
    sp = SequenceParallel(model, seqpar.RingAttention(group))
    ddp = DistributedDataParallel(model)
    loss = sp.loss(BATCHES[0], gradients="mean")
    assert sp.model is ddp
    text = told(lambda: sp.backward(loss))
    loss.backward()
    return text, gradients_of(model)


def test_ddp_is_named_and_goes_back_by_itself(four_processes):
    model = FAMILY.make()
    want = want_of(model, BATCHES[:1])
    for text, got in four_processes.run(in_ddp, model):
        check_told([text], "NotImplementedError: DistributedDataParallel reduces gradients itself")
        check(got, want)


def over_tp(group, model, at_fault):
    """A step over 2 x 2 ranks, of which those of tp share heads; one may raise in the middle of it."""
    names = [name for name, _ in model.named_parameters()]
    grid = group.grid(ring=2)
    model = copy.deepcopy(model)
    replaced = replace_attention(model, tp=grid.ulysses)
    sp = SequenceParallel(model, seqpar.RingAttention(grid.ring))

    def step():
        with sp.summed_gradients():
            loss = sp.loss(BATCHES[0])
            if group.rank == at_fault:
                raise ValueError("out of luck")
            loss.backward()

    text = told(step)
    return text, whole_gradients(model, replaced, names) if text == "nothing" else None


def test_ranks_that_share_heads_take_part():
    with exactly():
        model = FUSED["bloom"].make()
        want = one_device(model, BATCHES[0], "next", "eager").gradients
        for text, got in seqpar.simulate(4, over_tp, model, None):
            assert text == "nothing"
            check(got, want)


@pytest.mark.parametrize("at_fault", range(4))
def test_ranks_that_share_heads_hear_of_an_error(at_fault):
    for text, _ in seqpar.simulate(4, over_tp, FUSED["bloom"].make(), at_fault):
        check_told([text], "ValueError: out of luck")


def by_a_layout(group, model):
    """A kind may be the layout itself, or what makes it."""
    sp = SequenceParallel(copy.deepcopy(model), seqpar.RingAttention(group))
    layout = seqpar.striped(21, group.size)
    inputs = [sp.shard(BATCHES[0], kind=kind) for kind in ("striped", seqpar.striped, layout)]
    assert [x.layout for x in inputs] == [layout] * 3
    return [sp.loss(BATCHES[0], kind=kind).detach() for kind in (seqpar.striped, layout)]


def test_a_model_takes_any_kind_of_layout():
    model = FAMILY.make()
    want = one_device(model, BATCHES[0], "next").loss
    for losses in seqpar.simulate(3, by_a_layout, model):
        for loss in losses:
            torch.testing.assert_close(loss, want, rtol=1e-10, atol=0)
