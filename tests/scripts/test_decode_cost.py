"""The cost of decoding, small: bytes by the formula, and what fails."""

import json
import sys

import decode_cost


def test_counts_what_the_formula_says(monkeypatch, tmp_path):
    options = ["--lengths", 8, 33, "--ranks", 2, "--tokens", 2, "--rounds", 1]
    options += ["--heads", 4, 2, "--d", 8]
    path = tmp_path / "x.json"
    command = ["decode_cost.py", *map(str, options), "--json", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    decode_cost.main()
    rows = json.loads(path.read_text())["rows"]
    assert [(row["length"], row["ranks"]) for row in rows] == [
        (8, None),
        (8, 2),
        (33, None),
        (33, 2),
    ]
    assert [row["bytes"] for row in rows] == [0, 2 * 9 * 4 + 2 * 8 * 4] * 2


def test_bytes_that_grow_fail():
    rows = [{"ranks": 2, "length": n, "bytes": n, "counted_is_formula": n == 8} for n in (8, 16)]
    assert decode_cost.failures(rows) == [
        "P=2, N=16: counted bytes differ from the formula",
        "P=2: the bytes of a token depend on the length, [8, 16]",
    ]
