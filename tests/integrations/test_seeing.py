"""Models that see images on sharded sequences equal one device: logits, loss, every gradient, towers too."""

import copy
from functools import cache

import pytest
import torch

import seqpar
from seqpar.integrations.transformers import SequenceParallel, replace_attention
from seqpar.testing.models.seeing import SEEING
from seqpar.testing.models.tiny import batch_of
from seqpar.testing.models.training_step import (
    DENSE,
    Step,
    differences,
    gradients_of,
    on_rank,
    one_device,
)
from seqpar.testing.refusals import check_told, told

EXACT = {"logits": 1e-10, "loss": 1e-10, "gradients": 1e-10, "float32": 1e-6}
LENGTH = 37


def check(name, batch, size, strategy="ring", want=None, **options):
    family, model = SEEING[name], model_of(name)
    want = want or one_device(model, batch, family.labels)
    mask = batch.get("attention_mask")
    counted = None if mask is None else mask.bool()
    for got in seqpar.simulate(size, lambda g: on_rank(g, model, batch, strategy, **options)):
        found = differences(got, want, family.float32, counted)
        assert all(found[key] <= EXACT[key] for key in EXACT), found


@cache
def model_of(name):
    return SEEING[name].make()


@cache
def case(name):
    batch = SEEING[name].seen(batch_of(2, LENGTH))
    return batch, one_device(model_of(name), batch, "next")


EVERYWHERE = [(name, *way) for name in SEEING for way in ((2, "ulysses"), (3, "ring"))]
ELSEWHERE = [
    (name, *way) for name in ("gemma3_vl", "qwen3_vl") for way in ((1, "ring"), (4, "hybrid"))
]


@pytest.mark.parametrize(("name", "size", "strategy"), EVERYWHERE + ELSEWHERE)
def test_equals_one_device(name, size, strategy):
    batch, want = case(name)
    assert any(want.gradients[n].any() for n in want.gradients if "vis" in n), (
        "the tower is trained"
    )
    check(name, batch, size, strategy, want)


@pytest.mark.parametrize("name", SEEING)
def test_what_judges_is_what_transformers_computes(name):
    """Eager attention takes its softmax in float32: 1e-5 is what it can say."""
    batch, want = case(name)
    assert (
        max(differences(one_device(model_of(name), batch, "next", "eager"), want).values()) < 1e-5
    )


# Without images PaliGemma is ambiguous on one device, and Mllama skips whole layers.
@pytest.mark.parametrize(
    "name", [n for n in SEEING if n not in ("paligemma", "paligemma2", "mllama")]
)
def test_text_alone_equals_one_device(name):
    """No parameter of the tower has a gradient, on one device and here."""
    batch = batch_of(2, LENGTH)
    want = one_device(model_of(name), batch, "next")
    assert not any("vis" in n for n in want.gradients)
    check(name, batch, 3, "ring", want)


def padded(name, left):
    """Of the second sequence, 6 tokens behind its images or before them are hidden."""
    family = SEEING[name]
    batch = family.seen(batch_of(2, LENGTH))
    mask = torch.ones_like(batch["input_ids"])
    mask[1, slice(0, 3) if left else slice(LENGTH - 6, LENGTH)] = 0
    batch["labels"][1, : 4 if left else 0] = -100
    return batch | {"attention_mask": mask, "labels": batch["labels"].where(mask.bool(), -100)}


@pytest.mark.parametrize(
    ("name", "left"),
    [(n, left) for n in SEEING for left in (False, True) if not (left and SEEING[n].prefix)],
)
def test_padded_batches_equal_one_device(name, left):
    check(name, padded(name, left), 3)


def test_blocks_differ_by_row():
    """One row has an image where the other has text."""
    batch, _ = case("gemma3_vl")
    batch = {key: x.clone() for key, x in batch.items()}
    (at,) = (batch["input_ids"][1] == 50).nonzero(as_tuple=True)
    batch["input_ids"][1, at[:4]], batch["token_type_ids"][1, at[:4]] = 7, 0
    batch["pixel_values"] = batch["pixel_values"][:3]
    check("gemma3_vl", batch, 3)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("lines", [3, 4])
def test_positions_of_time_height_and_width_may_be_given(name, lines):
    """They are those that the model counts itself; before them may be those of the text."""
    batch, want = case(name)
    told = {key: batch[key] for key in ("mm_token_type_ids", "image_grid_thw")}
    positions, _ = model_of(name).model.get_rope_index(batch["input_ids"], **told)
    if lines == 4:
        order = torch.arange(LENGTH).expand(1, 2, -1)
        positions = torch.cat([order, positions])
    check(name, batch | {"position_ids": positions}, 3, "ring", want)


def each_alone(model, batches):
    """A step of the mean over the tokens of several batches of one sequence, each attended by itself."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(DENSE)
    rows = [model(**{n: x for n, x in b.items() if n != "labels"}).logits for b in batches]
    pairs = [(x[0, :-1], b["labels"][0, 1:]) for x, b in zip(rows, batches, strict=True)]
    logits, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    return Step(torch.cat(rows, 1).detach(), loss.detach(), gradients_of(model))


@pytest.mark.parametrize("name", ["llava", "gemma3_vl"])
def test_packed_texts_equal_each_alone(name):
    """Each with an image. transformers itself looks up blocks of packed texts at positions in the text."""
    first, second = (SEEING[name].seen(batch_of(1, length), images=1) for length in (11, LENGTH))
    second["labels"][0, 0] = -100  # would be predicted by the first
    want = each_alone(model_of(name), [first, second])
    packed = {
        key: torch.cat([first[key], second[key]], 0 if key == "pixel_values" else 1)
        for key in first
    }
    packed["position_ids"] = torch.cat([torch.arange(11), torch.arange(LENGTH)])[None]
    check(name, packed, 3, "ring", want)


def step_of(group, name):
    return on_rank(group, SEEING[name].make(), case(name)[0], "ulysses")


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3_vl"])
def test_equals_one_device_over_processes(worlds, name):
    _, want = case(name)
    for got in worlds.run(3, step_of, name):
        found = differences(got, want, SEEING[name].float32)
        assert all(found[key] <= EXACT[key] for key in EXACT), found


def refused(name, batch, message, change=None):
    """Refused on every rank, and the next step is right."""

    def step(group):
        model = copy.deepcopy(model_of(name))
        sp = SequenceParallel(model, seqpar.RingAttention(group))
        text = told(lambda: (change or SequenceParallel.loss)(sp, batch))
        return text, sp.loss(case(name)[0]).item()

    for text, loss in seqpar.simulate(3, step):
        check_told([text], message)
        assert loss == pytest.approx(float(case(name)[1].loss))


def test_what_is_not_known_to_be_along_the_sequence_is_refused():
    def handed(sp, batch):
        layers = sp.inner.model.language_model
        hook = layers.register_forward_pre_hook(
            lambda _, args, given: (args, given | {"per_token": torch.zeros(2, LENGTH)}),
            with_kwargs=True,
            prepend=True,
        )
        try:
            return sp.loss(batch)
        finally:
            hook.remove()

    refused("llava", case("llava")[0], r"are handed \['per_token'\], and it is not known", handed)


def test_a_prefix_that_is_not_told_is_refused():
    """Transformers attends causally or to everything then, depending on the implementation."""
    batch = {key: x for key, x in case("paligemma")[0].items() if key != "token_type_ids"}
    refused("paligemma", batch, "the layer says is_causal=False, its mask is causal")


def test_images_that_differ_between_ranks_are_refused():
    def loss(sp, batch):
        pixels = batch["pixel_values"] + sp.group.rank
        return sp.loss(batch | {"pixel_values": pixels})

    refused("gemma3_vl", case("gemma3_vl")[0], r"DesyncError: .*batch\['pixel_values'\]", loss)


@pytest.mark.parametrize(
    ("set_up", "message"),
    [
        (lambda m, g: SequenceParallel(m, seqpar.RingAttention(g)), "adds a loss over its routers"),
        (
            lambda m, g: replace_attention(m, tp=g),
            r"is made of \['text_config', 'vision_config'\]; repl",
        ),
    ],
)
def test_what_the_text_layers_do_or_are_is_refused(set_up, message):
    """A config of the text that adds a loss of each rank's rows; attention to be replaced inside."""

    def fn(group):
        model = copy.deepcopy(model_of("llava"))
        model.config.text_config.output_router_logits = "routers" in message
        return told(lambda: set_up(model, group))

    check_told(seqpar.simulate(2, fn), message)
