"""What cannot be replaced, or called, is refused on every rank, and leaves the model as it was."""

import copy
import threading
from contextlib import nullcontext

import peft
import pytest
import torch
import transformers

import seqpar
from seqpar.integrations.transformers import SequenceParallel, replace_attention
from seqpar.integrations.transformers.attention import guard
from seqpar.integrations.transformers.replace.replaced import ReplacedAttention
from seqpar.testing.models.fused import FUSED
from seqpar.testing.models.tiny import FAMILIES, batch_of

# Of the names that transformers had before 5.23, which PEFT calls.
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")
BATCH = batch_of(2, 13)


def hooked():
    model = FUSED["gpt2"].make()
    model.transformer.h[1].attn.register_forward_hook(lambda *_: None)
    return model


def with_gradients():
    model = FUSED["gpt2"].make()
    model(**BATCH).loss.backward()
    return model


def with_lora():
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    return peft.get_peft_model(FUSED["gpt2"].make(), config)


def partly_frozen():
    model = FUSED["llama"].make()
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    return model


def shared():
    model = FUSED["llama"].make()
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    return model


def tied():
    model = FUSED["llama"].make()
    last = model.model.layers[1].self_attn
    last.v_proj.weight = last.k_proj.weight
    return model


def in_two_types():
    model = FUSED["gpt2"].make()
    bias = model.transformer.h[1].attn.c_attn.bias
    bias.data = bias.data.float()
    return model


def hollow():
    with torch.device("meta"):
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1))


REFUSED = {  # what is replaced -> what every rank says
    "an unknown class": (
        lambda: FAMILIES["bert"].make(), NotImplementedError,
        r"layer.0.attention \(BertAttention\) is not known to replace_attention; known are BloomAtt",
    ),
    "no transformers model": (lambda: torch.nn.Linear(2, 2), TypeError, "a transformers model"),
    "cross attention": (
        lambda: FUSED["gpt2"].make(add_cross_attention=True), NotImplementedError, "cross attention",
    ),
    "slices of the output projection": (
        lambda: FUSED["bloom"].make(pretraining_tp=2, slow_but_exact=True), NotImplementedError,
        r"transformer.h.0.self_attention asks for the output projection in slices \(slow_but_exact",
    ),
    "adapters inside": (with_lora, NotImplementedError, r"c_attn is a peft\..*before it is wrapped"),
    "hooks": (hooked, NotImplementedError, "h.1.attn has forward_hooks, which would not run"),
    "gradients": (with_gradients, ValueError, "has a gradient, which would be lost; zero_grad"),
    "partly frozen": (partly_frozen, NotImplementedError, "layers.0.self_attn learn and some do not"),
    "attention that two layers share": (
        shared, NotImplementedError,
        r"layers.0.self_attn.q_proj.weight and model.layers.1.self_attn.q_proj.weight are one weight",
    ),
    "weights that are tied": (
        tied, NotImplementedError, "layers.1.self_attn.v_proj.weight are one weight",
    ),
    "weights of two types": (
        in_two_types, NotImplementedError, "projections of transformer.h.1.attn must be of one type",
    ),
    "no weights yet": (hollow, ValueError, "when its weights are loaded"),
    "a rope that is none": (
        lambda: FUSED["codegen"].make(rotary_dim=0), ValueError, "rotary takes a positive even dim",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("where", ["on every rank", "on one rank"])
def test_what_cannot_be_replaced_is_refused_on_every_rank(name, where):
    make, error, message = REFUSED[name]
    models = [
        make() if where == "on every rank" or r == 0 else FUSED["gpt2"].make() for r in (0, 1)
    ]

    def on_rank(group):
        model = models[group.rank]
        before = [*model.modules()]
        with pytest.raises((error, seqpar.DesyncError), match=message) as caught:
            replace_attention(model, tp=group)
        assert [*model.modules()] == before
        return caught.type is not seqpar.DesyncError

    assert seqpar.simulate(2, on_rank) == [True, where == "on every rank"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: model.lm_head.to(torch.float16),
            "same dtype|because of rank 1: RuntimeError",
        ),
        (lambda model: model.resize_token_embeddings(80), "logits is .* on rank 1"),
    ],
)
def test_a_rank_whose_model_does_not_run_alike_stops_all(change, message):
    made = FUSED["llama"].make()

    def on_rank(group):
        model = copy.deepcopy(made)
        if group.rank == 1:
            change(model)
        with pytest.raises(RuntimeError, match=message):
            replace_attention(model, tp=group)

    seqpar.simulate(2, on_rank)


def test_what_fails_half_way_is_put_back(monkeypatch):
    model = FUSED["llama"].make()
    modules, want = [*model.modules()], {n: x.clone() for n, x in model.state_dict().items()}
    take = ReplacedAttention.take

    def fail(self, original):
        if "layers.1" in original.path:
            raise MemoryError("no room")
        take(self, original)

    monkeypatch.setattr(ReplacedAttention, "take", fail)
    with pytest.raises(MemoryError, match="no room"):
        replace_attention(model)
    assert [*model.modules()] == modules
    assert all(torch.equal(x, want[n]) for n, x in model.state_dict().items())


def test_more_ranks_than_heads_are_refused():
    def on_rank(group):
        with pytest.raises(ValueError, match=r"4 query heads can be dealt to 1 ... 4 ranks, got 5"):
            replace_attention(transformers.GPT2LMHeadModel(config), tp=group)

    config = transformers.GPT2Config(n_layer=1, n_head=4, n_embd=16, vocab_size=64, n_positions=16)
    seqpar.simulate(5, on_rank)


def test_what_attends_over_ranks_already_is_refused():
    made = FUSED["gpt2"].make()

    def on_rank(group):
        model = copy.deepcopy(made)
        replaced = replace_attention(model, tp=group)
        with pytest.raises(RuntimeError, match=r"attends over ranks already; restore\(\)"):
            replace_attention(model, tp=group)
        replaced.restore()
        SequenceParallel(model, seqpar.RingAttention(seqpar.Group.alone()))
        with pytest.raises(RuntimeError, match="attends over ranks already"):
            replace_attention(model, tp=group)

    seqpar.simulate(2, on_rank)


def set_up(group, made):
    grid, model = group.grid(ulysses=2), copy.deepcopy(made)
    replaced = replace_attention(model, tp=grid.ulysses)
    return model, replaced, SequenceParallel(model, seqpar.RingAttention(grid.ring)), grid


CALLS = {  # what a model is called with besides or instead of its inputs -> what every rank says
    "no plan": (lambda inputs: {"seqpar": None}, RuntimeError, "was called without a plan"),
    "labels": (lambda inputs: {"labels": inputs.labels}, ValueError, "would shift the labels"),
    "a cache": (
        lambda inputs: {"past_key_values": transformers.DynamicCache()},
        NotImplementedError, "cannot take past_key_values",
    ),
    "what attention does not know": (
        lambda inputs: {"block_table": 1},
        NotImplementedError, r"passes \['block_table'\] to its|arguments is ",
    ),
    "another mask": (
        lambda inputs: {"attention_mask": inputs["attention_mask"].tril()},
        ValueError, "another attention_mask than its plan|attention_mask is",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("where", ["on every rank", "on one rank"])
def test_a_wrong_call_is_refused_on_every_rank(name, where):
    change, error, message = CALLS[name]
    made = FUSED["bloom" if where == "on one rank" else "gpt_neox"].make()

    def on_rank(group):
        model, _, sp, _ = set_up(group, made)
        inputs = sp.shard(BATCH)
        if where == "on every rank" or group.rank == 3:
            inputs = inputs | change(inputs)
        with pytest.raises((error, seqpar.DesyncError), match=message):
            model(**inputs)

    seqpar.simulate(4, on_rank)


def test_a_call_that_does_not_bind_on_one_rank_is_refused_on_all():
    made = FUSED["llama"].make()

    def on_rank(group):
        model, _, sp, _ = set_up(group, made)
        inputs, twice = sp.shard(BATCH), [torch.ones(1)] * (group.rank == 3)
        with pytest.raises((TypeError, seqpar.DesyncError), match="multiple values"):
            model(*twice, **inputs)

    seqpar.simulate(4, on_rank)


@pytest.mark.parametrize("rank", [1, 2])
def test_ranks_with_other_batches_are_refused_over_tp_and_over_sp(rank):
    made = FUSED["bloom"].make()

    def on_rank(group):
        _, _, sp, _ = set_up(group, made)
        batch = {n: x.clone() for n, x in BATCH.items()}
        batch["input_ids"][0, 0] += group.rank == rank
        with pytest.raises(seqpar.DesyncError, match=r"batch\['input_ids'\] is"):
            sp.shard(batch)

    seqpar.simulate(4, on_rank)


def test_a_rank_that_shards_nothing_stops_all():
    """A batch that one rank refuses: those that share its heads and those that share its rows hear of it."""
    made = FUSED["bloom"].make()

    def on_rank(group):
        _, _, sp, _ = set_up(group, made)
        batch = BATCH if group.rank != 1 else BATCH | {"attention_mask": torch.ones(2, 1, 13, 13)}
        with pytest.raises((NotImplementedError, seqpar.DesyncError), match="got 4-D"):
            sp.loss(batch)

    seqpar.simulate(4, on_rank)


def test_dropout_without_a_seed_is_refused_by_layer():
    made = FUSED["bloom"].make(attention_dropout=0.1)

    def on_rank(group):
        _, _, sp, _ = set_up(group, made)
        with pytest.raises(
            ValueError, match=r"ReplacedAttention of layer 0: .*shard\(batch, seed="
        ):
            sp.loss(BATCH)

    seqpar.simulate(4, on_rank)


@pytest.mark.parametrize(("seeds", "drawn"), [((1, 1), True), ((1, 2), True), ((1, 2), False)])
def test_dropout_outside_of_attention_draws_alike_over_tp(seeds, drawn, monkeypatch):
    """Ranks are threads here, with one generator, so its states are made up: before and after a call."""
    made, here = FUSED["bloom"].make().train(), threading.local()
    monkeypatch.setattr(guard, "_random_state", lambda _: next(here.states))

    def on_rank(group):
        model = copy.deepcopy(made)
        replace_attention(model, tp=group)
        sp = SequenceParallel(model, seqpar.RingAttention(seqpar.Group.alone()))
        seed = seeds[group.rank]
        here.states = (torch.tensor([seed, draws]) for draws in (0, int(drawn)))
        refused = drawn and len(set(seeds)) > 1
        expect = pytest.raises(seqpar.DesyncError, match=r"torch.manual_seed alike over tp\) is")
        with expect if refused else nullcontext():
            assert sp.loss(BATCH).isfinite()

    seqpar.simulate(2, on_rank)


@pytest.mark.parametrize("name", ["gpt2", "codegen"])
def test_positions_beyond_a_table_are_refused_on_every_rank(name):
    """One rank alone holds the last ones."""
    made = FUSED[name].make()

    def on_rank(group):
        _, _, sp, _ = set_up(group, made)
        with pytest.raises(ValueError, match="has a table of 64 positions, got position 64"):
            sp.loss(batch_of(1, 65))
        assert sp.loss(batch_of(1, 64)).isfinite()

    seqpar.simulate(4, on_rank)


def test_models_that_are_not_set_up_do_not_attend():
    model = FUSED["bloom"].make()
    replaced = replace_attention(model)
    with pytest.raises(RuntimeError, match=r"was replaced: set it up with SequenceParallel"):
        model(**BATCH)
    x = torch.zeros(1, 3, 48, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="is part of no call of its model"):
        model.transformer.h[0].self_attention(x, x, alibi=None, attention_mask=None)
    model.config._attn_implementation = "eager"
    with pytest.raises(RuntimeError, match=r"put its own back with restore\(\)"):
        model(**BATCH)
    replaced.restore()
    assert model(**BATCH).loss.isfinite()


def test_a_copy_attends_too_and_apart():
    """A copy has replacements of its own, whose gradients are its own."""
    model = FUSED["codegen"].make()
    replace_attention(model)
    sp = SequenceParallel(model, seqpar.RingAttention(seqpar.Group.alone()))
    want = sp.loss(BATCH)
    other = copy.deepcopy(model)
    inputs = sp.shard(BATCH)
    torch.testing.assert_close(other(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    other(**inputs).logits.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert want.isfinite()
