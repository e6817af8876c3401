"""What one rank would refuse, every rank refuses, with a message to act on, and nobody hangs.

After the refusal the same world does a correct call, so nothing was left on the wire.
"""

import inspect

import pytest
import torch

import seqpar
from seqpar import (
    AllGatherAttention,
    Dropout,
    Group,
    HybridAttention,
    Mask,
    MaterialisedAttention,
    MeshAttention,
    RingAttention,
    Score,
    UlyssesAttention,
    masks,
    simulate,
)
from seqpar.layout import Layout, Span, contiguous, striped, zigzag
from seqpar.module import Options
from seqpar.testing.refusals import check_refused, check_told, refusal, told

LENGTH = 12


def call(group, **change):
    """One attention call in which this rank does something else than the others would."""
    layout = change.get("layout", zigzag(LENGTH, group.size))
    rows = change.get("rows", zigzag(LENGTH, group.size).rows[group.rank])
    dtype = change.get("dtype", torch.float32)
    batch, heads = change.get("batch", 2), change.get("heads", (4, 2))
    q = torch.ones(batch, rows, heads[0], 8, dtype=dtype)
    k = torch.ones(batch, rows, heads[1], 8, dtype=dtype)
    v = change.get("v", torch.ones(batch, rows, heads[1], 8, dtype=dtype))
    q, k = change.get("q", q), change.get("k", k)
    module = change.get("module", RingAttention)
    over = group
    if module in (MeshAttention, HybridAttention):
        over = group.grid(ulysses=change.get("ulysses", 1))
    attend = module(
        over,
        mask=change.get("mask", Mask(causal=True)),
        score=change.get("score", Score()),
        implementation=change.get("implementation"),
        dropout=change.get("dropout"),
        invariant=change.get("invariant"),
    )
    for name in ("head_chunks", "grid"):
        if name in change:
            setattr(attend, name, change[name])
    return attend(q, k, v, layout, kv_layout=change.get("kv_layout"))


ONE_RANK = {  # what rank 1 alone does -> what every message must say
    "rows": ({"rows": 5}, r"rank 1 of 3 must hold 4 of the 12 positions"),
    "layout for another P": (
        {"layout": zigzag(LENGTH, 4)},
        r"for the 3 ranks of the group",
    ),
    "mask": ({"mask": Mask()}, r"mask is .* on ranks 0, 2, .* on rank 1"),
    "window": ({"mask": Mask(causal=True, window=3)}, r"window=3.* on rank 1"),
    "dtype": ({"dtype": torch.bfloat16}, r"dtype is .*bfloat16 on rank 1"),
    "heads": ({"heads": (6, 2)}, r"heads .*\(6, 2\) on rank 1"),
    "batch": ({"batch": 1}, r"batch is 2 on ranks 0, 2, 1 on rank 1"),
    "layout kind": ({"layout": contiguous(LENGTH, 3)}, r"contiguous.* on rank 1"),
    "own layout": (
        {"layout": Layout("zigzag", 12, 3, tuple((Span(8 - 4 * r, 4),) for r in range(3)))},
        r"spans of layout is .* on ranks 0, 2, .* on rank 1",
    ),
    "length": ({"layout": zigzag(13, 3)}, r"must hold|length=13"),
    "strategy": (
        {"module": UlyssesAttention},
        r"strategy is 'ring' on ranks 0, 2, 'ulysses'",
    ),
    "scale": ({"score": Score(0.5)}, r"scale is .*0.5 on rank 1"),
    "softcap": ({"score": Score(softcap=5.0)}, r"softcap is None on ranks 0, 2, 5.0 on rank 1"),
    "sinks": (
        {"score": Score(sinks=torch.zeros(4))},
        r"sinks is None on ranks 0, 2, torch.float32 on rank 1",
    ),
    "sinks of other heads": (
        {"score": Score(sinks=torch.zeros(2))},
        r"sinks must have one entry for each of the 4 query heads, got \(2,\)",
    ),
    "a bias for other keys": (
        {"score": Score(bias=torch.zeros(12, 11))},
        r"bias must broadcast to \[b hq i j\] = \[2, 4, 12, 12\], got \(12, 11\)",
    ),
    "a bias that hides": (
        {"score": Score(bias=torch.full((12,), -torch.inf))},
        r"bias must be finite: to hide scores is for a mask, see seqpar.masks.dense",
    ),
    "a bias that hides in the type of scores": (
        {"score": Score(bias=torch.full((12,), -1e300, dtype=torch.float64))},
        r"bias must be finite: to hide scores is for a mask",
    ),
    "a relative bias of other heads": (
        {"score": Score(relative_bias=torch.zeros(3, 5))},
        r"relative_bias must broadcast to \[b hq 2\*reach\+1\] = \[2, 4, 5\], got \(3, 5\)",
    ),
    "a bias of one rank": (
        {"score": Score(bias=torch.zeros(12, 1))},
        r"bias is None on ranks 0, 2, \(torch.float32, \(12, 1\)\) on rank 1",
    ),
    "dropout": ({"dropout": Dropout(0.1, 3)}, r"dropout is None on ranks 0, 2, Dropout\(p=0.1"),
    "dropout not a dropout": (
        {"dropout": 0.1},
        r"dropout must be a seqpar.Dropout or None, got 0.1",
    ),
    "what the implementation lacks": (
        {"implementation": "aten", "score": Score(softcap=5.0)},
        r"implementation 'aten' has no softcap; 'reference' does all that was asked",
    ),
    "dropout that the implementation lacks": (
        {"implementation": "aten", "dropout": Dropout(0.1, 3)},
        r"implementation 'aten' cannot drop weights .*'reference' does all that was asked",
    ),
    "documents": (
        {"mask": Mask(causal=True, documents=(0, 5, 12))},
        r"mask is Mask\(causal=True\) on ranks 0, 2, .*documents=\(0, 5, 12\).* on rank 1",
    ),
    "documents of another length": (
        {"mask": Mask(causal=True, documents=(0, 5, 11))},
        r"documents must end where the sequence does, at 12, got 11; seqpar\.padded_documents",
    ),
    "joined documents of another length": (
        {"mask": Mask(causal=True) | Mask(documents=(0, 5, 11))},
        r"documents must end where the sequence does, at 12, got 11",
    ),
    "documents of keys of another length": (
        {"mask": Mask(documents=((0, 5, 12), (0, 5, 13)))},
        r"documents must end where the keys do, at 12, got 13",
    ),
    "joined masks": (
        {"mask": masks.prefix_lm(3)},
        r"mask is Mask\(causal=True\) on ranks 0, 2, Mask\(regions=.* on rank 1",
    ),
    "masks of another batch": (
        {"mask": [Mask(causal=True)] * 3},
        r"a mask for each of the 2 batch entries, got 3",
    ),
    "masks of a batch": (
        {"mask": [Mask(causal=True), masks.keys(0, 5)]},
        r"mask is Mask\(causal=True\) on ranks 0, 2, \(Mask.* on rank 1",
    ),
    "no mask of a batch": ({"mask": ()}, r"a mask for each batch entry, got none"),
    "a mask that is none": (
        {"mask": [Mask(causal=True), None]},
        r"mask must be a seqpar.Mask, got None",
    ),
    "masks of a batch that stand differently": (
        {
            "mask": [Mask(causal=True, align=align) for align in ("top-left", "bottom-right")],
            "kv_layout": zigzag(11, 3),
        },
        r"must be aligned alike, got \['bottom-right', 'top-left'\]|must hold",
    ),
    "ALiBi over documents of two sequences": (
        {
            "mask": Mask(documents=((0, 5, 12), (0, 4, 12))),
            "score": Score(alibi_slopes=torch.zeros(4)),
        },
        r"ALiBi, a relative bias and a score_mod count positions of the whole sequence",
    ),
    "invariant bits of several layers": (
        {"module": AllGatherAttention, "invariant": True, "mask": masks.shared_prompt(4, [4, 4])},
        r"only with a mask of one layer, got 2|multiples of",
    ),
    "kv_layout": (
        {"kv_layout": contiguous(LENGTH, 3)},
        r"kv_layout is None on ranks 0, 2, Layout.kind='contiguous'.* on rank 1",
    ),
    "kv_layout of another length": (
        {"kv_layout": zigzag(20, 3)},
        r"rank 1 of 3 must hold 7 of the 20 positions .*got k \(2, 4, 2, 8\)",
    ),
    "kv_layout in other steps": (
        {"kv_layout": striped(LENGTH, 3)},
        r"same steps: both striped, or neither; got zigzag and striped",
    ),
    "kv_layout not a layout": ({"kv_layout": 12}, r"kv_layout must be a seqpar.Layout, got 12"),
    "documents of queries and keys": (
        {"mask": Mask(documents=(0, 12)), "kv_layout": zigzag(20, 3)},
        r"queries and keys have another length, 12 and 20: give boundaries of both",
    ),
    "invariant": (
        {"module": UlyssesAttention, "invariant": False},
        r"ranks disagree|strategy is",
    ),
    "a zigzag ring of invariant bits": (
        {"invariant": True},
        r"only with a causal mask, a contiguous layout .* got causal=True, zigzag",
    ),
    "invariant not a bool": ({"invariant": 1}, r"invariant must be a bool or None, got 1"),
    "head_chunks of a ring": (
        {"head_chunks": 2},
        r"head_chunks is for \('ulysses', 'hybrid'\), which exchange heads; got 2 for 'ring'",
    ),
    "a grid for a ring": (
        {"grid": Group.alone().grid(ulysses=1)},
        r"a grid is for \('mesh', 'hybrid'\), got one for 'ring'",
    ),
    "grid": (
        {"module": MeshAttention, "ulysses": 3},
        r"strategy is 'ring' on ranks 0, 2, 'mesh' on rank 1",
    ),
    "no GPU": (
        {"implementation": "flash_attn"},
        r"implementation 'flash_attn' does not run on cpu; 'aten' does all",
    ),
    "implementation": (
        {"implementation": "reference"},
        r"implementation .*'reference' on",
    ),
    "q not a tensor": ({"q": None}, r"q must be a tensor, got NoneType"),
    "slopes that learn": (
        {"score": Score(alibi_slopes=torch.zeros(4, requires_grad=True))},
        r"alibi_slopes learn is False on ranks 0, 2, True on rank 1",
    ),
    "sinks that learn": (
        {"score": Score(sinks=torch.zeros(4, requires_grad=True))},
        r"sinks learn is False on ranks 0, 2, True on rank 1",
    ),
    "requires_grad": (
        {"v": torch.ones(2, 4, 2, 8, requires_grad=True)},
        r"requires_grad is False on ranks 0, 2, True on rank 1",
    ),
}
ALL_RANKS = {  # what every rank does -> what every message must say
    "q of another dtype": ({"q": torch.ones(2, 4, 4, 8).half()}, "one dtype, got q torch.float16"),
    "v on another device": (
        {"v": torch.ones(2, 4, 2, 8, device="meta")},
        "one device, got .*v meta",
    ),
    "v of another batch": ({"v": torch.ones(1, 4, 2, 8)}, "one batch size"),
    "v of other heads": ({"v": torch.ones(2, 4, 4, 8)}, "k and v must have the same heads"),
    "heads not a multiple": ({"heads": (3, 2)}, "multiple of kv heads"),
    "no kv heads": ({"heads": (3, 0)}, "multiple of kv heads"),
    "other widths": ({"q": torch.ones(2, 4, 4, 6)}, "one width"),
    "3-D": ({"q": torch.ones(2, 4, 8)}, r"q must be 4-D, \[b sl h d\], got \(2, 4, 8\)"),
    "integers": ({"dtype": torch.int64}, "floating point, got torch.int64"),
    "float8": ({"dtype": torch.float8_e4m3fn}, "float8"),
    "layout not a layout": ({"layout": 12}, "layout must be a seqpar.Layout, got 12"),
    "the name of a layout": (
        {"layout": "zigzag"},
        r"layout must be a seqpar.Layout, got 'zigzag'; make one with seqpar.zigzag\(length, group.size\)",
    ),
    "a score that is none": ({"score": 3}, "score must be a seqpar.Score, got 3"),
    "slopes of other heads": (
        {"score": Score(alibi_slopes=torch.ones(3))},
        r"alibi_slopes must have one entry for each of the 4 query heads",
    ),
    "sinks elsewhere": (
        {"score": Score(sinks=torch.ones(4, device="meta"))},
        "sinks must be on the device of q, cpu, got meta",
    ),
    "a mesh without a grid": (
        {"module": MeshAttention, "grid": None},
        r"strategy 'mesh' takes a seqpar.Grid, got None; make one with group.grid\(ulysses",
    ),
    "a grid of other ranks": (
        {"module": HybridAttention, "grid": Group.alone().grid(ulysses=1)},
        r"the grid must be of the group of the plan, Group\(rank=., size=3\), got Grid\(ring=1, ulysses=1",
    ),
    "stored scores by a kernel that stores none": (
        {"module": MaterialisedAttention, "implementation": "aten"},
        r"stored scores .*got implementation 'aten'",
    ),
    "unknown implementation": ({"implementation": "cuda"}, "cuda"),
    "layout for another P": ({"layout": striped(LENGTH, 2)}, r"seqpar.striped\(12, group.size\)"),
}


@pytest.mark.parametrize("what", ONE_RANK)
def test_what_one_rank_does_wrong_all_refuse(what):
    change, pattern = ONE_RANK[what]
    check_refused(simulate(3, refusal, call, change, 1), pattern)


@pytest.mark.parametrize("what", ALL_RANKS)
def test_what_all_do_wrong_all_refuse(what):
    change, pattern = ALL_RANKS[what]
    check_refused(simulate(3, refusal, call, change), pattern)


@pytest.mark.parametrize("what", ONE_RANK)
def test_what_one_process_does_wrong_all_refuse(worlds, what):
    change, pattern = ONE_RANK[what]
    check_refused(worlds.run(3, refusal, call, change, 1, timeout=20), pattern)


def other_operation(group):
    if group.rank == 1:
        x, layout = torch.ones(1, 4, 2), zigzag(LENGTH, 3)
        return told(lambda: seqpar.unshard_sequence(x, layout, group))
    return told(lambda: call(group))


def test_ranks_in_different_operations_are_told(worlds):
    pattern = "operation is 'attention' on ranks 0, 2, 'unshard_sequence' on rank 1"
    check_told(simulate(3, other_operation), pattern)
    check_told(worlds.run(3, other_operation, timeout=20), pattern)
    for text in simulate(3, other_operation):
        assert text.count(" is ") == 1, "all else differs too, and says nothing"


def test_a_plan_of_the_wrong_kind_is_refused():
    x = torch.ones(1, 2, 1, 4)
    with pytest.raises(TypeError, match=r"seqpar\.Plan"):
        seqpar.attention(x, x, x, None)
    with pytest.raises(ValueError, match="strategy must be one of"):
        seqpar.attention(x, x, x, seqpar.Plan(seqpar.Group.alone(), zigzag(2, 1), strategy="rings"))


@pytest.mark.parametrize(
    ("degrees", "error"),
    [
        ({"ulysses": 2}, "must multiply to the 3 ranks of the group, got ulysses=2 ring=1"),
        ({"ulysses": 3, "ring": 2}, "got ulysses=3 ring=2"),
        ({"ulysses": 0}, "got ulysses=0"),
        ({}, "needs ulysses=, ring= or both"),
        ({"ulysses": 1.5}, "must be an integer, got 1.5"),
    ],
)
def test_grids_that_do_not_fit_are_refused(degrees, error):
    with pytest.raises((ValueError, TypeError), match=error):
        simulate(3, lambda group: group.grid(**degrees))


def test_modules_take_what_they_are_made_for():
    with pytest.raises(
        TypeError, match=r"a seqpar.Grid, such as group.grid\(ulysses=2\), or a 2-D"
    ):
        MeshAttention(Group.alone())
    with pytest.raises(ValueError, match=r"shard must be one of \('rows', 'columns', 'depth'\)"):
        MaterialisedAttention(Group.alone(), shard="heads")


@pytest.mark.parametrize(
    "module", [RingAttention, UlyssesAttention, MeshAttention, HybridAttention]
)
def test_options_that_there_are_not_are_refused_where_a_module_is_made(module):
    over = Group.alone()
    over = over.grid(ulysses=1) if module in (MeshAttention, HybridAttention) else over
    with pytest.raises(TypeError, match="unexpected keyword argument 'bogus'"):
        module(over, bogus=3)


def test_the_options_of_modules_are_said_as_attention_has_them():
    """What type checkers know of a module's options, and what it takes, are two lists."""
    takes = inspect.signature(seqpar.Attention.__init__).parameters.values()
    takes = {p.name: p.annotation for p in takes if p.kind is p.KEYWORD_ONLY}
    assert Options.__annotations__.keys() == takes.keys()
    for name, annotation in Options.__annotations__.items():
        assert annotation.__forward_arg__ == takes[name], name


def other_grid(group):
    """Ranks that arrange themselves differently."""
    rows = zigzag(LENGTH, 4).rows[group.rank]
    x = torch.ones(1, rows, 2, 4)
    grid = group.grid(ulysses=4 if group.rank == 1 else 2)
    return told(lambda: HybridAttention(grid)(x, x, x, zigzag(LENGTH, 4)))


def test_ranks_in_different_grids_are_told(worlds):
    pattern = r"grid is \(\(0, 1\), \(2, 3\)\) on ranks 0, 2, 3, \(\(0, 1, 2, 3\),\) on rank 1"
    check_told(simulate(4, other_grid), pattern)
    check_told(worlds.run(4, other_grid, timeout=20), pattern)


def test_weights_and_attention_are_different_operations():
    def fn(group):
        layout = zigzag(LENGTH, 2)
        x = torch.ones(1, layout.rows[group.rank], 2, 4)
        attend = MaterialisedAttention(group)
        if group.rank:
            return told(lambda: attend.weights(x, x, layout))
        return told(lambda: attend(x, x, x, layout))

    check_told(simulate(2, fn), "operation is 'attention' on rank 0, 'weights' on rank 1")


def test_a_grid_of_another_group_is_refused():
    def fn(group):
        turned = seqpar.Grid(group, ((1, 2, 0),)).ulysses  # the same ranks, in another order
        layout = contiguous(LENGTH, 3)
        x = torch.ones(1, 4, 2, 4)
        plan = seqpar.Plan(group, layout, strategy="hybrid", grid=turned.grid(ulysses=3))
        return told(lambda: seqpar.attention(x, x, x, plan))

    check_told(simulate(3, fn), "the grid must be of the group of the plan")
