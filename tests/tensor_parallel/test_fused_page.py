"""docs/fused-qkv.md says what the code says, and its pictures show the rows."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from seqpar.tensor_parallel import FusedQKV, known_models
from seqpar.tensor_parallel.draw import draw_layout

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "fused-qkv.md").read_text("utf-8")


def test_the_table_is_the_one_of_the_code():
    rows = [
        f"| {row.name} | {', '.join(row.configs)} | `{row.weight}` | {row.kind} | {row.source} |"
        for row in known_models()
    ]
    assert rows == re.findall(r"^\| .* \| .*Config.* \| .* \| .* \| .* \|$", PAGE, re.MULTILINE)


def test_the_constructors_are_those_of_the_kinds():
    kinds = {row.kind for row in known_models()}
    shown = dict(re.findall(r"^\| ([a-z, ]+) \| q.* \| `(FusedQKV.*)` \|$", PAGE, re.MULTILINE))
    assert set(shown) == kinds
    for kind, code in shown.items():
        layout = eval(code, {"FusedQKV": FusedQKV, "n": 8, "kv": 2, "head_dim": 4})
        line = next(line for line in PAGE.splitlines() if line.startswith(f"| {kind} | q"))
        order, blocks, m_q, m_kv = line.split("|")[2].split(",")
        sizes = {"n": 8, "n/4": 2, "kv": 2, "n/kv": 4}
        number = lambda x, sizes=sizes: sizes.get(x.strip()) or int(x)  # noqa: E731
        assert (layout.order, layout.blocks) == (order.strip(), number(blocks))
        in_block = dict(zip(layout.order, layout.heads_per_block, strict=True))
        assert in_block == {"q": number(m_q), "k": number(m_kv), "v": number(m_kv)}


def test_the_script_draws_the_pictures_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fused_layouts.py", "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "scripts" / "draw" / "fused_layouts.py"), run_name="__main__")
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == set(re.findall(r"pictures/(fused-.*?\.svg)", PAGE))
    assert len(capsys.readouterr().out.splitlines()) == len(drawn)
    for name in drawn:
        kept = ROOT / "docs" / "pictures" / name
        assert kept.stat().st_size < 100_000
        words = [
            re.findall(r">([^<>\n]+)</text>", path.read_text("utf-8"))
            for path in (kept, tmp_path / name)
        ]
        assert words[0] == words[1]
        assert words[0]


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_a_picture_has_the_rows_in_order_and_every_shard(ranks):
    layout = FusedQKV(8, 4, 2, blocks=2, order="vqk")
    axes = draw_layout(layout, ranks, title="A title", models="A, B").axes[0]
    labels = [t for t in axes.findobj(Text) if re.fullmatch(r"[qkv]\d", t.get_text())]
    above = sorted(
        (t for t in labels if t.get_position()[1] > 3), key=lambda t: t.get_position()[0]
    )
    below = sorted(
        (t for t in labels if t.get_position()[1] < 1), key=lambda t: t.get_position()[0]
    )
    heads = [(c, j) for c in "qkv" for j in range(8 if c == "q" else 4)]
    want = sorted(heads, key=lambda cell: layout.index(*cell).start)
    assert [t.get_text() for t in above] == [f"{c}{j}" for c, j in want]
    dealt = layout.deal(ranks)
    assert [t.get_text() for t in below] == [
        f"{c}{j}"
        for rank in range(ranks)
        for c, a, b in layout.runs(dealt, rank)
        for j in range(a, b)
    ]
    hatched = [r for r in axes.findobj(Rectangle) if r.get_hatch()]
    ranks_of = [sum(a <= j < b for a, b in dealt.kv) for j in range(4)]
    assert len(hatched) == 2 * sum(n for n in ranks_of if n > 1)


def test_a_picture_of_more_ranks_than_heads_is_refused():
    with pytest.raises(ValueError, match="4 query heads can be dealt to"):
        draw_layout(FusedQKV.per_head(4, 1), 5, title="")
