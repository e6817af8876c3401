"""What is replaced can be put back, saved and loaded, to the byte; and is put back where it does not fit."""

import copy
from dataclasses import replace

import peft
import pytest
import torch
import transformers

import seqpar
from seqpar.integrations.transformers import SequenceParallel, replace_attention
from seqpar.integrations.transformers.replace import original
from seqpar.testing.models.fused import FUSED
from seqpar.testing.models.tiny import batch_of

GRIDS = [
    ("falcon_40b", 1, 1),
    ("gpt2", 3, 1),
    ("falcon_40b", 5, 1),
    ("persimmon", 2, 2),
    ("llama", 3, 1),
]


def bytes_of(state):
    return {name: x.detach().clone() for name, x in state.items()}


def assert_same(got, want):
    assert list(got) == list(want)
    for name, x in want.items():
        assert got[name].dtype == x.dtype
        assert got[name].is_contiguous()
        assert torch.equal(got[name], x), name


def on_grid(name, tp, sp, fn):
    """fn(model, replaced, tp group, sp group) on every rank, each with a model of its own."""
    made = FUSED[name].make()

    def on_rank(group):
        grid, model = group.grid(ulysses=tp), copy.deepcopy(made)
        return fn(model, replace_attention(model, tp=grid.ulysses), grid.ulysses, grid.ring)

    return seqpar.simulate(tp * sp, on_rank)


@pytest.mark.parametrize(("name", "tp", "sp"), GRIDS)
def test_putting_back_gives_the_same_parameters_the_same_bytes(name, tp, sp):
    made = FUSED[name].make()
    want = bytes_of(made.state_dict())

    def on_rank(group):
        model = copy.deepcopy(made)
        modules = [*model.modules()]
        parameters, before = dict(model.named_parameters()), model.config._attn_implementation
        replaced = replace_attention(model, tp=group.grid(ulysses=tp).ulysses)
        given_up = [n for n, p in parameters.items() if p.numel() == 0]
        assert any(part in n for n in given_up for part in ("query_key_value", "c_attn", "q_proj"))
        replaced.restore()
        assert [*model.modules()] == modules
        assert model.config._attn_implementation == before
        assert all(p is parameters[n] for n, p in model.named_parameters())
        assert_same(model.state_dict(), want)
        assert model(batch_of(1, 5)["input_ids"]).logits.isfinite().all()
        with pytest.raises(RuntimeError, match="was put back; replace it anew"):
            replaced.restore()
        replace_attention(model, tp=group.grid(ulysses=tp).ulysses).restore()
        assert_same(model.state_dict(), want)

    seqpar.simulate(tp * sp, on_rank)


@pytest.mark.parametrize(("name", "tp", "sp"), GRIDS)
def test_the_state_is_that_of_the_whole_model_and_can_be_loaded(name, tp, sp):
    """Weights that were trained meanwhile are saved, loaded and put back as they are."""
    made, other = FUSED[name].make(), FUSED[name].make(spread=0.5)
    first, second = bytes_of(made.state_dict()), bytes_of(other.state_dict())
    assert not torch.equal(*(x[next(iter(first))] for x in (first, second)))

    def check(model, replaced, _, __):
        assert_same(replaced.state_dict(), first)
        replaced.load_state_dict(second)
        assert_same(replaced.state_dict(), second)
        wrong = {n: x for n, x in second.items() if "layers.0" not in n and "h.0" not in n}
        with pytest.raises(ValueError, match=r"missing \[.*0.*\], unexpected \[\]"):
            replaced.load_state_dict(wrong)
        name = next(n for n in first if (n.endswith("weight") and "attn" in n) or "attention" in n)
        with pytest.raises(ValueError, match=rf"{name} must be \("):
            replaced.load_state_dict(first | {name: first[name][:-1]})
        assert_same(replaced.state_dict(), second)
        replaced.restore()
        assert_same(model.state_dict(), second)

    on_grid(name, tp, sp, check)


def test_whole_weights_that_are_apart_have_storages_of_their_own():
    """As files of safetensors want it."""

    def check(model, replaced, _, __):
        state = replaced.state_dict()
        replaced.restore()
        for weights in (state, dict(model.named_parameters())):
            places = {x.untyped_storage().data_ptr() for x in weights.values()}
            assert len(places) == len(weights)

    on_grid("llama", 2, 1, check)


def test_what_was_put_back_can_be_set_up_over_other_ranks():
    made, batch = FUSED["llama"].make(), batch_of(2, 13)

    def on_rank(group):
        grid, model = group.grid(ulysses=2), copy.deepcopy(made)
        replaced = replace_attention(model, tp=grid.ulysses)
        first = SequenceParallel(model, seqpar.RingAttention(grid.ring)).loss(batch)
        replaced.restore()
        return first, SequenceParallel(model, seqpar.RingAttention(group)).loss(batch)

    for first, second in seqpar.simulate(4, on_rank):
        torch.testing.assert_close(first, second)


@pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")  # which PEFT calls
def test_states_of_models_with_adapters_are_refused_in_words():
    model = FUSED["llama"].make()
    replaced, state = replace_attention(model), bytes_of(model.state_dict())
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up_proj"]))
    for call in (replaced.state_dict, lambda: replaced.load_state_dict(state)):
        with pytest.raises(RuntimeError, match=r"up_proj.weight is not in the model any more"):
            call()


def test_the_model_shows_what_is_in_it_and_holds_no_second_copy():
    def check(model, replaced, tp, _):
        text = str(model)
        assert text.count("in place of GPT2Attention of layer") == 2
        assert "tp=3" in text
        assert text.count("GPT2Attention(") == 0
        assert text.count("(resid_dropout)") == 2
        own = sum(p.numel() for p in model.parameters())
        whole = sum(x.numel() for n, x in replaced.state_dict().items() if n != "lm_head.weight")
        return whole - own, tp.rank

    attention = 2 * (4 * 48 * 48 + 3 * 48)  # of two layers; the bias of the output is on every rank
    for saved, _ in on_grid("gpt2", 3, 1, check):
        assert saved == attention * 2 // 3


def test_frozen_weights_stay_frozen():
    made = FUSED["llama"].make()
    for layer in made.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.requires_grad_(False)

    def on_rank(group):
        model = copy.deepcopy(made)
        replaced = replace_attention(model, tp=group)
        sp = SequenceParallel(model, seqpar.RingAttention(seqpar.Group.alone()))
        sp.loss(batch_of(1, 9)).backward()
        for replacement in replaced.replacements:
            grads = {n: p.grad is not None for n, p in replacement.layer.named_parameters()}
            assert grads == {
                "qkv_weight": False,
                "qkv_bias": True,
                "out_weight": True,
                "out_bias": True,
            }
        replaced.restore()
        return [n for n, p in model.named_parameters() if not p.requires_grad]

    frozen = [n for n, p in made.named_parameters() if not p.requires_grad]
    assert seqpar.simulate(3, on_rank) == [frozen] * 3


@pytest.mark.parametrize("share", [1.0, 1e-6])
def test_a_layer_that_returns_something_else_is_found_and_everything_put_back(monkeypatch, share):
    """A family with another scale than its class has, also where attention hardly counts for the logits."""
    families = [
        replace(f, terms=lambda m: {"scaling": 1.1 * m.scaling}) if f.name == "GPT2Attention" else f
        for f in original.FAMILIES
    ]
    monkeypatch.setattr(original, "FAMILIES", families)
    made = FUSED["gpt2"].make()
    with torch.no_grad():
        for block in made.transformer.h:
            block.attn.c_proj.weight.mul_(share)
            block.attn.c_proj.bias.zero_()
    want = bytes_of(made.state_dict())

    def on_rank(group):
        model = copy.deepcopy(made)
        with pytest.raises(NotImplementedError, match=r"returns other (logits|rows)"):
            replace_attention(model, tp=group)
        assert_same(model.state_dict(), want)
        assert "ReplacedAttention" not in str(model)
        assert not model._forward_pre_hooks
        assert not model._forward_hooks
        assert model.config._attn_implementation == made.config._attn_implementation

    seqpar.simulate(2, on_rank)


def test_ranks_with_other_weights_are_refused():
    made = FUSED["bloom"].make()

    def on_rank(group):
        model = copy.deepcopy(made)
        with torch.no_grad():
            model.transformer.h[1].mlp.dense_h_to_4h.weight.add_(0.1 * group.rank)
        with pytest.raises(
            (ValueError, seqpar.DesyncError), match="every rank needs the same weights"
        ):
            replace_attention(model, tp=group)
        assert "ReplacedAttention" not in str(model)

    seqpar.simulate(3, on_rank)


def test_ranks_with_one_other_bit_are_refused():
    """Also in a weight that the few rows hardly show: its copies could not be merged any more."""
    made = FUSED["llama"].make()

    def on_rank(group):
        model = copy.deepcopy(made)
        weight = model.model.layers[1].self_attn.k_proj.weight.data
        if group.rank == 1:
            weight[0, 0] = torch.nextafter(weight[0, 0], 2 + weight[0, 0])
        with pytest.raises(
            seqpar.DesyncError, match=r"the hash of .*k_proj\.weight is .* on rank 1"
        ):
            replace_attention(model, tp=group)
        assert "ReplacedAttention" not in str(model)

    seqpar.simulate(3, on_rank)


def test_what_transformers_saves_of_the_state_is_loaded_by_it(tmp_path):
    """The files are those of the model without replacement."""

    def check(model, replaced, tp, _):
        state = replaced.state_dict()
        if tp.rank == 0:
            model.save_pretrained(tmp_path, state_dict=state)

    on_grid("bloom", 3, 1, check)
    again = transformers.BloomForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert_same(again.state_dict(), FUSED["bloom"].make().state_dict())


def test_the_former_place_of_the_name_still_gives_it():
    assert seqpar.tensor_parallel.replace_attention is replace_attention
