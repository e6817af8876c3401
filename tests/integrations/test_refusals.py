"""What cannot be honoured is refused, on every rank, with the layer's name and before anything is sent."""

import copy

import pytest
import torch
import transformers

import seqpar
from seqpar.integrations.transformers import SequenceParallel, replace_attention
from seqpar.testing.models.tiny import FAMILIES, LATER, batch_of
from seqpar.testing.models.training_step import attend_by

SMALL = {"vocab_size": 64, "hidden_size": 32}
OUTSIDE = {  # models, and the layer that must be named
    "Bloom": ({"n_layer": 2, "n_head": 4}, r"transformer\.h\.0\.self_attention \(BloomAttention\)"),
    "Mpt": (
        {"d_model": 32, "n_layers": 2, "n_heads": 4},
        r"transformer\.blocks\.0\.attn \(MptAttention\)",
    ),
    "Falcon": (
        {"num_hidden_layers": 2, "num_attention_heads": 4},
        r"transformer\.h\.0\.self_attention \(FalconAttention\)",
    ),
    "Mamba": (
        {"num_hidden_layers": 2, "state_size": 4},
        r"backbone\.layers\.0\.mixer \(MambaMixer\) lets rows depend on each other",
    ),
    "RecurrentGemma": (
        {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48},
        r"model\.layers\.0\.temporal_block \(RecurrentGemmaRecurrentBlock\) lets rows depend",
    ),
    "Qwen3Next": (
        {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
        | {"shared_expert_intermediate_size": 8, "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        r"model\.layers\.0\.linear_attn \(Qwen3NextGatedDeltaNet\) lets rows depend",
    ),
}


def causal_lm(name, options):
    config = getattr(transformers, f"{name}Config")(**(SMALL | options))
    torch.manual_seed(0)
    suffix = "ForCausalLM" if hasattr(transformers, f"{name}ForCausalLM") else "LMHeadModel"
    return getattr(transformers, name + suffix)(config)


def refused(model, error, message, size=2):
    """Setting the model up is refused, and leaves it as it was."""
    before = model.config._attn_implementation

    def set_up(group):
        mine = copy.deepcopy(model)
        try:
            SequenceParallel(mine, seqpar.RingAttention(group))
        finally:
            assert mine.config._attn_implementation == before

    with pytest.raises(error, match=message):
        seqpar.simulate(size, set_up)


OUTSIDE |= {  # those that the installed release does not serve yet
    family.model.removesuffix("ForCausalLM"): (
        family.options,
        rf"transformer\.h\.0\.attn \({family.model.removesuffix('ForCausalLM')}Attention\)",
    )
    for family in LATER.values()
    if not family.is_served
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_models_that_do_not_attend_through_the_interface_are_refused_by_layer(name):
    options, layer = OUTSIDE[name]
    refused(causal_lm(name, options), NotImplementedError, layer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FAMILIES["gpt_oss"].make(output_router_logits=True), "loss over its routers"),
        (lambda: FAMILIES["bert"].make(is_decoder=True, add_cross_attention=True), "cross attention"),
        (
            lambda: transformers.BertModel(transformers.BertConfig(**FAMILIES["bert"].options)),
            r"returns pooler_output \(1, 32\) for 11 tokens",
        ),
        (
            lambda: transformers.LlamaForSequenceClassification(
                transformers.LlamaConfig(**FAMILIES["llama"].options, pad_token_id=0)
            ),
            r"returns logits \(1, 2\) for 11 tokens",
        ),
        (
            lambda: transformers.NemotronForCausalLM(
                transformers.NemotronConfig(**FAMILIES["llama"].options)
            ),
            "NemotronForCausalLM does not pass its keyword arguments on",
        ),
    ],
)  # fmt: skip
def test_models_whose_rows_or_losses_are_not_their_own_are_refused(make, message):
    refused(make(), NotImplementedError, message)


def test_layers_that_are_skipped_at_random_are_refused():
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 48, "layerdrop": 0.1}
    config = transformers.OPTConfig(**(SMALL | sizes), word_embed_proj_dim=32)
    model = transformers.OPTForCausalLM(config)
    refused(model, NotImplementedError, r"model\.decoder skips layers at random")


def test_a_wrapper_of_two_models_is_refused():
    """The second would go on attending to its shard."""
    two = torch.nn.ModuleList([FAMILIES["llama"].make(), FAMILIES["mistral"].make()])
    with pytest.raises(ValueError, match="LlamaForCausalLM and MistralForCausalLM, of which only"):
        SequenceParallel(two, seqpar.RingAttention(seqpar.Group.alone()))


def test_attention_that_does_more_than_its_function_is_told_is_refused(monkeypatch):
    """A layer that scales its eager scores once more, as some do for old configs."""
    model = FAMILIES["llama"].make()
    module = __import__(type(model).__module__, fromlist=["eager_attention_forward"])
    eager = module.eager_attention_forward

    def sharper(layer, q, *args, **kwargs):
        return eager(layer, 3 * q, *args, **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", sharper)
    refused(model, NotImplementedError, "returns other logits than with eager attention", size=1)


def test_what_passes_between_rows_inside_of_an_attention_is_found(monkeypatch):
    """Keys that are mixed with their neighbours on the way to the attention function, in no module."""
    model = FAMILIES["llama"].make()
    module = __import__(type(model).__module__, fromlist=["apply_rotary_pos_emb"])
    rotate = module.apply_rotary_pos_emb

    def mixed(q, k, *args, **kwargs):
        q, k = rotate(q, k, *args, **kwargs)
        return q, k + k.roll(1, dims=2)

    monkeypatch.setattr(module, "apply_rotary_pos_emb", mixed)
    refused(
        model, NotImplementedError, r"layers\.0\.self_attn \(LlamaAttention\) lets rows", size=1
    )


def test_what_rows_do_because_of_special_tokens_elsewhere_is_found():
    """ESM scales all embeddings of a sequence by how many of its tokens are masked."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.EsmConfig(
        **(SMALL | sizes), token_dropout=True, mask_token_id=32, pad_token_id=1
    )
    message = r"esm\.embeddings \(EsmEmbeddings\) lets rows depend"
    refused(transformers.EsmForMaskedLM(config), NotImplementedError, message, size=1)


def mean_of_all(model):
    """A value that follows from all rows of all sequences."""
    mlp = model.model.layers[0].mlp
    mlp.register_forward_hook(lambda _, x, y: y + x[0].abs().mean())


def any_special(model):
    """Something that is done to all rows where any token of a batch is a special one."""
    special = model.config.eos_token_id

    def add(_, given, y):
        return y + (given[0] == special).any()

    model.model.embed_tokens.register_forward_hook(add)


def attends_again(model):
    """A layer that attends once more, to no effect, where any token of a batch is a special one."""
    special, attention = model.config.eos_token_id, model.model.layers[1].self_attn
    seen, forward = [False], attention.forward

    def look(_, __, kwargs):
        seen[0] = bool((kwargs["input_ids"] == special).any())

    def twice(*args, **kwargs):
        if seen[0]:
            forward(*args, **kwargs)
        return forward(*args, **kwargs)

    model.register_forward_pre_hook(look, with_kwargs=True)
    attention.forward = twice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (mean_of_all, r"LlamaForCausalLM returns other logits than with eager attention"),
        (any_special, r"LlamaForCausalLM returns other logits than with eager attention"),
        (attends_again, r"the model, which runs other modules for other tokens, lets rows depend"),
    ],
)
def test_what_follows_from_other_sequences_of_a_batch_is_found(change, message):
    """Sequences of one batch stand for runs of their own only where they do not see each other."""
    model = FAMILIES["llama"].make()
    change(model)
    with pytest.raises(NotImplementedError, match=message):
        SequenceParallel(model, seqpar.RingAttention(seqpar.Group.alone()))


@pytest.mark.parametrize("change", [mean_of_all, any_special, attends_again])
def test_what_follows_from_other_sequences_is_found_in_replaced_models_too(change):
    """What is done to a model between its replacement and its set-up, such as a policy, is looked at."""
    model = FAMILIES["llama"].make()
    replace_attention(model)
    change(model)
    with pytest.raises(NotImplementedError, match="lets rows depend on"):
        SequenceParallel(model, seqpar.RingAttention(seqpar.Group.alone()))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_model_is_run_five_times(replaced):
    """Once for each way of giving positions and a mask; without a mask a replaced one was run before."""
    model, runs = FAMILIES["llama"].make(), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    if replaced:
        replace_attention(model)
        assert len(runs) == 5
        runs.clear()
    SequenceParallel(model, seqpar.RingAttention(seqpar.Group.alone()))
    assert len(runs) == (2 if replaced else 5)


def test_setting_up_leaves_the_mode_of_every_module():
    model = FAMILIES["gpt_oss"].make()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    SequenceParallel(model, seqpar.RingAttention(seqpar.Group.alone()))
    assert [module.training for module in model.modules()] == modes


def test_what_is_not_a_model_or_a_plain_module_is_refused():
    model, group = FAMILIES["llama"].make(), seqpar.Group.alone()
    with pytest.raises(TypeError, match="a transformers model, got Linear"):
        SequenceParallel(torch.nn.Linear(2, 2), seqpar.RingAttention(group))
    with pytest.raises(TypeError, match="a module such as"):
        SequenceParallel(model, group)
    for options in (
        {"mask": seqpar.Mask(causal=True)},
        {"score": seqpar.Score(softcap=5.0)},
        {"dropout": seqpar.Dropout(0.1, 0)},
    ):
        with pytest.raises(ValueError, match="come from the layers of the model"):
            SequenceParallel(model, seqpar.RingAttention(group, **options))
    with torch.device("meta"):
        hollow = transformers.LlamaForCausalLM(model.config)
    with pytest.raises(ValueError, match="when its weights are loaded"):
        SequenceParallel(hollow, seqpar.RingAttention(group))


def ready(group, name="llama", **changes):
    model = FAMILIES[name].make(**changes)
    return model, SequenceParallel(model, attend_by("ring", group))


BATCH = batch_of(2, 13)
ARGUMENTS = {  # what a model is called with besides or instead of its inputs -> what every rank says
    "no plan": (
        lambda inputs: {"seqpar": None},
        RuntimeError, "LlamaForCausalLM attends over ranks .* but was called without a plan",
    ),
    "labels": (
        lambda inputs: {"labels": inputs.labels}, ValueError, "would shift the labels of a shard"
    ),
    "output_attentions": (
        lambda inputs: {"output_attentions": True},
        NotImplementedError, "LlamaForCausalLM cannot take output_attentions",
    ),
    "the last logits": (
        lambda inputs: {"logits_to_keep": 1},
        NotImplementedError, "cannot take logits_to_keep",
    ),
    "a cache": (
        lambda inputs: {"past_key_values": transformers.DynamicCache()},
        NotImplementedError, "cannot take past_key_values",
    ),
    "a cache, by its name from 5.24 on": (
        lambda inputs: {"cache": transformers.DynamicCache()},
        NotImplementedError, "cannot take cache",
    ),
    "another mask": (
        lambda inputs: {"attention_mask": inputs["attention_mask"].tril()},
        ValueError, "LlamaAttention of layer 0: the model was given another attention_mask than",
    ),
    "no mask": (  # rank 2 holds positions in a row, from which no texts are found
        lambda inputs: {"attention_mask": None},
        NotImplementedError, r"its mask is made of and_masks\(.*\) for texts that position_ids pack",
    ),
    "a mask of rows and keys": (
        lambda inputs: {"attention_mask": torch.zeros(2, 1, 13, 13)},
        NotImplementedError, r"has a mask of its own, \(2, 1, 13, 13\)",
    ),
    "something unknown": (
        lambda inputs: {"position_bias": torch.zeros(1)},
        NotImplementedError, r"passes \['position_bias'\] to its attention function",
    ),
    "fewer rows": (
        lambda inputs: {n: inputs[n][:, :-1] for n in ("input_ids", "position_ids", "attention_mask")},
        ValueError, r"rank \d of 3 must hold [45] of the 13 positions \(zigzag\), got q",
    ),
}  # fmt: skip
BATCHES = {  # what is sharded -> what every rank says
    "no labels": ({"input_ids": BATCH["input_ids"]}, {}, ValueError, "needs labels"),
    "fewer tokens than ranks": (
        {n: x[:, :1] for n, x in BATCH.items()}, {}, ValueError, "every rank needs a token",
    ),
    "borders that leave ranks without tokens": (
        BATCH, {"multiple_of": 8}, ValueError, r"every rank needs a token.* gives \(8, 5, 0\)",
    ),
    "a token without an embedding": (
        {n: torch.cat([x, x.new_full((2, 1), 64)], 1) for n, x in BATCH.items()},
        {}, ValueError, r"input_ids must be 0 \.\.\. 63, got \d+ \.\.\. 64",
    ),
    "no tokens": ({"labels": BATCH["labels"]}, {}, ValueError, "needs input_ids"),
    "a seed of another kind": (BATCH, {"seed": 1.0}, TypeError, "seed must be"),
    "a mask of rows and keys": (
        BATCH | {"attention_mask": torch.ones(2, 1, 13, 13)}, {}, NotImplementedError, "got 4-D",
    ),
    "something unknown": (BATCH | {"bias": torch.ones(2, 13)}, {}, ValueError, "'bias'. a sequence"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("where", ["on every rank", "on one rank"])
def test_a_wrong_call_is_refused_on_every_rank(name, where):
    change, error, message = ARGUMENTS[name]

    def on_rank(group):
        model, sp = ready(group)
        inputs = sp.shard(BATCH)
        if where == "on every rank" or group.rank == 0:
            inputs = inputs | change(inputs)
        with pytest.raises((error, seqpar.DesyncError), match=message) as caught:
            model(**inputs)
        return caught.type is not seqpar.DesyncError

    own = seqpar.simulate(3, on_rank)
    everywhere = [True, True, name != "no mask"]
    assert own == (everywhere if where == "on every rank" else [True, False, False])


@pytest.mark.parametrize("name", BATCHES)
def test_a_wrong_batch_is_refused_on_every_rank(name):
    batch, options, error, message = BATCHES[name]

    def on_rank(group):
        _, sp = ready(group)
        with pytest.raises(error, match=message):
            sp.loss(batch, **options)

    seqpar.simulate(3, on_rank)


def test_a_label_that_is_no_class_is_refused_on_every_rank():
    def on_rank(group):
        _, sp = ready(group)
        labels = BATCH["labels"].clone()
        labels[0, 5] = 64
        with pytest.raises((IndexError, seqpar.DesyncError), match="64 is out of bounds"):
            sp.loss({"input_ids": BATCH["input_ids"], "labels": labels})

    seqpar.simulate(3, on_rank)


def test_ranks_with_other_batches_are_refused():
    def on_rank(group):
        _, sp = ready(group)
        mask = torch.ones(2, 13, dtype=torch.long)
        mask[0, -1] = group.rank
        batch = {"input_ids": BATCH["input_ids"], "attention_mask": mask}
        with pytest.raises(seqpar.DesyncError, match=r"seen is b.* on rank 0, None on rank 1"):
            sp.shard(batch)

    seqpar.simulate(2, on_rank)


def test_dropout_without_a_seed_is_refused_on_every_rank():
    def on_rank(group):
        model, sp = ready(group, "bert", attention_probs_dropout_prob=0.1)
        with pytest.raises(
            ValueError, match=r"BertSelfAttention of layer 0: .*shard\(batch, seed="
        ):
            sp.loss(BATCH)
        model.eval()
        assert sp.loss(BATCH).isfinite()

    seqpar.simulate(2, on_rank)


@pytest.mark.parametrize(("kind", "rope_type"), [("contiguous", "longrope"), ("zigzag", "dynamic")])
def test_rotary_frequencies_that_ranks_would_choose_apart_are_refused(kind, rope_type):
    factors = (
        {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if rope_type == "longrope" else {}
    )
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0} | factors
    length = 40 if rope_type == "longrope" else 70
    rope |= {"original_max_position_embeddings": 24} if factors else {}

    def on_rank(group):
        _, sp = ready(group, rope_parameters=rope, max_position_embeddings=64)
        with pytest.raises(NotImplementedError, match=f"rope_type '{rope_type}'"):
            sp.shard(batch_of(1, length), kind=kind)
        sp.shard(batch_of(1, 20), kind=kind)
        if factors:
            sp.shard(batch_of(1, length), kind="striped")

    seqpar.simulate(2, on_rank)


def test_a_model_switched_back_runs_on_one_device():
    model, _ = ready(seqpar.Group.alone())
    model.set_attn_implementation("sdpa")
    assert model(**BATCH).loss.isfinite()
    out = model.generate(BATCH["input_ids"], max_new_tokens=2, pad_token_id=0)
    assert out.shape == (2, 15)


def test_losses_of_another_kind_are_refused():
    model, sp = ready(seqpar.Group.alone())
    model.loss_function = lambda **_: None
    with pytest.raises(NotImplementedError, match="is not the cross entropy of each token"):
        sp.loss(BATCH)


def test_positions_that_a_model_counts_from_the_first_token_seen_are_not_guessed():
    """OPT takes 0, 1, ... for what attention_mask shows, wherever in the row that starts."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 48, "dropout": 0.0}
    config = transformers.OPTConfig(**(SMALL | sizes), word_embed_proj_dim=32)
    sp = SequenceParallel(
        transformers.OPTForCausalLM(config), attend_by("ring", seqpar.Group.alone())
    )
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, 9:] = 0
    sp.shard({"input_ids": BATCH["input_ids"], "attention_mask": mask})
    with pytest.raises(NotImplementedError, match="counts positions from 0 over what is not padd"):
        sp.shard({"input_ids": BATCH["input_ids"], "attention_mask": mask.flip(1)})
    with pytest.raises(NotImplementedError, match="counts positions from 0 over what is not padd"):
        sp.shard({"inputs_embeds": torch.zeros(2, 13, 32), "attention_mask": mask.flip(1)})


@pytest.mark.parametrize(("name", "packs"), [("llama", True), ("gpt_oss", False)])
def test_positions_that_start_anew_are_documents_only_where_the_model_looks_at_them(name, packs):
    _, sp = ready(seqpar.Group.alone(), name)
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    batch = {"input_ids": BATCH["input_ids"][:1], "position_ids": positions}
    if packs:
        assert sp.shard(batch)["seqpar"].rows == ((0, 6, 13),)
    else:
        with pytest.raises(NotImplementedError, match="makes its masks without them"):
            sp.shard(batch)
    packed = batch | {"cu_seq_lens_q": torch.tensor([0, 6, 13])}
    assert sp.shard(packed)["seqpar"].rows == ((0, 6, 13),)


def test_models_that_differ_between_ranks_are_refused():
    def on_rank(group):
        model = FAMILIES["llama" if group.rank else "qwen3"].make()
        SequenceParallel(model, seqpar.RingAttention(group))

    with pytest.raises(seqpar.DesyncError, match="model is 'Qwen3ForCausalLM' on"):
        seqpar.simulate(2, on_rank)


def test_weights_that_differ_along_one_axis_are_told_along_both():
    """Ranks of tp hold other shards, so weights are compared along the sequence alone."""
    models = [FAMILIES["llama"].make() for _ in range(4)]
    with torch.no_grad():
        models[3].lm_head.weight[0, 0] += 1

    def set_up(group):
        grid = group.grid(ulysses=2)
        with pytest.raises(seqpar.DesyncError, match=r"the hash of lm_head\.weight is"):
            SequenceParallel(models[group.rank], seqpar.RingAttention(grid.ring), tp=grid.ulysses)
        return True

    assert all(seqpar.simulate(4, set_up))


def test_models_of_ranks_that_share_one_config_object_are_refused_in_words():
    """Ranks of one process would switch each other's attention."""
    config = FAMILIES["llama"].make().config
    models = []
    for _ in range(3):
        torch.manual_seed(0)
        models.append(transformers.LlamaForCausalLM(config))

    def set_up(group):
        SequenceParallel(models[group.rank], seqpar.RingAttention(group))

    with pytest.raises(
        ValueError, match="LlamaForCausalLM of another rank has the same config object"
    ):
        seqpar.simulate(3, set_up)
    for model in models:
        model.config = copy.deepcopy(config)
        for module in model.modules():
            if hasattr(module, "config"):
                module.config = model.config
    seqpar.simulate(3, set_up)
