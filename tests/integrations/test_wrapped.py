"""Checkpointed, PEFT, DDP and FSDP2 models on sharded sequences equal one device; and dropout, for any P."""

import copy
import dataclasses
import functools
import gc

import peft
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import seqpar
from seqpar.integrations.transformers import SequenceParallel
from seqpar.integrations.transformers.attention.patterns import Pattern
from seqpar.integrations.transformers.attention.terms import Layer
from seqpar.testing.models.tiny import FAMILIES, batch_of
from seqpar.testing.models.training_step import (
    attend_by,
    differences,
    gradients_of,
    on_rank,
    one_device,
)

# Of the names that transformers had before 5.23, which serve with it too.
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")
BATCH = batch_of(2, 19)


def keeps_products(_, op, *__, **___):
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = functools.partial(create_selective_checkpoint_contexts, keeps_products)


@pytest.mark.parametrize(
    "options",
    [
        {"use_reentrant": True},
        {"use_reentrant": False},
        {"use_reentrant": False, "context_fn": SELECTIVE},
    ],
    ids=["reentrant", "not reentrant", "selective"],
)
@pytest.mark.parametrize("name", ["gpt_oss", "modernbert"])
def test_checkpointed_layers_equal_one_device(name, options):
    family = FAMILIES[name]
    model = family.make()
    want = one_device(model, BATCH, family.labels)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.enable_input_require_grads()
    for strategy in ("ring", "ulysses"):
        for got in seqpar.simulate(2, on_rank, model, BATCH, strategy):
            assert max(differences(got, want).values()) < 1e-10


def sent(group, model, options):
    """(bytes sent by forward, in all) of a step."""
    model = copy.deepcopy(model)
    if options is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    sp = SequenceParallel(model, attend_by("ulysses", group))
    group.traffic.reset()
    loss = sp.loss(BATCH)
    forward = group.traffic.total.bytes
    loss.backward()
    return forward, group.traffic.total.bytes


def test_attention_is_kept_by_checkpointed_layers():
    """Its messages are those of a step without checkpointing; the two blocks' would double otherwise."""
    model = FAMILIES["qwen3"].make()
    kept = {"use_reentrant": False, "context_fn": seqpar.keep_attention}
    plain, checkpointed, again = (
        seqpar.simulate(2, sent, model, options)
        for options in (None, kept, {"use_reentrant": False})
    )
    assert plain == checkpointed
    assert all(more > once for (_, more), (_, once) in zip(again, plain, strict=True))
    want = one_device(model, BATCH, "next")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kept)
    for got in seqpar.simulate(2, on_rank, model, BATCH, "ulysses"):
        assert max(differences(got, want).values()) < 1e-10


def compiled(group, model):
    model = copy.deepcopy(model)
    sp = SequenceParallel(model, attend_by("ring", group))
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    loss = sp.loss(BATCH)
    loss.backward()
    seqpar.sum_gradients(model.parameters(), group)
    return loss.detach(), gradients_of(model)


@pytest.mark.filterwarnings("ignore:.*not a leaf Tensor is being accessed:UserWarning")  # by Dynamo
def test_compiled_layers_equal_one_device():
    """Each layer is one graph; the window of every second one is told apart."""
    torch._dynamo.reset()
    want = one_device(FAMILIES["gemma3"].make(), BATCH, "next")
    for loss, gradients in seqpar.simulate(2, compiled, FAMILIES["gemma3"].make()):
        torch.testing.assert_close(loss, want.loss, rtol=1e-10, atol=1e-10)
        for name, gradient in want.gradients.items():
            rounding = (
                1e-7 if "norm" in name else 1e-10
            )  # of norms the model itself adds in float32
            torch.testing.assert_close(gradients[name], gradient, rtol=rounding, atol=rounding)
    torch._dynamo.reset()


def packed_batches(group, model):
    """Losses of batches with other documents, here and on one device; and how many graphs were made."""
    plain, model = copy.deepcopy(model), copy.deepcopy(model)
    sp, counter = (
        SequenceParallel(model, attend_by("ring", group)),
        CompileCounterWithBackend("aot_eager"),
    )
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    tokens = BATCH["input_ids"]
    length, found = tokens.shape[1], []
    for cut in range(2, 8):
        positions = torch.cat([torch.arange(cut), torch.arange(length - cut)])[None]
        batch = {"input_ids": tokens[:1], "labels": tokens[:1], "position_ids": positions}
        loss = sp.loss(batch)
        loss.backward()
        found.append((loss.item(), plain(**batch, use_cache=False).loss.item()))
    return found, counter.frame_count


@pytest.mark.filterwarnings("ignore:.*not a leaf Tensor is being accessed:UserWarning")  # by Dynamo
def test_packed_batches_compile_once():
    torch._dynamo.reset()
    for losses, graphs in seqpar.simulate(2, packed_batches, FAMILIES["llama"].make()):
        assert graphs <= 2
        for got, want in losses:
            assert got == pytest.approx(want, rel=1e-6)
    torch._dynamo.reset()


def lora(model):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(model, config)


def test_adapters_equal_one_device():
    wrapped = lora(FAMILIES["qwen3"].make())
    want = one_device(wrapped, BATCH, "next")
    assert all("lora" in name for name in want.gradients)
    for got in seqpar.simulate(3, on_rank, wrapped, BATCH):
        assert max(differences(got, want).values()) < 1e-10


def test_prefixes_that_are_learned_are_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(NotImplementedError, match="makes the sequence longer"):
        on_rank(seqpar.Group.alone(), peft.get_peft_model(FAMILIES["llama"].make(), config), BATCH)


def test_adapters_that_look_for_their_tokens_are_refused():
    """They would start at other tokens, or nowhere, in a shard."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[3, 4]
    )
    with pytest.raises(NotImplementedError, match="alora_invocation_tokens"):
        on_rank(seqpar.Group.alone(), peft.get_peft_model(FAMILIES["llama"].make(), config), BATCH)


def averaged(group, kind, name):
    """Gradients of a model that averages them over the ranks by itself."""
    model = FAMILIES[name].make()
    ranks = torch.distributed.new_subgroups_by_enumeration([list(range(group.size))])[0]
    if kind == "ddp":
        model = DistributedDataParallel(model, process_group=ranks)
        sp = SequenceParallel(model, attend_by("ring", group))
    elif kind == "ddp, later":
        sp = SequenceParallel(model, attend_by("ring", group))
        model = DistributedDataParallel(model, process_group=ranks)
    elif kind == "fsdp2, later":
        sp = SequenceParallel(model, attend_by("ulysses", group))
        mesh = DeviceMesh.from_group(ranks, "cpu")
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
    else:
        mesh = DeviceMesh.from_group(ranks, "cpu")
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        sp = SequenceParallel(model, attend_by("ulysses", group))
    loss = sp.loss(BATCH, gradients="mean")
    loss.backward()
    inner = model.module if kind.startswith("ddp") else model
    gradients = gradients_of(inner)
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}
    return loss.detach(), whole


@pytest.mark.parametrize("kind", ["ddp", "ddp, later", "fsdp2", "fsdp2, later"])
def test_wrappers_that_average_gradients_equal_one_device(worlds, kind):
    want = one_device(FAMILIES["llama"].make(), BATCH, "next")
    for loss, gradients in worlds.run(2, averaged, kind, "llama"):
        torch.testing.assert_close(loss, want.loss, rtol=1e-10, atol=1e-10)
        for name, gradient in want.gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-10)


def in_bfloat16(group, first, cast):
    """(loss, gradients) of a step in which FSDP2 casts weights and, if asked, what modules are given."""
    model = FAMILIES["llama"].make().float()
    ranks = torch.distributed.new_subgroups_by_enumeration([list(range(group.size))])[0]
    mesh = DeviceMesh.from_group(ranks, "cpu")
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=cast)

    def shard():
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)

    if first:
        shard()
    sp = SequenceParallel(model, attend_by("ring", group))
    if not first:
        shard()
    loss = sp.loss(BATCH, gradients="mean")
    loss.backward()
    return loss.detach(), {n: g.full_tensor() for n, g in gradients_of(model).items()}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("cast", [False, True])
def test_fsdp_that_computes_in_bfloat16_equals_one_device_up_to_its_rounding(worlds, first, cast):
    """It makes dataclasses among the arguments of a module anew; the plan of a call must not be one."""
    want = one_device(FAMILIES["llama"].make().float(), BATCH, "next")
    for loss, gradients in worlds.run(2, in_bfloat16, first, cast):
        torch.testing.assert_close(loss, want.loss.float(), rtol=0.01, atol=0)
        for name, gradient in want.gradients.items():
            off = (gradients[name] - gradient).norm() / gradient.norm()
            assert off < 0.05, (name, off)


def test_layouts_and_groups_come_through_what_casts_arguments():
    """As FSDP2 goes through them, in a model of one's own."""
    group = seqpar.Group.alone()
    layout, grid = seqpar.zigzag(9, 1), group.grid(ulysses=1)
    for before in (layout, grid, seqpar.Plan(group, layout, grid=grid)):
        after = dataclasses.replace(
            before, **{f.name: getattr(before, f.name) for f in dataclasses.fields(before)}
        )
        assert getattr(after, "group", group) is group
        assert getattr(after, "code", None) == getattr(before, "code", None)


def test_a_wrapper_that_is_gone_is_not_called():
    model = FAMILIES["llama"].make()
    sp = SequenceParallel(model, attend_by("ring", seqpar.Group.alone()))
    assert sp.model is model
    compiled = torch.compile(model)
    assert sp.model is compiled
    holder = torch.nn.ModuleDict({"model": model})  # passes nothing on
    assert sp.model is compiled
    again = torch.compile(model)
    with pytest.raises(RuntimeError, match="wrapped 2 times over"):
        sp.model.eval()
    del compiled
    gc.collect()
    assert sp.model is again
    del again, holder
    gc.collect()
    assert sp.model is model
    assert copy.deepcopy(sp).model is not model


def wrapped_twice(group):
    ranks = torch.distributed.new_subgroups_by_enumeration([list(range(group.size))])[0]
    model = FAMILIES["llama"].make()
    sp = SequenceParallel(model, attend_by("ring", group))
    ddp = DistributedDataParallel(model, process_group=ranks)
    ddp = DistributedDataParallel(model, process_group=ranks)  # as after unfreezing a layer
    gc.collect()
    assert sp.model is ddp
    del ddp
    gc.collect()
    outside = DistributedDataParallel(torch.nn.Sequential(model), process_group=ranks)
    with pytest.raises(RuntimeError, match="round a Sequential that holds the model"):
        sp.loss(BATCH)
    del outside
    gc.collect()
    return sp.model is model


def test_ddp_that_is_made_anew_is_called_and_one_out_of_reach_is_refused(worlds):
    assert all(worlds.run(2, wrapped_twice))


def test_the_tokens_of_all_replicas_count_alike():
    """Two replicas of two ranks; one has most of its labels hidden, so a mean of means is another loss."""
    family = FAMILIES["llama"]
    whole = batch_of(4, 19)
    whole["labels"][2:, 4:] = -100
    original = family.make()
    want = one_device(original, whole, "next")

    def fn(group):
        grid = group.grid(ring=2)
        replica, _ = grid.index_of(group.rank)
        model = copy.deepcopy(original)
        sp = SequenceParallel(model, attend_by("ring", grid.ulysses))
        mine = {name: x[2 * replica : 2 * replica + 2] for name, x in whole.items()}
        loss = sp.loss(mine, everyone=group)
        loss.backward()
        seqpar.sum_gradients(model.parameters(), group)
        return loss.detach(), gradients_of(model)

    for loss, gradients in seqpar.simulate(4, fn):
        torch.testing.assert_close(loss, want.loss, rtol=1e-10, atol=1e-10)
        for name, gradient in want.gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-10)


def dropped(group, model, seed, strategy="ring"):
    """Loss and gradients of a step with dropout."""
    model = copy.deepcopy(model)
    sp = SequenceParallel(model, attend_by(strategy, group))
    loss = sp.loss(BATCH, seed=seed)
    loss.backward()
    seqpar.sum_gradients(model.parameters(), group)
    return loss.item(), gradients_of(model)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_is_the_same_for_any_number_of_ranks(checkpointed):
    model = FAMILIES["bert"].make(attention_probs_dropout_prob=0.3)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    alone, want = dropped(seqpar.Group.alone(), model, 5)
    for size, strategy in ((3, "ring"), (2, "ulysses")):
        for loss, gradients in seqpar.simulate(size, dropped, model, 5, strategy):
            assert loss == pytest.approx(alone, rel=1e-12)
            for name, gradient in want.items():
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-10)
    assert dropped(seqpar.Group.alone(), model, 6)[0] != alone


def test_dropout_differs_by_layer_and_by_rows_of_other_documents():
    """Two layers with the same weights, and two rows with the same tokens, drop apart."""
    model = FAMILIES["llama"].make(attention_dropout=0.5)
    with torch.no_grad():
        for mine, first in zip(*(layer.parameters() for layer in model.model.layers), strict=True):
            mine.copy_(first)
    sp = SequenceParallel(model, attend_by("ring", seqpar.Group.alone()))
    ids = BATCH["input_ids"][:1].repeat(2, 1)
    positions = torch.stack([torch.arange(19), torch.arange(19)])
    positions[1, 10:] -= 10
    inputs = sp.shard({"input_ids": ids, "position_ids": positions}, seed=0)
    call = inputs["seqpar"]
    first, second = (layer.self_attn for layer in model.model.layers)
    q = torch.randn(2, 4, 19, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outs = [
        call.attend(Layer(m, q, q[:, :2], q[:, :2], Pattern(causal=True), {"dropout": 0.5}))
        for m in (first, second)
    ]
    assert not torch.allclose(outs[0], outs[1])
    alike = q[:1].repeat(2, 1, 1, 1)
    out = call.attend(
        Layer(first, alike, alike[:, :2], alike[:, :2], Pattern(causal=True), {"dropout": 0.5})
    )
    assert not torch.allclose(out[0, :10], out[1, :10])
    copied = copy.deepcopy(first)
    with pytest.raises(NotImplementedError, match="is a copy of the one that was set up"):
        call.attend(Layer(copied, q, q, q, Pattern(causal=True), {"dropout": 0.5}))
