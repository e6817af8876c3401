"""The scripts about decoding as their users start them, small."""

import json
import sys

import compare_decode
import generate
import pytest
import torch
import train_bytes

import seqpar


def start(monkeypatch, script, *options):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, options)])
    script.main()


@pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled:UserWarning"
)  # one process: so it is
def test_generate_continues_a_checkpoint(monkeypatch, tmp_path, capsys):
    text = torch.arange(500).mul(7919).remainder(251).to(torch.uint8)
    recipe = train_bytes.Recipe(length=40, batch=1, dim=16, layers=1, steps=2)
    group, path = seqpar.Group.alone(), tmp_path / "run"
    path.mkdir()
    train_bytes.train(group, recipe, text, checkpoint=path)
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
    start(monkeypatch, generate, *options)
    found = json.loads((tmp_path / "x.json").read_text())
    assert len(found["bytes"]) == 5
    assert capsys.readouterr().out == "abc" + found["text"] + "\n"
    (path / "step-000002" / "run.json").write_text("no checkpoint")
    with pytest.raises(SystemExit, match=r"error: .* is no checkpoint of this script"):
        start(monkeypatch, generate, *options)


def test_compare_decode_counts_what_the_formula_says(monkeypatch, tmp_path):
    options = [
        "--lengths",
        8,
        33,
        "--ranks",
        2,
        "--tokens",
        2,
        "--rounds",
        1,
        "--heads",
        4,
        2,
        "--d",
        8,
    ]
    start(monkeypatch, compare_decode, *options, "--json", tmp_path / "x.json")
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [(row["length"], row["ranks"]) for row in rows] == [
        (8, None),
        (8, 2),
        (33, None),
        (33, 2),
    ]
    assert [row["bytes"] for row in rows] == [0, 2 * 9 * 4 + 2 * 8 * 4] * 2


def test_bytes_that_grow_fail():
    rows = [{"ranks": 2, "length": n, "bytes": n, "counted_is_formula": n == 8} for n in (8, 16)]
    assert compare_decode.failures(rows) == [
        "P=2, N=16: counted bytes differ from the formula",
        "P=2: the bytes of a token depend on the length, [8, 16]",
    ]
