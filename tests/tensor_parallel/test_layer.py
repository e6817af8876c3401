"""`ParallelAttention` on any tp x sp equals a dense layer that is written out from the definition."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import seqpar
from seqpar.tensor_parallel import FusedQKV, Names, ParallelAttention, Rotary
from seqpar.testing import oracle

LENGTH, WIDTH = 13, 10
EXACT = {"rtol": 1e-11, "atol": 1e-11}
DOUBLE = {"dtype": torch.float64}
FUSED, APART = Names(("query_key_value",), "dense"), Names(("q", "k", "v"), "o")
LAYERS = {
    "per head, rotary in halves": (
        FusedQKV.per_head(6, 4, bias=True), FUSED, {"rotary": Rotary(4), "out_bias": True},
    ),
    "per group, partial rotary, transposed": (
        FusedQKV.per_group(10, 4, 5, bias=True, transposed=True), FUSED,
        {"rotary": Rotary(2, base=100.0), "out_transposed": True},
    ),
    "four blocks of q, v, k, interleaved rotary": (
        FusedQKV(8, 8, 6, 4, "qvk"), FUSED, {"rotary": Rotary(4, interleaved=True)},
    ),
    "apart, unevenly shared kv heads, norms": (
        FusedQKV.contiguous(12, 4, 3), APART, {"norms": True, "rotary": Rotary(4)},
    ),
    "one kv head, clipped": (
        FusedQKV.contiguous(7, 3, 1, bias=True), FUSED, {"clip": 0.8, "norms": True},
    ),
}  # fmt: skip


def formula_rows(qkv, component, head):
    """The rows of a head, straight from the formula of the class's docstring."""
    per_block = {"q": qkv.num_heads // qkv.blocks}
    per_block |= dict.fromkeys("kv", qkv.num_kv_heads // qkv.blocks)
    before = sum(per_block[c] for c in qkv.order[: qkv.order.index(component)])
    m, w = per_block[component], sum(per_block.values())
    return [((head // m) * w + before + head % m) * qkv.head_dim + i for i in range(qkv.head_dim)]


def turned(x, rotary):
    """Rotary by complex numbers: x `[b s h d]` at positions 0, 1, ..."""
    pairs = rotary.dim // 2
    places = torch.arange(pairs).double() / pairs
    turns = torch.arange(x.shape[1])[:, None] / rotary.base**places
    unit = torch.polar(torch.ones_like(turns), turns)[:, None]
    at = torch.arange(rotary.dim)
    one, two = (at[0::2], at[1::2]) if rotary.interleaved else (at[:pairs], at[pairs:])
    z = torch.complex(x[..., one], x[..., two]) * unit
    y = x.clone()
    y[..., one], y[..., two] = z.real, z.imag
    return y


def dense_layer(qkv, names, options, state, x, terms):
    """The layer on one device, differentiable in x and in the whole weights."""
    parts = {}
    for component in "qkv":
        num = qkv.num_heads if component == "q" else qkv.num_kv_heads
        if len(names.qkv) == 1:
            name = names.qkv[0]
            rows = torch.tensor([formula_rows(qkv, component, j) for j in range(num)]).flatten()
        else:
            name, rows = component, slice(None)
        weight = state[f"{name}.weight"]
        y = x @ (weight.T if qkv.transposed else weight)[rows].T
        if qkv.bias:
            y = y + state[f"{name}.bias"][rows]
        if "clip" in options:
            y = y.clamp(-options["clip"], options["clip"])
        parts[component] = y.unflatten(2, (num, qkv.head_dim))
    for component in "qk":
        if options.get("norms"):
            y, of = parts[component], f"{component}_norm"
            y = (y - y.mean(-1, keepdim=True)) / (
                y.var(-1, keepdim=True, correction=0) + 1e-5
            ).sqrt()
            parts[component] = y * state[f"{of}.weight"] + state[f"{of}.bias"]
        if "rotary" in options:
            parts[component] = turned(parts[component], options["rotary"])
    out = oracle.attention(*parts.values(), oracle.visible(LENGTH, True, 9), terms).flatten(2)
    weight = state[f"{names.out}.weight"]
    y = out @ (weight if options.get("out_transposed") else weight.T)
    return y + state[f"{names.out}.bias"] if options.get("out_bias") else y


def make_layer(tp, attention, qkv, names, options):
    options = dict(options)
    norms = {}
    if options.pop("norms", False):
        norms = {name: nn.LayerNorm(qkv.head_dim, **DOUBLE) for name in ("q_norm", "k_norm")}
    return ParallelAttention(
        qkv, WIDTH, attention=attention, tp=tp, names=names, **options, **norms, **DOUBLE
    )


def whole_weights(name):
    """Random whole weights of a layer, and x and the gradient of the result."""
    torch.manual_seed(len(name))
    layer = make_layer(None, None, *LAYERS[name])
    shapes = layer.weights.shapes(layer)
    state = {n: torch.randn(shape, **DOUBLE) for n, shape in shapes.items()}
    return state, *torch.randn(2, 2, LENGTH, WIDTH, **DOUBLE)


def tp_and_sp(group, tp):
    """The ranks of a thread world as tp neighbours, and the others; of processes as a device mesh."""
    grid = group.grid(ulysses=tp)
    return grid.ulysses, grid.ring


def run_layer(
    group, tp, name, state, x, dout, *, groups=tp_and_sp, module="RingAttention", drop=None
):
    """What one rank has: the whole result, dx, whole gradients, slopes' gradient, whole weights again."""
    qkv, names, options = LAYERS[name]
    tp, sp = groups(group, tp)
    slopes = torch.linspace(0.05, 0.5, qkv.num_heads, **DOUBLE).requires_grad_()
    attention = getattr(seqpar, module)(
        sp, mask=seqpar.Mask(causal=True, window=9), dropout=drop,
        score=seqpar.Score(alibi_slopes=slopes, softcap=4.0),
    )  # fmt: skip
    layer = make_layer(tp, attention, qkv, names, options)
    layer.load_whole(state)
    layout = seqpar.zigzag(LENGTH, sp.size)
    own = seqpar.shard_sequence(x, layout, sp.rank, dim=1).clone().requires_grad_()
    y = layer(own, layout)
    y.backward(seqpar.shard_sequence(dout, layout, sp.rank, dim=1))
    seqpar.sum_gradients([*layer.parameters(), slopes], sp)
    again = layer.whole_state()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(p.grad)
    dweights = layer.whole_state()
    y, dx = (seqpar.unshard_sequence(t, layout, sp, dim=1) for t in (y.detach(), own.grad))
    return y, dx, dweights, slopes.grad, again


def wanted(name, state, x, dout, drop=None):
    qkv, names, options = LAYERS[name]
    slopes = torch.linspace(0.05, 0.5, qkv.num_heads, **DOUBLE).requires_grad_()
    terms = oracle.Terms(qkv.head_dim**-0.5, 4.0, slopes, dropout=drop)
    state = {n: w.clone().requires_grad_() for n, w in state.items()}
    x = x.clone().requires_grad_()
    y = dense_layer(qkv, names, options, state, x, terms)
    y.backward(dout)
    return y.detach(), x.grad, {n: w.grad for n, w in state.items()}, slopes.grad


def check(results, want, state):
    for y, dx, dweights, dslopes, again in results:
        torch.testing.assert_close(y, want[0], **EXACT)
        torch.testing.assert_close(dx, want[1], **EXACT)
        assert dweights.keys() == want[2].keys() == again.keys()
        for name, gradient in dweights.items():
            torch.testing.assert_close(gradient, want[2][name], **EXACT)
            assert torch.equal(again[name], state[name])
        torch.testing.assert_close(dslopes, want[3], **EXACT)


@pytest.mark.parametrize("name", LAYERS)
def test_equals_a_dense_layer_and_gives_its_weights_back(name):
    state, x, dout = whole_weights(name)
    want = wanted(name, state, x, dout)
    for tp, sp in ((1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (1, 2), (2, 2), (3, 2)):
        check(seqpar.simulate(tp * sp, run_layer, tp, name, state, x, dout), want, state)


@pytest.mark.parametrize("module", ["UlyssesAttention", "AllGatherAttention"])
def test_any_strategy_serves(module):
    name = "apart, unevenly shared kv heads, norms"
    state, x, dout = whole_weights(name)
    run = partial(run_layer, module=module)
    results = seqpar.simulate(6, run, 3, name, state, x, dout)
    check(results, wanted(name, state, x, dout), state)


def test_the_same_weights_are_dropped_for_any_tp_and_sp():
    name = "one kv head, clipped"
    state, x, dout = whole_weights(name)
    run = partial(run_layer, drop=seqpar.Dropout(0.3, 5))
    want = wanted(name, state, x, dout, (0.3, 5))
    for tp, sp in ((1, 2), (3, 1), (2, 2)):
        check(seqpar.simulate(tp * sp, run, tp, name, state, x, dout), want, state)


def mesh_groups(group, tp):
    mesh = init_device_mesh("cpu", (group.size // tp, tp), mesh_dim_names=("sp", "tp"))
    return seqpar.Group.of(mesh["tp"]), seqpar.Group.of(mesh["sp"])


def test_equals_a_dense_layer_over_processes_on_a_device_mesh():
    name = "per group, partial rotary, transposed"
    state, x, dout = whole_weights(name)
    run = partial(run_layer, groups=mesh_groups)
    with seqpar.testing.ProcessWorld(4) as world:
        check(world.run(run, 2, name, state, x, dout), wanted(name, state, x, dout), state)


def count_messages(group, name, state, x, dout):
    layer = make_layer(group, seqpar.RingAttention(seqpar.Group.alone()), *LAYERS[name])
    layer.load_whole(state)
    x = x.clone().requires_grad_()
    counts = []
    group.traffic.reset()
    y = layer(x, seqpar.contiguous(LENGTH, 1))
    counts.append(group.traffic.total.elements)
    y.backward(dout)
    counts.append(group.traffic.total.elements - counts[0])
    return tuple(counts), layer.elements_sent(tokens=2 * LENGTH)


@pytest.mark.parametrize("name", LAYERS)
def test_sends_what_its_formula_says(name):
    state, x, dout = whole_weights(name)
    for tp in (1, 2, 3, 5):
        for counted, formula in seqpar.simulate(tp, count_messages, name, state, x, dout):
            assert counted == formula
