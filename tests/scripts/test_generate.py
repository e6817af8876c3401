"""`generate` continues a text greedily as one device does that recomputes everything, 64 tokens long."""

import json
import sys

import generate
import pytest
import torch
from byte_lm.loop import train
from byte_lm.recipe import Recipe

import seqpar
from seqpar import Group, simulate

TOKENS = 64
RECIPE = {"dim": 16, "heads": 4, "kv_heads": 4, "dtype": "float64", "seed": 3}
TEXT = torch.tensor([list(b"def attend(q, k, v):")])


def byte_lm(group, strategy, layout):
    model = generate.make(group, Recipe(**RECIPE, strategy=strategy))
    return generate.generate(group, model, TEXT, TOKENS, layout)


@torch.no_grad()
def byte_lm_of_one_device():
    model, ids = generate.make(Group.alone(), Recipe(**RECIPE)), TEXT
    for _ in range(TOKENS):
        positions = torch.arange(ids.shape[1])[None]
        logits = model.logits(ids, positions, seqpar.contiguous(ids.shape[1], 1))
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    return ids[:, TEXT.shape[1] :]


def test_the_byte_model(worlds):
    expected = byte_lm_of_one_device()
    assert len(expected.unique()) > 8
    for size, strategy, kind in (
        (1, "ring", "zigzag"), (2, "ulysses", "zigzag"), (3, "ring", "striped"), (4, "ring", "zigzag"),
        (5, "ulysses", "contiguous"),
    ):  # fmt: skip
        for tokens in simulate(size, byte_lm, strategy, kind):
            assert torch.equal(tokens, expected)
    for size in (2, 5):
        for tokens in worlds.run(size, byte_lm, "ring", "zigzag"):
            assert torch.equal(tokens, expected)


def test_an_empty_prompt_is_refused():
    def fn(group):
        generate.generate(group, generate.make(group, Recipe(**RECIPE)), TEXT[:, :0], 1)

    with pytest.raises(ValueError, match="at least one byte"):
        simulate(2, fn)


# One process: so it is.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_generate_continues_a_checkpoint(monkeypatch, tmp_path, capsys):
    text = torch.arange(500).mul(7919).remainder(251).to(torch.uint8)
    recipe = Recipe(length=40, batch=1, dim=16, layers=1, steps=2)
    group, path = seqpar.Group.alone(), tmp_path / "run"
    path.mkdir()
    train(group, recipe, text, checkpoint=path)
    options = [
        "--checkpoint",
        path,
        "--prompt",
        "abc",
        "--tokens",
        5,
        "--json",
        tmp_path / "x.json",
    ]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, options)])
    generate.main()
    found = json.loads((tmp_path / "x.json").read_text())
    assert len(found["bytes"]) == 5
    assert capsys.readouterr().out == "abc" + found["text"] + "\n"
    (path / "step-000002" / "run.json").write_text("no checkpoint")
    with pytest.raises(SystemExit, match=r"error: .* is no checkpoint of this script"):
        generate.main()
