"""Training that depends on the recipe and the text, and on nothing about the ranks."""

import json
import math

import pytest
import torch
from byte_lm.loop import train
from byte_lm.recipe import Recipe
from byte_lm.records import MetricsFile, StepRecord

import seqpar

TEXT = torch.arange(4000).mul(7919).remainder(251).to(torch.uint8)
SMALL = {"length": 61, "batch": 2, "dim": 32, "heads": 4, "kv_heads": 2, "layers": 2}
SMALL |= {"steps": 5, "warmup": 2}
# One rank writes replicated parameters by itself, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def losses(size, **options):
    recipe = Recipe(**(SMALL | options))
    return seqpar.simulate(size, train, recipe, TEXT)


@pytest.fixture(scope="module")
def one_device():
    """The losses of one rank with nothing special, by batch size."""
    return {batch: losses(1, batch=batch)[0] for batch in (2, 4)}


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (3, {"strategy": "ring", "layout": "striped", "loss_tile": 7}),
        (5, {"strategy": "ulysses", "layout": "contiguous", "checkpointing": "full"}),
        (2, {"strategy": "allgather", "loss_tile": 100, "mlp_tile": 9, "checkpointing": "full"}),
        (2, {"checkpointing": "keep-attention", "saved_on": "host"}),
        (4, {"strategy": "mesh", "layout": "striped"}),
        (4, {"strategy": "hybrid", "dp": 2, "ulysses": 2}),
        (4, {"strategy": "ring", "dp": 2, "accumulate": 2, "batch": 4}),
    ],
)
def test_losses_do_not_depend_on_the_ranks(one_device, size, options):
    one = torch.tensor(one_device[options.get("batch", 2)], dtype=torch.float64)
    for got in losses(size, **options):
        relative = (torch.tensor(got, dtype=torch.float64) - one).abs() / one
        assert relative.max() < 1e-6
    assert one[-1] < one[0]


def test_losses_under_autocast_are_near_those_of_one_rank_and_of_float32(one_device):
    cast = torch.tensor(losses(1, autocast="bfloat16")[0])
    for size, options in (2, {}), (2, {"loss_tile": 16, "checkpointing": "full"}):
        for got in losses(size, autocast="bfloat16", steps=3, **options):
            torch.testing.assert_close(torch.tensor(got), cast[:3], rtol=3e-3, atol=0)
    exact = torch.tensor(one_device[2])
    torch.testing.assert_close(cast, exact, rtol=1e-2, atol=0)
    assert not torch.equal(cast, exact)


def test_the_attention_is_kept_where_seqpar_can(one_device):
    if not hasattr(seqpar, "keep_attention"):
        with pytest.raises(NotImplementedError, match="take checkpointing='full'"):
            Recipe(checkpointing="keep-attention")
        return
    for got in losses(3, checkpointing="keep-attention"):
        torch.testing.assert_close(
            torch.tensor(got), torch.tensor(one_device[2]), rtol=1e-6, atol=0
        )


def records(group, **options):
    found = []
    train(group, Recipe(**(SMALL | options)), TEXT, on_step=found.append)
    return found


def test_gradient_norms_and_clipped_steps_do_not_depend_on_the_ranks():
    free = records(seqpar.Group.alone())
    for clip in 0.0, 0.5:
        one = records(seqpar.Group.alone(), clip=clip)
        for got in seqpar.simulate(4, lambda group, clip=clip: records(group, clip=clip, dp=2)):
            for name in "loss", "grad_norm":
                a, b = (torch.tensor([getattr(r, name) for r in x]) for x in (got, one))
                torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    assert min(r.grad_norm for r in free) > 0.5, "every step was clipped"
    assert one[-1].loss != free[-1].loss
    assert [r.step for r in free] == list(range(SMALL["steps"]))
    assert all(r.peak_bytes > 2**20 and r.tokens_per_second > 0 for r in free)


def resumed(folder, size, **options):
    def fn(group):
        return train(group, Recipe(**(SMALL | options)), TEXT, checkpoint=folder, resume=True)

    return seqpar.simulate(size, fn)


def test_a_run_is_resumed_by_other_ranks_in_another_way(tmp_path, one_device):
    def fn(group):
        recipe = Recipe(**(SMALL | {"steps": 3, "dp": 2}))
        return train(group, recipe, TEXT, checkpoint=tmp_path, save_every=2)

    seqpar.simulate(4, fn)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"], "older ones are removed"
    for got in resumed(tmp_path, 3, strategy="ulysses", accumulate=2, steps=4):
        torch.testing.assert_close(
            torch.tensor(got), torch.tensor(one_device[2][:4]), rtol=1e-6, atol=0
        )
    for got in resumed(tmp_path, 1, checkpointing="full"):
        torch.testing.assert_close(
            torch.tensor(got), torch.tensor(one_device[2]), rtol=1e-6, atol=0
        )
    assert resumed(tmp_path, 2) == [got] * 2, "nothing is left to do"
    with pytest.raises(ValueError, match=r"lr is 0\.001 there and 0\.5 here"):
        resumed(tmp_path, 2, lr=0.5)
    with pytest.raises(ValueError, match="has run 5 steps, more than steps=3"):
        resumed(tmp_path, 2, steps=3)
    with pytest.raises(ValueError, match="has checkpoints; resume"):
        train(seqpar.Group.alone(), Recipe(**SMALL), TEXT, checkpoint=tmp_path)


def test_resuming_alone_changes_no_bit(tmp_path, one_device):
    train(seqpar.Group.alone(), Recipe(**(SMALL | {"steps": 3})), TEXT, checkpoint=tmp_path)
    assert resumed(tmp_path, 1)[0] == one_device[2]


@pytest.mark.parametrize("where", ["dcp.save", "json.dump", "os.fsync"])
def test_a_crash_while_saving_keeps_the_last_checkpoint(tmp_path, monkeypatch, one_device, where):
    from byte_lm import checkpoint

    module, name = where.split(".")

    def save(steps):
        resume = steps > 2
        recipe = Recipe(**(SMALL | {"steps": steps}))
        fn = lambda g: train(g, recipe, TEXT, checkpoint=tmp_path, resume=resume)  # noqa: E731
        return seqpar.simulate(2, fn)

    def crash(*_, **__):
        raise OSError("no space left")

    save(2)
    with monkeypatch.context() as patch:
        patch.setattr(getattr(checkpoint, module), name, crash)
        with pytest.raises(OSError, match="no space left"):
            save(3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003.partial"]
    for got in save(3):
        torch.testing.assert_close(
            torch.tensor(got), torch.tensor(one_device[2][:3]), rtol=1e-6, atol=0
        )
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]


def test_a_missing_checkpoint_is_an_error_on_every_rank(tmp_path):
    def fn(group):
        path = tmp_path / f"only-{group.rank}"
        path.mkdir()
        if group.rank == 0:
            train(seqpar.Group.alone(), Recipe(**(SMALL | {"steps": 1})), TEXT, checkpoint=path)
        with pytest.raises((FileNotFoundError, seqpar.DesyncError)) as caught:
            train(group, Recipe(**SMALL), TEXT, checkpoint=path, resume=True)
        return str(caught.value)

    assert all("there is no checkpoint" in message for message in seqpar.simulate(2, fn))


def test_a_loss_that_is_not_finite_stops_every_rank():
    def fn(group):
        with pytest.raises(FloatingPointError, match="try a lower lr"):
            train(group, Recipe(**(SMALL | {"lr": 1e30, "warmup": 0})), TEXT)

    seqpar.simulate(2, fn)


def test_a_gradient_that_is_not_finite_stops_every_rank_before_the_weights_are_lost(
    tmp_path, monkeypatch
):
    """The loss of the second step is finite, and the checkpoint of the first must stay."""
    calls = []

    def norm(_, most):
        calls.append(most)
        return torch.tensor(1.0 if len(calls) <= 2 else math.inf)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", norm)

    def fn(group):
        with pytest.raises(FloatingPointError, match="norm of a gradient is inf"):
            train(group, Recipe(**SMALL), TEXT, checkpoint=tmp_path, save_every=1)

    seqpar.simulate(2, fn)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_ranks_that_differ_are_told_apart():
    def raises(error, match, size, **options):
        def fn(group):
            mine = {n: v[group.rank] if isinstance(v, list) else v for n, v in options.items()}
            train(group, Recipe(**(SMALL | mine)), TEXT[: mine.pop("bytes", 4000)])

        with pytest.raises(error, match=match):
            seqpar.simulate(size, fn)

    raises(seqpar.DesyncError, "recipe", 2, seed=[0, 1])
    raises(seqpar.DesyncError, "recipe", 2, strategy=["ring", "ulysses"])
    raises(ValueError, "cannot be dp=2 replicas", 3, dp=2)
    raises(ValueError, "multiply to the 3 ranks", 3, strategy="hybrid", ulysses=2)

    def texts(group):
        train(group, Recipe(**SMALL), TEXT[group.rank :])

    with pytest.raises(seqpar.DesyncError, match="text"):
        seqpar.simulate(2, texts)
    with pytest.raises(ValueError, match="FSDP shards over all processes"):
        seqpar.simulate(2, lambda g: train(g, Recipe(**SMALL), TEXT, fsdp=True))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch": 3, "dp": 2}, "multiple of dp"),
        ({"batch": 6, "dp": 2, "accumulate": 2}, "multiple of dp"),
        ({"ulysses": 2}, "ulysses=2 is for"),
        ({"checkpointing": "some"}, "checkpointing must be one of"),
        ({"lr": math.nan}, "lr must be finite"),
        ({"loss_tile": -1}, "loss_tile must be finite and at least 0"),
        ({"dp": 0}, "dp must be finite and at least 1"),
        ({"heads": 3}, "multiple of kv_heads"),
        ({"dim": 34}, "multiple of 2"),
    ],
)
def test_recipes_that_cannot_be_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Recipe(**options)


def test_a_resumed_metrics_file_has_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for first, last in (0, 5), (3, 6):
        file = MetricsFile(path, first)
        for step in range(first, last):
            file.write(StepRecord(step, float(first), 1.0, 1.0, 1.0, None))
        file.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [
        (0, 0), (1, 0), (2, 0), (3, 3), (4, 3), (5, 3),
    ]  # fmt: skip


def test_a_line_that_a_killed_run_left_unfinished_does_not_stop_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "lo')
    MetricsFile(path, 1).close()
    assert path.read_text() == '{"step": 0}\n'
