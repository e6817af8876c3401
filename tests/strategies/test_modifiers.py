"""Functions of each score, as FlexAttention takes them, in every strategy: equal to one device in float64.

What they hold learns: its gradient is a share on each rank, and the sum of these is that of one device.
"""

import sys
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import seqpar
from seqpar import Mask, Plan, Score, contiguous, simulate, striped, zigzag
from seqpar.strategies import STRATEGIES
from seqpar.testing.refusals import check_refused, refusal
from seqpar_kernels.terms.modifiers import captured

EXACT = {"rtol": 1e-11, "atol": 1e-11}
N, HEADS, KV_HEADS, WIDTH, BATCH = 19, 4, 2, 8, 2
LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}
RUNS = (1, "contiguous"), (2, "zigzag"), (3, "striped"), (4, "zigzag"), (7, "contiguous")


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def whole_bias():
    bias = rand(BATCH, HEADS, N, N, seed=1).requires_grad_()
    return (lambda s, b, h, i, j: s + bias[b, h, i, j]), [bias]


def relative_bias():
    """T5's: a table of buckets of relative positions for each head."""
    table = rand(HEADS, 9, seed=2).requires_grad_()
    return (lambda s, b, h, i, j: s + table[h, (j - i).clamp(-4, 4) + 4]), [table]


def bent():
    """Not linear in the score, and of two tensors, one of which no row of some head uses."""
    factors, shift = rand(HEADS, seed=3).requires_grad_(), rand(N, seed=4).requires_grad_()
    return (lambda s, b, h, i, j: torch.tanh(s * factors[h]) + shift[i] * (h > 0)), [factors, shift]


def signed_alibi():
    slopes = rand(BATCH, HEADS, seed=5)

    def modify(s, b, h, i, j, by):
        return s + by[b, h] * (j - i)

    return partial(modify, by=slopes), []


def from_a_module():
    """What a forward has computed, and a function that is a module."""
    module = Distance().double()
    return module, [module.scale]


class Distance(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.linspace(-1, 1, HEADS))

    def forward(self, s, _b, h, i, j):
        return s * 0.5 - self.scale[h] * (i - j).abs()


GLOBAL = rand(HEADS, seed=8).requires_grad_()


def helper(s, h):
    return s + GLOBAL[h]


def by_a_global_variable():
    return (lambda s, b, h, i, j: helper(s, h) * 0.5), [GLOBAL]


class Biased:
    """An object whose method is a `score_mod`, with a part that it does not name."""

    def __init__(self):
        self.tables = {"one": rand(HEADS, seed=9).requires_grad_()}
        self.other = torch.ones(3, requires_grad=True)

    def modify(self, s, _b, h, i, j):
        return s + self.tables["one"][h] * (i - j)


def by_a_method():
    biased = Biased()
    return biased.modify, [biased.tables["one"]]


def computed_before():
    """The gradient goes on into what has made the tensor."""
    weight = rand(HEADS, 3, seed=10).requires_grad_()
    table = torch.softmax(weight, 1)
    return (lambda s, b, h, i, j: s + table[h, (i - j).clamp(0, 2)]), [weight]


def without_scores():
    return (lambda s, b, h, i, j: torch.where(j < i, 0.5, -0.25).to(s.dtype)), []


SCORES = {
    f.__name__: f
    for f in (whole_bias, relative_bias, bent, signed_alibi, from_a_module, without_scores)
}
DOCUMENTS = torch.tensor([0] * 5 + [1] * 8 + [2] * 6)
HIDDEN = rand(BATCH, N, N, seed=6) > 0.3
SHOWN = {
    "none": Mask(),
    "dilated": Mask(mask_mod=lambda b, h, i, j: (i - j) % 3 == 0),
    "documents": Mask(True, mask_mod=lambda b, h, i, j: DOCUMENTS[i] == DOCUMENTS[j]),
    "heads": Mask(mask_mod=lambda b, h, i, j: (j <= i) | (h % 2 == 0)),
    "dense": Mask(window=9) & Mask(mask_mod=lambda b, h, i, j: HIDDEN[b, i, j]),
    "two": Mask(mask_mod=lambda b, h, i, j: j != 4)
    & Mask(True, mask_mod=lambda b, h, i, j: i != 7),
}
# NATTEN's neighbourhoods, written for one score at a time.
SHOWN["neighbourhood"] = Mask(mask_mod=lambda b, h, i, j: (j - i.clamp(2, N - 3)).abs() <= 2)


@cache
def seen(mask):
    """`[BATCH HEADS N N]`, asked one score at a time."""
    shown = torch.ones(BATCH, HEADS, N, N, dtype=torch.bool)
    i, j = torch.arange(N)[:, None], torch.arange(N)
    shown &= (j <= i) | (not mask.is_causal)
    if mask.regions is not None and not mask.is_causal:
        shown &= (i - j).abs() < 9
    for mod in mask.mods:
        each = [
            [[[bool(mod.value(*map(torch.tensor, (b, h, n, m)))) for m in range(N)] for n in range(N)]
             for h in range(HEADS)] for b in range(BATCH)
        ]  # fmt: skip
        shown &= torch.tensor(each)
    return shown


def problem():
    shapes = (N, HEADS), (N, KV_HEADS), (N, KV_HEADS), (N, HEADS)
    return [rand(BATCH, *s, WIDTH, seed=7 + n) for n, s in enumerate(shapes)]


def dense(make, shown):
    """(out, dq, dk, dv, gradients of what is held) by autograd."""
    q, k, v, dout = problem()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 2) for x in leaves[1:])
    s = torch.einsum("bihd,bjhd->bhij", q, k) * 0.3
    modify, held = make()
    place = torch.meshgrid(*(torch.arange(n) for n in s.shape), indexing="ij")
    s = modify(s, *place).masked_fill(~shown, -torch.inf)
    empty = ~shown.any(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(empty, 0.0), -1) * ~empty
    out = torch.einsum("bhij,bjhd->bihd", p, v)
    # Where scores count for nothing, nothing depends on q.
    leaves = [*leaves, *held]
    grads = torch.autograd.grad(out, leaves, dout, allow_unused=True)
    zeros = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))
    return out.detach(), *zeros


def check(group, strategy, kind, make, mask, expected):
    layout, (modify, held) = LAYOUTS[kind](N, group.size), make()
    degree = 2 if group.size % 2 == 0 else group.size
    grid = group.grid(ulysses=degree) if STRATEGIES[strategy].needs_grid else None
    plan = Plan(group, layout, mask, Score(0.3, score_mod=modify), strategy=strategy, grid=grid)
    mine = layout.positions(group.rank)
    *leaves, dout = (x[:, mine] for x in problem())
    out = seqpar.attention(*(x.requires_grad_() for x in leaves), plan)
    found = torch.autograd.grad(out, [*leaves, *held], dout, allow_unused=True)
    for got, want in zip((out, *found[:3]), expected, strict=False):
        torch.testing.assert_close(got, want[:, mine], **EXACT)
    for got, want in zip(found[3:], expected[4:], strict=True):
        summed = group.transport.gather_objects(got)
        torch.testing.assert_close(sum(summed), want, **EXACT)


def in_turn(name, strategy, names):
    """Two of the runs, so that over the strategies each function has all of them."""
    n = list(names).index(name) + list(STRATEGIES).index(strategy)
    return [RUNS[n % len(RUNS)], RUNS[(n + 2) % len(RUNS)]]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SCORES)
def test_scores_that_a_function_changes_equal_one_device(strategy, name):
    mask = Mask(causal=name != "whole_bias")
    expected = dense(SCORES[name], seen(mask))
    for size, kind in in_turn(name, strategy, SCORES):
        simulate(size, check, strategy, kind, SCORES[name], mask, expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SHOWN)
def test_scores_that_a_function_hides_equal_one_device(strategy, name):
    expected = dense(relative_bias, seen(SHOWN[name]))
    for size, kind in in_turn(name, strategy, SHOWN):
        simulate(size, check, strategy, kind, relative_bias, SHOWN[name], expected)


def poisoned(group, strategy, name, at):
    mask = SHOWN["heads"]
    layout = zigzag(N, group.size)
    grid = group.grid(ulysses=group.size) if STRATEGIES[strategy].needs_grid else None
    plan = Plan(group, layout, mask, Score(0.3), strategy=strategy, grid=grid)
    mine, tensors = layout.positions(group.rank), dict(zip("qkvd", problem(), strict=True))
    tensors[name][0, at] = torch.nan
    q, k, v, dout = (x[:, mine] for x in tensors.values())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = seqpar.attention(*leaves, plan)
    return out, *torch.autograd.grad(out, leaves, dout), mine


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_not_finite_stays_where_a_function_shows_it(strategy):
    shown = seen(SHOWN["heads"])
    for out, *_, mine in simulate(2, poisoned, strategy, "v", 9):
        assert torch.equal(out.isnan().all(-1)[0], shown[0, :, mine, 9].T)
        assert not out[1].isnan().any()
    for _, _, dk, _, mine in simulate(2, poisoned, strategy, "q", 4):
        reached = shown[0, :, 4][:, mine].T.unflatten(1, (KV_HEADS, -1)).any(2)
        assert torch.equal(dk.isnan().all(-1)[0], reached)


STORED = [name for name, strategy in STRATEGIES.items() if strategy.stores_scores]
KERNEL_STRATEGIES = [name for name, strategy in STRATEGIES.items() if not strategy.stores_scores]


def gradients(group, strategy, plans):
    """Of q, k and v, through calls with some plans, differentiated together."""
    layout = zigzag(N, group.size)
    mine = layout.positions(group.rank)
    *leaves, dout = (x[:, mine] for x in problem())
    leaves = [x.requires_grad_() for x in leaves]
    grid = group.grid(ulysses=group.size) if STRATEGIES[strategy].needs_grid else None
    made = [Plan(group, layout, m, s, strategy=strategy, grid=grid) for m, s in plans()]
    out = sum(seqpar.attention(*leaves, plan) for plan in made)
    return torch.autograd.grad(out, leaves, dout)


def late():
    for width in (2, 5):
        shown = Mask(mask_mod=lambda b, h, i, j: (i - j).abs() < width)  # noqa: B023 - what is tried
        modify = lambda s, b, h, i, j: s * width + helper(s, h) * GLOBAL_WIDTH  # noqa: B023, E731
        yield shown, Score(0.3, score_mod=modify)


def early():
    def plan_of(width):
        shown = Mask(mask_mod=lambda b, h, i, j: (i - j).abs() < width)
        return shown, Score(0.3, score_mod=lambda s, b, h, i, j: s * width + helper(s, h) * 2.0)

    return map(plan_of, (2, 5))


GLOBAL_WIDTH = 2.0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_variables_are_what_they_were_when_the_function_was_given(strategy):
    """Of a loop they are others in its next turn, before backward asks."""
    want = simulate(2, gradients, strategy, early)
    for got, same in zip(simulate(2, gradients, strategy, late), want, strict=True):
        for x, y in zip(got, same, strict=True):
            torch.testing.assert_close(x, y, **EXACT)


def written(group, strategy, change):
    layout, table = zigzag(N, group.size), {"table": rand(HEADS, seed=12)}
    *leaves, _ = (x[:, layout.positions(group.rank)] for x in problem())
    score = Score(0.3, score_mod=lambda s, b, h, i, j: s + table["table"][h])
    out = seqpar.attention(
        *(x.requires_grad_() for x in leaves), Plan(group, layout, score=score, strategy=strategy)
    )
    change(table)
    out.sum().backward()


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "allgather", *STORED])
def test_what_is_written_before_backward_is_an_error(strategy):
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        simulate(2, written, strategy, lambda table: table["table"].zero_())
    with pytest.raises(RuntimeError, match="uses other tensors in backward"):
        simulate(2, written, strategy, lambda table: table.update(table=torch.zeros(HEADS)))


def with_slopes(group, strategy, expected):
    slopes = torch.linspace(0.5, 0.1, HEADS, dtype=torch.float64).requires_grad_()
    layout = zigzag(N, group.size)
    mine = layout.positions(group.rank)
    grid = group.grid(ulysses=group.size) if STRATEGIES[strategy].needs_grid else None
    score = Score(0.3, alibi_slopes=slopes, score_mod=lambda s, b, h, i, j: torch.tanh(s) * 3)
    plan = Plan(
        group,
        layout,
        Mask(True),
        score,
        strategy=strategy,
        grid=grid,
        invariant=False if strategy == "ulysses" else None,
    )
    *leaves, dout = (x[:, mine] for x in problem())
    out = seqpar.attention(*leaves, plan)
    (grad,) = torch.autograd.grad(out, slopes, dout)
    torch.testing.assert_close(sum(group.transport.gather_objects(grad)), expected, **EXACT)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_slopes_beside_a_function_learn(strategy):
    q, k, v, dout = problem()
    slopes = torch.linspace(0.5, 0.1, HEADS, dtype=torch.float64).requires_grad_()
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 2) for x in (k, v))
    s = torch.tanh(torch.einsum("bihd,bjhd->bhij", q, k) * 0.3) * 3
    i, j = torch.arange(N)[:, None], torch.arange(N)
    s = s - slopes[:, None, None] * (i - j).abs()
    p = torch.softmax(s.masked_fill(j > i, -torch.inf), -1)
    (want,) = torch.autograd.grad(torch.einsum("bhij,bjhd->bihd", p, v), slopes, dout)
    simulate(3, with_slopes, strategy, want)


def no_rows(group, strategy):
    layout = contiguous(2, group.size)
    rows = layout.rows[group.rank]
    x = torch.ones(1, rows, 2, WIDTH, dtype=torch.float64, requires_grad=True)
    grid = group.grid(ulysses=group.size) if STRATEGIES[strategy].needs_grid else None
    mask, score = Mask(mask_mod=lambda b, h, i, j: j <= i), Score(score_mod=relative_bias()[0])
    plan = Plan(group, layout, mask, score, strategy=strategy, grid=grid)
    out = seqpar.attention(x, x, x, plan)
    out.sum().backward()
    return bool(x.grad.isfinite().all())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_without_rows_are_asked_nothing(strategy):
    assert simulate(3, no_rows, strategy) == [True] * 3


def endless_where_hidden(group, strategy):
    layout = zigzag(N, group.size)
    *leaves, dout = (x[:, layout.positions(group.rank)] for x in problem())
    score = Score(0.3, score_mod=lambda s, b, h, i, j: s * torch.log1p((i - j).double()))
    out = seqpar.attention(
        *(x.requires_grad_() for x in leaves),
        Plan(group, layout, Mask(True), score, strategy=strategy),
    )
    return all(bool(x.isfinite().all()) for x in torch.autograd.grad(out, leaves, dout))


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "materialised_rows"])
def test_slopes_that_are_not_finite_where_scores_are_hidden_stay_there(strategy):
    assert simulate(2, endless_where_hidden, strategy) == [True] * 2


def kept_by_a_checkpoint(group, strategy):
    layout, (modify, held) = zigzag(N, group.size), bent()
    *leaves, dout = (x[:, layout.positions(group.rank)] for x in problem())
    plan = Plan(group, layout, Mask(True), Score(0.3, score_mod=modify), strategy=strategy)
    leaves = [x.requires_grad_() for x in leaves]

    def run(q, k, v):
        return seqpar.attention(q * 1.0, k, v, plan)

    want = torch.autograd.grad(run(*leaves), [*leaves, *held], dout)
    for options in ({}, {"context_fn": seqpar.keep_attention}):
        out = checkpoint(run, *leaves, use_reentrant=False, **options)
        for x, y in zip(torch.autograd.grad(out, [*leaves, *held], dout), want, strict=True):
            torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "materialised_rows"])
def test_checkpoints_around_functions(strategy):
    simulate(2, kept_by_a_checkpoint, strategy)


def made_of_another(group):
    one = torch.ones(4, requires_grad=True)
    other = one * 2
    return call(group, score_mod=lambda s, b, h, i, j: s + (one + other)[h])


def test_what_is_made_of_what_is_held_is_refused():
    with pytest.raises(ValueError, match="whose gradient would count twice"):
        simulate(2, made_of_another)


def test_the_parts_of_a_module_are_found():
    """Its methods are new objects whenever they are looked at."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(3)))
    assert {id(x) for x in captured(layers)} <= {id(x) for x in layers.parameters()}
    three = Three()
    assert {id(x) for x in captured(three)} == {id(x) for x in three.parameters()}


class Three(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (torch.nn.Linear(1, 1) for _ in range(3))

    def forward(self, s, _b, _h, i, j):
        x = (i - j).reshape(1).to(s.dtype)
        return s + self.three(self.two(self.one(x)))[0]


def call(group, score_mod=None, mask_mod=None, **options):
    layout = zigzag(N, group.size)
    x = torch.ones(1, layout.rows[group.rank], 2, WIDTH)
    mask = Mask(mask_mod=mask_mod) if mask_mod is not None else Mask()
    plan = Plan(group, layout, mask, Score(score_mod=score_mod), **options)
    return seqpar.attention(x, x, x, plan)


ELSEWHERE = torch.zeros(3, device="meta")
ADDS, OTHER = torch.zeros(3), torch.zeros(4, requires_grad=True)


def looks(s, _b, _h, i, j):
    return s if i > j else -s


def unseen(s, _b, h, _i, _j):
    return s + vars(sys.modules[__name__])["GLOB" + "AL"].to(s.dtype)[h]


WRONG = {
    "what learns is not found": (
        {"score_mod": unseen}, r"uses a tensor \(4,\) that learns, which was not found in it"
    ),
    "it looks at values": ({"score_mod": looks}, "at whose values it does not look; at first and last"),
    "a mask that looks": (
        {"mask_mod": lambda b, h, i, j: bool(i > j)}, "mask_mod must be a function of batch"
    ),
    "it raises": ({"score_mod": lambda s, b, h, i: s}, "score_mod must be a function of score, batch"),
    "a table that is too short": (
        {"score_mod": lambda s, b, h, i, j: s + ADDS[i]}, "at first and last positions it raised IndexError",
    ),
    "no score": (
        {"score_mod": lambda s, b, h, i, j: i}, "must give a floating point scalar .* got torch.int64"
    ),
    "no boolean": ({"mask_mod": lambda b, h, i, j: i - j}, "must give a boolean scalar .*got torch.int64"),
    "elsewhere": (
        {"score_mod": lambda s, b, h, i, j, by=ELSEWHERE: s + by[0]},
        "what a score_mod holds must be on cpu, as q is, got .*meta",
    ),
    "another function": (
        {"score_mod": lambda s, b, h, i, j: s * 2.0}, "score_mod is None on ranks 0, 2, .* on rank 1"
    ),
    "another mask": (
        {"mask_mod": lambda b, h, i, j: j > 2}, r"mask is Mask\(\) on ranks 0, 2, Mask\(mask_mod="
    ),
    "an implementation that knows none": (
        {"score_mod": lambda s, b, h, i, j: s, "implementation": "aten"},
        "'aten' has no score_mod; 'reference' does all",
    ),
    "another that knows none": (
        {"mask_mod": lambda b, h, i, j: i >= j, "implementation": "aten"},
        "'aten' has no mask_mod; 'reference' does all",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_functions_that_cannot_be_all_refuse(what):
    change, pattern = WRONG[what]
    check_refused(simulate(3, refusal, call, change, 1), pattern)


def differ(group):
    """Ranks that hold a tensor of another shape, or one that learns."""
    held = ADDS if group.rank else OTHER
    return call(group, score_mod=lambda s, b, h, i, j: s + held[0])


def numbers(group):
    factor = 2.0 + group.rank
    return call(group, score_mod=lambda s, b, h, i, j: s * factor)


def test_functions_of_other_numbers_are_told_apart():
    with pytest.raises(
        seqpar.DesyncError, match=r"score_mod is .*2\.0.* on rank 0, .*3\.0.* on rank 1"
    ):
        simulate(2, numbers)


def test_functions_that_hold_other_tensors_are_told_apart():
    with pytest.raises(
        seqpar.DesyncError, match=r"score_mod is .*\(4,\) torch.float32.* on rank 0"
    ):
        simulate(2, differ)


def learns(group):
    table = torch.zeros(3, requires_grad=True)
    return call(
        group, score_mod=lambda s, b, h, i, j: s + table[0], strategy="ulysses", invariant=True
    )


def test_what_learns_has_no_invariant_bits():
    with pytest.raises(NotImplementedError, match="whose order depends on the number of ranks"):
        simulate(2, learns)


def test_functions_are_no_part_of_a_graph():
    plan = Plan(seqpar.Group.alone(), contiguous(4, 1), score=Score(score_mod=without_scores()[0]))
    x = torch.ones(1, 4, 1, 8)
    with pytest.raises(Exception, match="an op takes no functions"):
        torch.compile(lambda x: seqpar.attention(x, x, x, plan), backend="eager", fullgraph=True)(x)


def test_a_mask_mod_joins_by_and_alone():
    mask = Mask(causal=True) & Mask(mask_mod=lambda b, h, i, j: j != 1)
    assert mask.draw(3) == "x..\nx..\nx.x"
    assert mask.is_causal
    assert replace(mask) == mask
    with pytest.raises(ValueError, match="by & alone"):
        mask | Mask()
    with pytest.raises(ValueError, match="by & alone"):
        Mask() | mask
    with pytest.raises(TypeError, match="mask_mod must be a function or None, got 3"):
        Mask(mask_mod=3)
    with pytest.raises(TypeError, match="score_mod must be a function or None, got 3"):
        Score(score_mod=3)
