"""What is saved of a model whose weights were shared out is whole, or an error; stale optimizers are told.

A failure here is silent elsewhere: a checkpoint that misses weights loads with a warning and random values.
"""

import copy
import gc
import io
import pickle
from weakref import ref

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import DeviceMesh

import seqpar
from seqpar.integrations.transformers import SequenceParallel, replace_attention
from seqpar.tensor_parallel import apply_policy, megatron, whole_state
from seqpar.tensor_parallel.saving import guard_saving
from seqpar.testing.models.fused import FUSED


def made():
    model = FUSED["llama"].make()
    return model, {name: x.clone() for name, x in model.state_dict().items()}


def assert_saved(folder, want):
    again = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    got = again.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], x) for name, x in want.items())


@pytest.mark.parametrize("how", ["nothing", "its own state", "a whole state", "by position"])
def test_a_replaced_model_saves_itself_whole(tmp_path, how):
    model, want = made()
    replaced = replace_attention(model)
    given = {
        "nothing": ((), {}),
        "its own state": ((), {"state_dict": model.state_dict()}),  # as trainers do
        "a whole state": ((), {"state_dict": replaced.state_dict()}),
        "by position": ((True, model.state_dict()), {}),
    }
    args, kwargs = given[how]
    model.save_pretrained(tmp_path, *args, **kwargs)
    assert_saved(tmp_path, want)


def test_a_copy_saves_its_own_weights(tmp_path):
    model, want = made()
    replace_attention(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.layer.qkv_weight").zero_()
    copied.save_pretrained(tmp_path)
    assert_saved(tmp_path, want)


def test_what_was_put_back_saves_as_before(tmp_path):
    model, want = made()
    replace_attention(model).restore()
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)
    assert_saved(tmp_path, want)


def test_a_model_inside_of_another_saves_under_its_own_names(tmp_path):
    model, want = made()
    outer = torch.nn.ModuleDict({"inside": model})
    replace_attention(outer["inside"])
    outer["inside"].save_pretrained(tmp_path)
    assert_saved(tmp_path, want)


class Around(torch.nn.Module):
    """As DDP: the model is its `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_the_state_of_a_model_around_it_is_saved_under_its_own_names(tmp_path):
    model, want = made()
    replaced = replace_attention(Around(model))
    state = replaced.state_dict()
    assert all(name.startswith("module.") for name in state)
    model.save_pretrained(tmp_path, state_dict=state)
    assert_saved(tmp_path, want)


def test_adapters_that_were_merged_leave_a_model_that_saves_itself(tmp_path):
    model, _ = made()
    torch.manual_seed(3)
    config = LoraConfig(target_modules=["up_proj"], r=2, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    replace_attention(adapted)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(again.get_parameter(name), merged.get_parameter(name))
    assert "model.layers.0.self_attn.q_proj.weight" in again.state_dict()


def test_a_model_goes_when_it_is_let_go_of():
    model, _ = made()
    replace_attention(model)
    gone = ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_only_what_has_the_method_itself_is_guarded(tmp_path):
    """A compiled model and PEFT's inner one hand on what they are asked for."""
    model, want = made()
    guard_saving(torch.compile(model, backend="eager"))
    with pytest.raises(RuntimeError, match="call state = "):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, state_dict=dict(want))
    assert_saved(tmp_path, want)
    adapted = get_peft_model(made()[0], LoraConfig(target_modules=["up_proj"], r=2))
    guard_saving(adapted)
    assert "save_pretrained" not in vars(adapted.base_model)
    assert "save_pretrained" in vars(adapted.base_model.model)


def test_what_was_guarded_and_pickled_does_not_save():
    model, _ = made()
    guard_saving(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with pytest.raises(RuntimeError, match="was pickled while its weights were shared out"):
        torch.load(buffer, weights_only=False).save_pretrained("nowhere")


def test_weights_on_several_ranks_are_refused_until_they_are_gathered(tmp_path):
    model, want = made()

    def on_rank(group):
        mine = copy.deepcopy(model)
        replaced = replace_attention(mine, tp=group)
        for state in (None, mine.state_dict()):
            with pytest.raises(
                RuntimeError, match=r"call state = replaced.state_dict\(\) on every"
            ):
                mine.save_pretrained(tmp_path, state_dict=state)
        state = replaced.state_dict()
        if group.rank == 1:
            mine.save_pretrained(tmp_path / "whole", state_dict=state)

    seqpar.simulate(2, on_rank)
    assert_saved(tmp_path / "whole", want)


def saved_under_policy(group, folder, replaces):
    model, _ = made()
    mesh = DeviceMesh("cpu", list(range(group.size)))
    replaced = replace_attention(model, tp=group) if replaces else None
    apply_policy(model, megatron(model), mesh)
    said = []
    for state in (None, model.state_dict()):
        try:
            model.save_pretrained(folder, state_dict=state)
        except RuntimeError as error:
            said.append(str(error))
    state = replaced.state_dict() if replaced else whole_state(model)
    if group.rank == 0:
        model.save_pretrained(folder, state_dict=state)
    return said


@pytest.mark.parametrize("replaces", [False, True])
def test_a_policy_does_not_save_its_shards(worlds, tmp_path, replaces):
    for said in worlds.run(2, saved_under_policy, str(tmp_path), replaces):
        assert len(said) == 2
        how = "replaced.state_dict()" if replaces else "seqpar.tensor_parallel.whole_state(model)"
        assert all(f"call state = {how} on every rank" in words for words in said)
    assert_saved(tmp_path, made()[1])


def adapters_saved_under_policy(group, folder):
    model, _ = made()
    torch.manual_seed(3)
    config = LoraConfig(target_modules=["up_proj"], r=2, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    want = {n: x.clone() for n, x in adapted.state_dict().items() if "lora" in n}
    apply_policy(adapted, megatron(adapted), DeviceMesh("cpu", list(range(group.size))))
    with pytest.raises(RuntimeError, match="weights of PeftModel are shared out over ranks"):
        adapted.save_pretrained(folder)
    state = whole_state(adapted)
    if group.rank == 0:
        adapted.save_pretrained(folder, state_dict=state)
    return want


def test_adapters_under_a_policy_likewise(worlds, tmp_path):
    want, _ = worlds.run(2, adapters_saved_under_policy, str(tmp_path))
    from safetensors.torch import load_file

    got = load_file(tmp_path / "adapter_model.safetensors")
    assert {n.replace(".default", "") for n in want} == set(got)
    assert all(torch.equal(got[n.replace(".default", "")], x) for n, x in want.items())


def test_an_optimizer_of_given_up_weights_is_told():
    model, _ = made()
    before = torch.optim.SGD(model.parameters(), lr=0.1)
    elsewhere = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    replaced = replace_attention(model)
    now = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"SGD holds \d+ parameters that replace_attention"):
            before.step()
        now.step()
        elsewhere.step()
    before.param_groups.clear()  # one that was looked at is looked at again when it changes
    before.step()
    before.add_param_group({"params": list(now.param_groups[0]["params"])})
    before.step()
    replaced.restore()
    with pytest.raises(RuntimeError, match=r"restore\(\) has put the model's own back"):
        now.step()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_weights_are_not_kept_for_it():
    model, _ = made()
    weight = ref(model.get_parameter("model.layers.0.self_attn.q_proj.weight"))
    before = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    replace_attention(model)
    before.step()
    del model
    gc.collect()
    assert weight() is None
    before.step()


def test_what_cannot_be_pickled_says_what_to_do():
    model, _ = made()
    replace_attention(model)
    with pytest.raises(TypeError, match=r"cannot be pickled: save replaced.state_dict\(\)"):
        torch.save(model, io.BytesIO())

    def on_rank(group):
        for thing in (
            group,
            seqpar.RingAttention(group),
            seqpar.MultiheadAttention(16, 2, attention=seqpar.UlyssesAttention(group)),
            seqpar.Plan(group, seqpar.zigzag(8, group.size)),
        ):
            with pytest.raises(
                TypeError, match=r"cannot be pickled: save a module's state_dict\(\)"
            ):
                pickle.dumps(thing)
            assert copy.deepcopy(thing) is not None

    seqpar.simulate(2, on_rank)


def test_one_rank_alone_is_pickled():
    module = seqpar.MultiheadAttention(16, 2, attention=seqpar.RingAttention(seqpar.Group.alone()))
    again = pickle.loads(pickle.dumps(module))
    x, layout = torch.randn(1, 6, 16), seqpar.zigzag(6, 1)
    assert torch.equal(again(x, x, x, layout=layout)[0], module(x, x, x, layout=layout)[0])
    assert seqpar.Group.named(again.attention.group.name) is again.attention.group
    model, _ = made()
    sp = SequenceParallel(model, seqpar.RingAttention(seqpar.Group.alone()))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert sp is not None
    assert loaded.state_dict().keys() == model.state_dict().keys()
