"""Checkpointing that keeps attention: nothing is sent or attended twice, and gradients are the same bits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import seqpar
from seqpar import Mask, simulate

CAUSAL = Mask(causal=True)
MODULES = {
    "ring": lambda g: seqpar.RingAttention(g, mask=CAUSAL),
    "ulysses": lambda g: seqpar.UlyssesAttention(g, mask=CAUSAL),
    "ulysses in chunks": lambda g: seqpar.UlyssesAttention(g, mask=CAUSAL, head_chunks=2),
    "allgather": lambda g: seqpar.AllGatherAttention(g, mask=CAUSAL),
    "mesh": lambda g: seqpar.MeshAttention(g.grid(ulysses=2), mask=CAUSAL),
    "hybrid": lambda g: seqpar.HybridAttention(g.grid(ulysses=2), mask=CAUSAL),
    "rows": lambda g: seqpar.MaterialisedAttention(g, mask=CAUSAL),
    "columns": lambda g: seqpar.MaterialisedAttention(g, mask=CAUSAL, shard="columns"),
    "depth": lambda g: seqpar.MaterialisedAttention(
        g, mask=CAUSAL, shard="depth", score=seqpar.Score(softcap=3.0)
    ),
}


def block(y, attend, layout):
    """Two heads of keys for four of queries; what is recomputed around attention is not linear."""
    q, kv = y.sin().unflatten(-1, (4, 4)), y[..., :8].cos().unflatten(-1, (2, 4))
    return y + attend(q, kv, kv.tanh(), layout).flatten(2).sin()


def trained(group, make, contexts):
    """(gradient, bytes sent by forward, by both, by agreement) of two blocks after one another."""
    x = torch.randn(1, 21, 16, generator=torch.Generator().manual_seed(0)).double()
    layout, attend = seqpar.zigzag(21, group.size), make(group)
    mine = seqpar.shard_sequence(x, layout, group.rank).requires_grad_()
    group.traffic.reset()
    y = mine
    for _ in range(2):
        if contexts is None:
            y = block(y, attend, layout)
        else:
            y = checkpoint(block, y, attend, layout, use_reentrant=False, **contexts)
    forward = group.traffic.total.bytes
    (dx,) = torch.autograd.grad(y.square().sum(), mine)
    return dx, forward, group.traffic.total.bytes, group.traffic.agreement.bytes


KEPT, RECOMPUTED = {"context_fn": seqpar.keep_attention}, {}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("size", [1, 4])
def test_forward_and_its_messages_happen_once(name, size):
    if size == 1 and name in ("mesh", "hybrid"):
        pytest.skip("a grid of two ranks needs two")
    plain, kept, again = (
        simulate(size, trained, MODULES[name], contexts) for contexts in (None, KEPT, RECOMPUTED)
    )
    for (dx, *sent), (dx_kept, *sent_kept), (dx_again, forward, both, agreement) in zip(
        plain, kept, again, strict=True
    ):
        assert torch.equal(dx, dx_kept)
        assert torch.equal(dx, dx_again)
        assert sent == sent_kept
        assert both == sent[1] + forward, "without it, forward is sent a second time"
        assert agreement * 2 == sent[2] * 3, "of forward, forward again and backward"


def test_messages_happen_once_between_processes(worlds):
    plain, kept = (worlds.run(3, on_process, "ulysses", keep) for keep in (False, True))
    for (dx, *sent), (dx_kept, *sent_kept) in zip(plain, kept, strict=True):
        assert torch.equal(dx, dx_kept)
        assert sent == sent_kept


def on_process(group, name, keep):
    return trained(group, MODULES[name], KEPT if keep else None)


def test_a_graph_can_go_backward_twice():
    def fn(group):
        layout, attend = seqpar.zigzag(9, group.size), seqpar.RingAttention(group)
        mine = torch.randn(1, layout.rows[group.rank], 16).requires_grad_()
        out = checkpoint(block, mine, attend, layout, use_reentrant=False, **KEPT)
        first, second = (
            torch.autograd.grad(out.sum(), mine, retain_graph=again)[0] for again in (True, False)
        )
        assert torch.equal(first, second)

    simulate(2, fn)


def test_a_compiler_at_work_on_another_thread_does_not_matter(monkeypatch):
    """Torch's flag that it compiles is one for all threads: ranks of one process see each other's."""
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    contexts = seqpar.keep_attention()
    assert not any(isinstance(c, TorchDispatchMode) for c in contexts), (
        "these are for compiled code"
    )


@pytest.mark.parametrize("module", ["ring", "ulysses"])
def test_what_is_kept_must_not_be_written_to(module):
    """Otherwise backward would be that of other numbers, and nobody would notice."""

    def fn(group):
        layout, attend = seqpar.zigzag(8, group.size), MODULES[module](group)

        def careless(y):
            heads = y.unflatten(-1, (4, 4))
            with torch.no_grad():
                out = attend(heads, heads, heads, layout)
                out.mul_(2.0)
            return attend(heads, heads, heads, layout) + out

        mine = torch.randn(1, layout.rows[group.rank], 16).requires_grad_()
        out = checkpoint(careless, mine, use_reentrant=False, **KEPT)
        with pytest.raises(RuntimeError, match="written to in place"):
            torch.autograd.grad(out.sum(), mine)

    simulate(2, fn)


def test_a_call_that_is_another_when_recomputed_is_an_error():
    """A seed that is assigned outside: backward would drop other weights than forward did."""

    def fn(group):
        layout = seqpar.zigzag(8, group.size)
        attend = seqpar.RingAttention(group, dropout=seqpar.Dropout(0.5, 0))
        mine = torch.randn(1, layout.rows[group.rank], 16).requires_grad_()
        out = checkpoint(block, mine, attend, layout, use_reentrant=False, **KEPT)
        attend.dropout = seqpar.Dropout(0.5, 1)
        with pytest.raises(RuntimeError, match=r"seed=0.* then, .*seed=1.* now"):
            torch.autograd.grad(out.sum(), mine)

    simulate(2, fn)


def everything(group, strategy, wrap):
    """(dx, dslopes) of a call with every score term, dropout and an lse that is differentiated."""
    generator = torch.Generator().manual_seed(1)
    layout = seqpar.zigzag(11, group.size)
    x = torch.randn(1, 11, 16, generator=generator).double()
    mine = seqpar.shard_sequence(x, layout, group.rank).requires_grad_()
    slopes = torch.rand(4, generator=generator).double().requires_grad_()

    def called(y, slopes):
        score = seqpar.Score(alibi_slopes=slopes, sinks=slopes.sin(), softcap=4.0)
        drop = seqpar.Dropout(0.2, 5)
        plan = seqpar.Plan(group, layout, CAUSAL, score, strategy, dropout=drop)
        heads = y.cos().unflatten(-1, (4, 4))
        out, lse = seqpar.attention_with_lse(heads, heads.sin(), heads, plan)
        return (out * lse.sigmoid().unsqueeze(-1)).flatten(2)

    out = wrap(called)(mine, slopes)
    return torch.autograd.grad(out.square().sum(), (mine, slopes))


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "materialised_depth"])
@pytest.mark.parametrize("size", [1, 3])
def test_learned_scores_lse_and_dropout_are_served(strategy, size):
    def kept(fn):
        return lambda *args: checkpoint(fn, *args, use_reentrant=False, **KEPT)

    plain, checkpointed = (
        simulate(size, everything, strategy, wrap) for wrap in (lambda fn: fn, kept)
    )
    for here, there in zip(plain, checkpointed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
