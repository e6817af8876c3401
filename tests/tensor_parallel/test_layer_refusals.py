"""What `ParallelAttention` refuses, it refuses on every rank of tp x sp and before anything is written."""

import pytest
import torch
from torch import nn

import seqpar
from seqpar.tensor_parallel import FusedQKV, Names, ParallelAttention, Rotary, settle_copies

QKV, WIDTH, LENGTH = FusedQKV.contiguous(4, 4, 2, bias=True), 6, 8
NAMES = Names(("qkv",), "out")


def make_layer(group, tp=2, **options):
    grid = group.grid(ulysses=tp)
    attention = seqpar.RingAttention(grid.ring, mask=seqpar.Mask(causal=True))
    options = {"attention": attention, "names": NAMES, "q_norm": nn.LayerNorm(4)} | options
    return ParallelAttention(QKV, WIDTH, tp=grid.ulysses, **options)


def whole_state():
    shapes = {"qkv.weight": (32, WIDTH), "qkv.bias": (32,), "out.weight": (WIDTH, 16)}
    norm = {"q_norm.weight": (4,), "q_norm.bias": (4,)}
    return {name: torch.ones(shape) for name, shape in (shapes | norm).items()}


def refusal(do):
    """The error that this rank raises."""
    try:
        do()
    except Exception as error:
        return error
    return None


def check_one_at_fault(errors, kind, match, at_fault=2):
    """One rank raises the error itself, all others one that quotes it."""
    assert isinstance(errors[at_fault], kind), errors
    assert match in str(errors[at_fault])
    for rank, error in enumerate(errors):
        if rank != at_fault:
            assert isinstance(error, seqpar.DesyncError), (rank, error)
            assert match in str(error)


WRONG_STATES = {
    "missing": (lambda s: s.pop("qkv.bias"), "missing ['qkv.bias']"),
    "unexpected": (lambda s: s.update(extra=torch.ones(1)), "unexpected ['extra']"),
    "rows": (lambda s: s.update({"qkv.weight": torch.ones(31, WIDTH)}), "must be (32, 6), got (31, 6)"),
    "bias": (lambda s: s.update({"qkv.bias": torch.ones(16)}), "qkv.bias must be (32,), got (16,)"),
    "type": (lambda s: s.update({"out.weight": torch.ones(WIDTH, 16).double()}), "out.weight is"),
    "norm": (lambda s: s.update({"q_norm.bias": torch.ones(3)}), "q_norm.bias must be (4,), got (3,)"),
}  # fmt: skip


def load_wrong(group, wrong):
    layer, state = make_layer(group), whole_state()
    if group.rank == 2:
        WRONG_STATES[wrong][0](state)
    error = refusal(lambda: layer.load_whole(state))
    untouched = all(p.isnan().all() for n, p in layer.named_parameters() if "norm" not in n)
    return error, untouched and torch.equal(layer.q_norm.bias, torch.zeros(4))


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_a_state_that_does_not_fit_is_refused_before_anything_is_written(wrong):
    errors, untouched = zip(*seqpar.simulate(4, load_wrong, wrong), strict=True)
    check_one_at_fault(errors, ValueError, WRONG_STATES[wrong][1])
    assert all(untouched)


WRONG_ROWS = {
    "width": (lambda x: x[..., :5], ValueError, "x must be [b sl 6], got (1, 4, 5)"),
    "type": (lambda x: x.double(), ValueError, "x must be torch.float32, as the weights"),
    "rows": (
        lambda x: x[:, :3],
        ValueError,
        "must hold 4 of the 8 positions (zigzag), got x (1, 3, 6)",
    ),
    "kind": (lambda x: x.tolist(), TypeError, "x must be a tensor [b sl e], got list"),
}


def call_wrong(group, wrong):
    layer, layout = make_layer(group), seqpar.zigzag(LENGTH, group.size // 2)
    layer.load_whole(whole_state())
    x = torch.ones(1, 4, WIDTH)
    x = WRONG_ROWS[wrong][0](x) if group.rank == 2 else x
    return refusal(lambda: layer(x, layout))


@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_rows_that_do_not_fit_are_refused_on_all_ranks(wrong):
    _, kind, match = WRONG_ROWS[wrong]
    check_one_at_fault(seqpar.simulate(4, call_wrong, wrong), kind, match)


def call_with_other_rows(group):
    layer, layout = make_layer(group), seqpar.zigzag(LENGTH, group.size // 2)
    layer.load_whole(whole_state())
    return refusal(lambda: layer(torch.ones(1 + group.rank % 2, 4, WIDTH), layout))


def test_ranks_of_tp_with_other_rows_are_refused_on_all_ranks():
    for error in seqpar.simulate(4, call_with_other_rows):
        assert isinstance(error, seqpar.DesyncError)
        assert "shape" in str(error)


def test_heads_that_do_not_fit_the_ranks_are_refused():
    group = seqpar.Group.alone()
    with pytest.raises(ValueError, match=r"4 query heads can be dealt to 1 \.\.\. 4 ranks, got 5"):
        QKV.deal(5)
    with pytest.raises(
        ValueError, match="4 ranks cannot share 4 query heads without replicating some of "
    ):
        QKV.deal(4, replicate=False)
    with pytest.raises(ValueError, match="rotary turns 6 components of heads of 4"):
        make_layer(group, 1, rotary=Rotary(6))
    with pytest.raises(ValueError, match="positive even dim"):
        Rotary(3)
    with pytest.raises(TypeError, match="attention must be a module such as"):
        make_layer(group, 1, attention=nn.Identity())
    with pytest.raises(ValueError, match="qkv must be one name, of a fused projection, or three"):
        Names("qkv")
    with pytest.raises(ValueError, match="are not fused"):
        ParallelAttention(FusedQKV.per_head(4, 4), WIDTH, names=Names(("q", "k", "v"), "o"))


def deal_to_four(group):
    return refusal(lambda: make_layer(group, 4, replicate_kv=False))


def test_replication_can_be_refused_with_the_sizes():
    for error in seqpar.simulate(4, deal_to_four):
        assert isinstance(error, ValueError)
        assert "some of the 2 kv heads" in str(error)


def test_a_layer_is_nan_until_it_has_weights():
    group = seqpar.Group.alone()
    layer = make_layer(group, 1, q_norm=None)
    layout = seqpar.contiguous(LENGTH, 1)
    assert layer(torch.ones(1, LENGTH, WIDTH), layout).isnan().all()
    layer.reset_parameters(3)
    assert layer(torch.ones(1, LENGTH, WIDTH), layout).isfinite().all()


def drawn_weights(group):
    layer = make_layer(group, group.size)
    layer.reset_parameters(7)
    return layer.whole_state()


def test_drawn_weights_are_the_same_for_any_tp():
    (one,) = seqpar.simulate(1, drawn_weights)
    for several in seqpar.simulate(3, drawn_weights):
        assert all(torch.equal(several[name], x) for name, x in one.items())
    assert 0.3 < one["qkv.weight"].abs().max() * WIDTH**0.5 <= 1


def test_a_layer_without_attention_says_so():
    layer = ParallelAttention(QKV, WIDTH, names=NAMES)
    with pytest.raises(ValueError, match="no attention"):
        layer(torch.ones(1, LENGTH, WIDTH), seqpar.contiguous(LENGTH, 1))
    with pytest.raises(ValueError, match="one for each of 4 query heads, got 3"):
        layer.score_here(seqpar.Score(sinks=torch.zeros(3)))


def drift(group):
    """Copies of a kv head that have learned apart."""
    layer = make_layer(group, 4)
    layer.load_whole(whole_state())
    if group.rank == 1:
        with torch.no_grad():
            layer.qkv_weight[-1] += 1
    return refusal(layer.whole_state)


def test_copies_of_a_kv_head_that_differ_are_not_merged():
    for error in seqpar.simulate(4, drift):
        assert isinstance(error, ValueError)
        assert "v of kv head 0 differs between ranks 0 and 1" in str(error)


def settled(group, nudge):
    layer = make_layer(group, 4)
    layer.reset_parameters(5)
    before = layer.whole_state()
    with torch.no_grad():
        if group.rank in (1, 3):  # ranks 0 and 1 hold kv head 0, ranks 2 and 3 the other
            layer.qkv_weight[4:] += nudge
            layer.qkv_bias[4:] += nudge
    moved = layer.qkv_weight.clone()
    try:
        apart = settle_copies(nn.Sequential(layer))
    except ValueError as error:
        return str(error), torch.equal(layer.qkv_weight, moved)
    whole = layer.whole_state()
    return apart, all(torch.equal(whole[name], x) for name, x in before.items())


def test_copies_that_have_drifted_by_rounding_are_made_the_same_again():
    for apart, is_same in seqpar.simulate(4, settled, 1e-6):
        assert 1e-7 < apart < 1e-4
        assert is_same


@pytest.mark.parametrize("nudge", [0.1, torch.nan])
def test_copies_that_were_trained_apart_are_left_apart(nudge):
    for error, is_untouched in seqpar.simulate(4, settled, nudge):
        assert "copies of kv heads of 0 are" in error
        assert is_untouched or nudge != nudge
