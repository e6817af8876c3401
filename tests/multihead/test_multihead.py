"""Projections over shards: torch.nn.MultiheadAttention on one device, to the order of summation.

A failure here and not in tests/strategies is in the projections, their names, or who sums what.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import seqpar
from seqpar import Mask, MultiheadAttention, RingAttention, Score, contiguous, simulate, zigzag
from seqpar.testing.refusals import check_refused, refusal

EXACT = {"rtol": 1e-11, "atol": 1e-11}
E, HEADS, LENGTH, MEMORY = 12, 4, 11, 7
ATTENTIONS = {
    "ring": seqpar.RingAttention,
    "ulysses": seqpar.UlyssesAttention,
    "allgather": seqpar.AllGatherAttention,
    "materialised": seqpar.MaterialisedAttention,
}
CASES = {  # (options, mask, keys of another sequence)
    "encoder": ({}, Mask(), False),
    "causal": ({}, Mask(causal=True), False),
    "without biases": ({"bias": False}, Mask(causal=True), False),
    "cross": ({}, Mask(), True),
    "cross, keys and values of their own": ({"kdim": 5, "vdim": 9}, Mask(), True),
    "values of another width": ({"vdim": 9}, Mask(causal=True), False),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def drawn(module, seed=1):
    """The module with every parameter drawn anew, biases too."""
    for n, p in enumerate(module.parameters()):
        p.data = normal(*p.shape, seed=seed + n) * 0.4
    return module


def unseen(mask, rows, cols):
    """What torch calls attn_mask."""
    return torch.ones(rows, cols).triu(1).bool() if mask.causal else None


def inputs(options, cross):
    """query, and key and value where they are given, whole; and the gradient of the result."""
    keys = MEMORY if cross else LENGTH
    query = normal(2, LENGTH, E, seed=50)
    given = []
    if cross or options.get("vdim"):
        given = [
            normal(2, keys, options.get(name, E), seed=60 + n)
            for n, name in enumerate(("kdim", "vdim"))
        ]
    return [query, *given], normal(2, LENGTH, E, seed=70)


def one_device(options, mask, cross):
    """(out, gradients of inputs, state, gradients of parameters) of torch's module."""
    torch_module = drawn(
        nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=torch.float64, **options)
    )
    xs, dout = inputs(options, cross)
    xs = [x.requires_grad_() for x in xs]
    query, key, value = xs if len(xs) == 3 else xs * 3
    out, _ = torch_module(
        query, key, value, need_weights=False, attn_mask=unseen(mask, LENGTH, key.shape[1])
    )
    out.backward(dout)
    gradients = {name: p.grad for name, p in torch_module.named_parameters()}
    return out.detach(), [x.grad for x in xs], torch_module.state_dict(), gradients


def on_each_rank(group, attention, options, mask, cross, state):
    module = MultiheadAttention(
        E, HEADS, ATTENTIONS[attention](group, mask=mask), dtype=torch.float64, **options
    )
    assert module.state_dict().keys() == state.keys()
    module.load_state_dict(state)
    layout = zigzag(LENGTH, group.size)
    kv_layout = zigzag(MEMORY, group.size) if cross else None
    xs, dout = inputs(options, cross)
    held = [layout, *[kv_layout or layout] * 2]
    xs = [
        seqpar.shard_sequence(x, at, group.rank).requires_grad_()
        for x, at in zip(xs, held, strict=False)
    ]
    out, none = module(*xs, layout=layout, kv_layout=kv_layout)
    assert none is None
    out.backward(seqpar.shard_sequence(dout, layout, group.rank))
    seqpar.sum_gradients(module.parameters(), group)
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return out.detach(), [x.grad for x in xs], gradients


def check(results, cross, expected):
    out, input_gradients, _, gradients = expected
    size = len(results)
    layout, memory = zigzag(LENGTH, size), zigzag(MEMORY if cross else LENGTH, size)
    for rank, (out_r, input_gradients_r, gradients_r) in enumerate(results):
        torch.testing.assert_close(out_r, out[:, layout.positions(rank)], **EXACT)
        for got, whole, of in zip(
            input_gradients_r, input_gradients, (layout, memory, memory), strict=False
        ):
            torch.testing.assert_close(got, whole[:, of.positions(rank)], **EXACT)
        assert gradients_r.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradients_r[name], gradient, **EXACT, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("what", CASES)
def test_equals_torch(what):
    case = CASES[what]
    expected = one_device(*case)
    for size, attention in ((1, "ring"), (2, "ulysses"), (3, "ring"), (4, "allgather")):
        check(simulate(size, on_each_rank, attention, *case, expected[2]), case[2], expected)


@pytest.mark.parametrize("what", ["causal", "cross"])
def test_equals_torch_in_processes(worlds, what):
    case = CASES[what]
    expected = one_device(*case)
    check(worlds.run(3, on_each_rank, "ring", *case, expected[2]), case[2], expected)


def test_more_ranks_than_rows():
    case = CASES["causal"]
    expected = one_device(*case)
    check(simulate(LENGTH + 2, on_each_rank, "ring", *case, expected[2]), case[2], expected)


def test_torch_takes_the_state_back():
    module = MultiheadAttention(E, HEADS, RingAttention(seqpar.Group.alone()), kdim=5)
    theirs = nn.MultiheadAttention(E, HEADS, kdim=5, batch_first=True)
    theirs.load_state_dict(module.state_dict())
    assert {n: p.shape for n, p in theirs.named_parameters()} == {
        n: p.shape for n, p in module.named_parameters()
    }


def test_initial_weights_are_those_of_torch():
    torch.manual_seed(0)
    module = MultiheadAttention(E, HEADS, RingAttention(seqpar.Group.alone()))
    other = nn.MultiheadAttention(E, HEADS, batch_first=True)
    assert not module.in_proj_bias.any()
    assert not module.out_proj.bias.any()
    for name in ("in_proj_weight", "out_proj.weight"):
        ours, theirs = (m.get_parameter(name).detach().abs().max() for m in (module, other))
        assert float(ours) == pytest.approx(float(theirs), rel=0.1)


def repeated(state, kv_heads):
    """The state of a module with as many kv heads as query heads that computes the same."""
    group, d = HEADS // kv_heads, E // HEADS
    whole = copy.deepcopy(state)
    for name in ("in_proj_weight", "in_proj_bias"):
        q, k, v = state[name].split([E, kv_heads * d, kv_heads * d])
        k, v = (
            x.unflatten(0, (kv_heads, d)).repeat_interleave(group, 0).flatten(0, 1) for x in (k, v)
        )
        whole[name] = torch.cat((q, k, v))
    return whole


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_are_torchs_heads_repeated(kv_heads):
    state = drawn(
        MultiheadAttention(
            E, HEADS, RingAttention(seqpar.Group.alone()), kv_heads=kv_heads, dtype=torch.float64
        )
    ).state_dict()
    mask, (xs, dout) = Mask(causal=True), inputs({}, False)
    theirs = nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict(repeated(state, kv_heads))
    (x,) = (x.requires_grad_() for x in xs)
    out, _ = theirs(x, x, x, need_weights=False, attn_mask=unseen(mask, LENGTH, LENGTH))
    out.backward(dout)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name in ("in_proj_weight", "in_proj_bias"):
        q, k, v = gradients[name].chunk(3)
        k, v = (
            y.unflatten(0, (kv_heads, HEADS // kv_heads, E // HEADS)).sum(1).flatten(0, 1)
            for y in (k, v)
        )
        gradients[name] = torch.cat((q, k, v))
    case = {"kv_heads": kv_heads}, mask, False
    expected = out.detach(), [x.grad], None, gradients
    for size in (1, 3):
        check(simulate(size, on_each_rank, "ulysses", *case, state), case[2], expected)


def hides(*shape, seed=0):
    """At random, but no row of all."""
    hidden = normal(*shape, seed=seed) > 0.4
    hidden[..., 0] = False
    return hidden


BIAS = normal(LENGTH, LENGTH, seed=90)
PADDED = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [6]])
CAUSAL = torch.ones(LENGTH, LENGTH).triu(1).bool()
MASKS = {  # as torch's module takes them
    "padding": {"key_padding_mask": PADDED},
    "padding with holes": {"key_padding_mask": hides(2, LENGTH, seed=1)},
    "padding of floats": {
        "key_padding_mask": torch.zeros(2, LENGTH).double().masked_fill(PADDED, -torch.inf)
    },
    "causal": {"attn_mask": CAUSAL},
    "causal, of floats": {
        "attn_mask": torch.zeros(LENGTH, LENGTH).double().masked_fill(CAUSAL, -torch.inf)
    },
    "any": {"attn_mask": hides(LENGTH, LENGTH, seed=2)},
    "any, by head": {"attn_mask": hides(2 * HEADS, LENGTH, LENGTH, seed=3)},
    "by batch entry": {"attn_mask": hides(2, LENGTH, LENGTH, seed=4).repeat_interleave(HEADS, 0)},
    "added": {"attn_mask": BIAS},
    "added and hidden": {"attn_mask": BIAS.masked_fill(CAUSAL, -torch.inf)},
    "added, by head": {"attn_mask": normal(2 * HEADS, LENGTH, LENGTH, seed=5)},
    "both": {"key_padding_mask": PADDED, "attn_mask": CAUSAL},
}  # fmt: skip


def masked(group, attention, state, given, own):
    """(out, gradient of x, gradient of an attn_mask that learns) of this rank."""
    module = MultiheadAttention(E, HEADS, ATTENTIONS[attention](group), dtype=torch.float64)
    module.load_state_dict(state)
    layout = zigzag(LENGTH, group.size)
    mine = layout.positions(group.rank)
    given = {name: x.clone() for name, x in given.items()}
    if own:
        given = {
            n: x[:, mine] if n == "key_padding_mask" else x[..., mine, :] for n, x in given.items()
        }
    bias = given.get("attn_mask")
    learns = bias is not None and bias.is_floating_point()
    if learns:
        bias.requires_grad_()
    (x,), dout = inputs({}, False)
    x = x[:, mine].requires_grad_()
    out, none = module(x, layout=layout, **given)
    assert none is None
    out.backward(dout[:, mine])
    return out.detach(), x.grad, bias.grad if learns else None


@pytest.mark.parametrize("what", MASKS)
def test_masks_equal_those_of_torch(what):
    """Whole on every rank, or this rank's rows; what is added learns, by shares or by own rows."""
    given = {name: x.clone() for name, x in MASKS[what].items()}
    theirs = drawn(nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=torch.float64))
    bias = given.get("attn_mask")
    learns = bias is not None and bias.is_floating_point()
    if learns:
        bias.requires_grad_()
    (x,), dout = inputs({}, False)
    x = x.requires_grad_()
    out, _ = theirs(x, x, x, need_weights=False, **given)
    out.backward(dout)
    for size, attention, own in (
        (1, "ring", False), (2, "ulysses", True), (3, "ring", True), (4, "materialised", False),
    ):  # fmt: skip
        found = simulate(size, masked, attention, theirs.state_dict(), MASKS[what], own)
        layout = zigzag(LENGTH, size)
        total = torch.zeros_like(bias) if learns else None
        for rank, (got, dx, dbias) in enumerate(found):
            mine = layout.positions(rank)
            torch.testing.assert_close(got, out[:, mine].detach(), **EXACT)
            torch.testing.assert_close(dx, x.grad[:, mine], **EXACT)
            if learns and own:
                total[..., mine, :] += dbias
            elif learns:
                total += dbias
        if learns:
            torch.testing.assert_close(total, bias.grad, **EXACT)


@pytest.mark.parametrize("attention", ["ring", "materialised"])
def test_what_is_added_joins_what_the_score_adds(attention):
    own = normal(HEADS, 1, LENGTH, seed=6)
    theirs = drawn(nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=torch.float64))
    (x,), _ = inputs({}, False)
    added = (BIAS + 2 * own).expand(2, -1, -1, -1).flatten(0, 1)
    out, _ = theirs(x, x, x, need_weights=False, attn_mask=added)

    def on_rank(group):
        score = seqpar.Score(bias=own, score_mod=lambda s, b, h, i, j: s + own[h, 0, j])
        attend = ATTENTIONS[attention](group, score=score)
        module = MultiheadAttention(E, HEADS, attend, dtype=torch.float64)
        module.load_state_dict(theirs.state_dict())
        layout = zigzag(LENGTH, group.size)
        mine = layout.positions(group.rank)
        got, _ = module(x[:, mine], layout=layout, attn_mask=BIAS)
        torch.testing.assert_close(got, out[:, mine], **EXACT)

    simulate(2, on_rank)


def weighed(group, state, average):
    module = MultiheadAttention(E, HEADS, seqpar.MaterialisedAttention(group), dtype=torch.float64)
    module.load_state_dict(state)
    layout = zigzag(LENGTH, group.size)
    (x,), _ = inputs({}, False)
    masks = {"key_padding_mask": PADDED, "is_causal": True}
    x = x[:, layout.positions(group.rank)]
    return module(x, layout=layout, need_weights=True, average_attn_weights=average, **masks)[1]


@pytest.mark.parametrize("average", [True, False])
def test_weights_are_those_of_torch(average):
    theirs = drawn(nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=torch.float64))
    (x,), _ = inputs({}, False)
    masks = {"key_padding_mask": PADDED, "attn_mask": CAUSAL}
    _, want = theirs(x, x, x, average_attn_weights=average, **masks)
    found = simulate(3, weighed, theirs.state_dict(), average)
    for rank, got in enumerate(found):
        rows = zigzag(LENGTH, 3).positions(rank)
        torch.testing.assert_close(got, want[..., rows, :].detach(), **EXACT)


def drops(group):
    module = MultiheadAttention(E, HEADS, RingAttention(group), dropout=0.5)
    for parameter in module.parameters():
        parameter.data.fill_(0.1)
    layout = zigzag(LENGTH, group.size)
    x = normal(1, LENGTH, E).float()[:, layout.positions(group.rank)]
    one, other = (module(x, layout=layout)[0].detach() for _ in range(2))
    module.eval()
    return one, other, module(x, layout=layout)[0].detach()


def test_dropout_is_another_in_every_forward_and_none_in_evaluation():
    for one, other, still in simulate(2, drops):
        assert not torch.equal(one, other)
        assert not torch.equal(one, still)


def seeded(group):
    """A forward that is computed again drops what it dropped before."""
    torch.manual_seed(group.rank)
    module = MultiheadAttention(E, HEADS, RingAttention(group), dropout=0.5, dtype=torch.float64)
    layout = zigzag(LENGTH, group.size)
    x = normal(1, LENGTH, E)[:, layout.positions(group.rank)].requires_grad_()
    drawn(module)
    state = torch.get_rng_state()
    module(x, layout=layout)[0].sum().backward()
    torch.set_rng_state(state)
    again = x.detach().clone().requires_grad_()
    run = partial(module, layout=layout)
    checkpoint(lambda x: run(x)[0], again, use_reentrant=False).sum().backward()
    return x.grad, again.grad


def test_what_is_recomputed_drops_the_same(worlds):
    """In processes, since ranks that are threads have one generator."""
    for once, twice in worlds.run(2, seeded):
        torch.testing.assert_close(twice, once, **EXACT)


def trains_alone(group):
    module = MultiheadAttention(E, HEADS, RingAttention(group), dropout=0.5).train(group.rank == 0)
    layout = zigzag(LENGTH, group.size)
    return module(torch.ones(1, layout.rows[group.rank], E), layout=layout)


def test_one_rank_that_trains_alone_is_told():
    with pytest.raises(seqpar.DesyncError, match=r"dropout is 0\.5 on rank 0, 0\.0 on rank 1"):
        simulate(2, trains_alone)


def test_hooks_of_the_attention_see_its_calls():
    seen, attend = [], RingAttention(seqpar.Group.alone())
    attend.register_forward_hook(lambda *_: seen.append(1))
    module = MultiheadAttention(E, HEADS, attend)
    module(torch.ones(1, LENGTH, E), layout=zigzag(LENGTH, 1))
    assert seen == [1]


def test_dropout_is_said_once():
    attend = RingAttention(seqpar.Group.alone(), dropout=seqpar.Dropout(0.1, 3))
    with pytest.raises(ValueError, match="attention drops weights already"):
        MultiheadAttention(E, HEADS, attend, dropout=0.1)


class EncoderLayer(nn.Module):
    """What torch.nn.TransformerEncoderLayer is, with our attention; the same names."""

    def __init__(self, attention):
        super().__init__()
        self.self_attn = MultiheadAttention(E, HEADS, attention, dtype=torch.float64)
        self.linear1, self.linear2 = (
            nn.Linear(*sizes, dtype=torch.float64) for sizes in ((E, 20), (20, E))
        )
        self.norm1, self.norm2 = (nn.LayerNorm(E, dtype=torch.float64) for _ in range(2))

    def forward(self, x, layout):
        x = self.norm1(x + self.self_attn(x, layout=layout)[0])
        return self.norm2(x + self.linear2(self.linear1(x).relu()))


class DecoderLayer(EncoderLayer):
    """What torch.nn.TransformerDecoderLayer is, likewise."""

    def __init__(self, attention, cross_attention):
        super().__init__(attention)
        self.multihead_attn = MultiheadAttention(E, HEADS, cross_attention, dtype=torch.float64)
        self.norm3 = nn.LayerNorm(E, dtype=torch.float64)

    def forward(self, x, memory, layout, memory_layout):
        x = self.norm1(x + self.self_attn(x, layout=layout)[0])
        met, _ = self.multihead_attn(x, memory, layout=layout, kv_layout=memory_layout)
        x = self.norm2(x + met)
        return self.norm3(x + self.linear2(self.linear1(x).relu()))


def torch_layers():
    options = {"dim_feedforward": 20, "dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    encoder = drawn(nn.TransformerEncoderLayer(E, HEADS, **options))
    return encoder, drawn(nn.TransformerDecoderLayer(E, HEADS, **options), seed=30)


def encoder_decoder(group, states):
    layout, memory_layout = zigzag(LENGTH, group.size), zigzag(MEMORY, group.size)
    encoder = EncoderLayer(seqpar.UlyssesAttention(group))
    decoder = DecoderLayer(
        RingAttention(group, mask=Mask(causal=True)), seqpar.AllGatherAttention(group)
    )
    encoder.load_state_dict(states[0])
    decoder.load_state_dict(states[1])
    x, source, dout = (
        normal(2, LENGTH, E, seed=5),
        normal(2, MEMORY, E, seed=6),
        normal(2, LENGTH, E),
    )
    x, source = (
        seqpar.shard_sequence(y, at, group.rank).requires_grad_()
        for y, at in ((x, layout), (source, memory_layout))
    )
    out = decoder(x, encoder(source, memory_layout), layout, memory_layout)
    out.backward(seqpar.shard_sequence(dout, layout, group.rank))
    parameters = {
        f"{n}.{name}": p
        for n, m in enumerate((encoder, decoder))
        for name, p in m.named_parameters()
    }
    seqpar.sum_gradients(parameters.values(), group)
    return out.detach(), [x.grad, source.grad], {n: p.grad for n, p in parameters.items()}


def test_an_encoder_and_a_decoder_equal_those_of_torch(worlds):
    encoder, decoder = torch_layers()
    x, source, dout = (
        normal(2, LENGTH, E, seed=5),
        normal(2, MEMORY, E, seed=6),
        normal(2, LENGTH, E),
    )
    x, source = x.requires_grad_(), source.requires_grad_()
    out = decoder(x, encoder(source), tgt_mask=unseen(Mask(causal=True), LENGTH, LENGTH))
    out.backward(dout)
    gradients = {
        f"{n}.{name}": p.grad
        for n, m in enumerate((encoder, decoder))
        for name, p in m.named_parameters()
    }
    states = encoder.state_dict(), decoder.state_dict()
    expected = out.detach(), [x.grad, source.grad], None, gradients
    for size in (1, 2, 3, 4):
        check(simulate(size, encoder_decoder, states), True, expected)
    check(worlds.run(2, encoder_decoder, states), True, expected)


def call(group, options=None, x=None, **change):
    """A forward in which this rank may do something else."""
    module = MultiheadAttention(E, HEADS, RingAttention(group), **(options or {}))
    layout = zigzag(LENGTH, group.size)
    x = torch.ones(1, layout.rows[group.rank], E) if x is None else x
    return module(x, **({"layout": layout} | change))[0]


REFUSED = {
    "key_padding_mask of another length": (
        {"key_padding_mask": torch.ones(1, 5).bool()},
        r"key_padding_mask must be \[1 11\] of all keys, or \[1 4\] of those of this rank, got \(1, 5\)",
    ),
    "key_padding_mask of integers": (
        {"key_padding_mask": torch.ones(1, 4).long()},
        r"key_padding_mask must be a tensor of booleans or floats, got torch.int64",
    ),
    "key_padding_mask that adds": (
        {"key_padding_mask": torch.ones(1, 4)},
        "must be 0 or -inf; what is added to scores is an attn_mask",
    ),
    "key_padding_mask of one rank": (
        {"key_padding_mask": torch.zeros(1, 4).bool()},
        r"key_padding_mask is .*None.* on ranks 0, 2, \('rows', torch.bool\) on rank 1|is_causal",
    ),
    "attn_mask of other rows": (
        {"attn_mask": torch.ones(3, 11)},
        r"attn_mask must be \[i 11\] or \[4 i 11\], where i is 11 for all rows or 4 for those of this rank",
    ),
    "attn_mask of own keys": ({"attn_mask": torch.ones(4, 4)}, r"attn_mask must be \[i 11\]"),
    "attn_mask of other heads": (
        {"attn_mask": torch.ones(3, 11, 11)},
        r"attn_mask must be \[i 11\]",
    ),
    "is_causal": ({"is_causal": True}, "is_causal"),
    "is_causal not a bool": ({"is_causal": 1}, "is_causal must be a bool, got 1"),
    "need_weights": (
        {"need_weights": True},
        r"stored: pass attention=seqpar.MaterialisedAttention",
    ),
    "width": ({"x": torch.ones(1, 4, E + 1)}, r"query must be \[b sl 12\], got \(1, 4, 13\)"),
    "unbatched": ({"x": torch.ones(4, E)}, r"query must be \[b sl 12\], got \(4, 12\)"),
    "dtype": ({"x": torch.ones(1, 4, E).double()}, r"must be torch.float32, as the weights"),
    "not a tensor": ({"x": [1.0]}, "query must be a tensor, got list"),
    "rows": ({"x": torch.ones(1, 6, E)}, r"rank 1 of 3 must hold 4 of the 11 positions"),
    "values without keys": ({"value": torch.ones(1, 4, E)}, "values without keys"),
    "a layout of no keys": ({"kv_layout": contiguous(LENGTH, 3)}, "without keys the query's rows"),
    "keys of another batch": ({"key": torch.ones(2, 4, E)}, "must be equal, got query"),
    "cross attention": (
        {"key": torch.ones(1, 4, E)},
        r"cross attention is False on ranks 0, 2, True on rank 1",
    ),
    "heads": ({"options": {"kv_heads": 2}}, r"heads is \(4, 4\) on ranks 0, 2, \(4, 2\) on rank 1"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_one_rank_asks_all_refuse(what):
    change, pattern = REFUSED[what]
    check_refused(simulate(3, refusal, call, change, 1), pattern)


@pytest.mark.parametrize(
    ("options", "error", "pattern"),
    [
        ({"dropout": 1.5}, ValueError, r"p must be in \[0, 1\)"),
        ({"add_bias_kv": True}, NotImplementedError, "add_bias_kv and add_zero_attn"),
        ({"add_zero_attn": True}, NotImplementedError, "add_bias_kv and add_zero_attn"),
        ({"batch_first": False}, NotImplementedError, "batch_first=False"),
        ({"kv_heads": 3}, ValueError, "multiple of num_heads and that of kv_heads"),
        ({"kv_heads": 0}, ValueError, "must be positive"),
        ({"attention": nn.Identity()}, TypeError, "must be a module such as seqpar.RingAttention"),
    ],
)
def test_what_is_not_supported_is_refused_when_made(options, error, pattern):
    options = {"attention": RingAttention(seqpar.Group.alone())} | options
    with pytest.raises(error, match=pattern):
        MultiheadAttention(E, HEADS, **options)


def test_dropout_and_sinks_are_those_of_the_attention():
    """The same weights are dropped for any number of ranks, and only in training."""

    def fn(group, training):
        dropout, sinks = seqpar.Dropout(0.5, seed=3), torch.zeros(HEADS, dtype=torch.float64)
        attention = RingAttention(group, dropout=dropout, score=Score(sinks=sinks))
        module = drawn(MultiheadAttention(E, HEADS, attention, dtype=torch.float64)).train(training)
        layout = zigzag(LENGTH, group.size)
        x = normal(2, LENGTH, E)[:, layout.positions(group.rank)]
        return seqpar.unshard_sequence(module(x, layout=layout)[0].detach(), layout, group)

    for training in (True, False):
        one, three = (simulate(size, fn, training)[0] for size in (1, 3))
        torch.testing.assert_close(three, one, **EXACT)
    assert not torch.equal(simulate(1, fn, True)[0], one)
