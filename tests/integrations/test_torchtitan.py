"""torchtitan's Trainer with attention of seqpar equals torchtitan's Trainer in one process, in float32.

Skipped where torchtitan is not installed: `python scripts/upkeep/check_versions.py torchtitan` runs it.
"""

from functools import partial

import pytest

pytest.importorskip("torchtitan", reason="torchtitan wants older packages than the lock has")

from pages.blocks import blocks_of
from titan_problem import (
    Loader,
    even_llama,
    small_gpt_oss,
    small_llama,
    small_qwen3,
    varlen_gpt_oss,
)
from titan_runs import Run, trained
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.validate import Validator
from torchtitan.config import CompileConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

import seqpar
from seqpar.testing import ProcessWorld

# Measured: 2e-7, 7e-7 and 6e-7; of gpt-oss, whose norms are over larger tensors, 7e-7, 2e-5 and 2e-6.
LOSS, NORM, WEIGHT = 3e-6, 5e-5, 5e-6
EVALUATED = {"validator": Validator.Config(enable=True, steps=2, dataloader=Loader.Config())}
CHUNKED = ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(), num_chunks=2)


def cp(backend="partial_dtensor", **more):
    return {"context_parallel_degree": 2, "spmd_backend": backend} | more


@pytest.fixture(scope="module")
def run_in():
    """Runs a function in a world of just so many processes; the same ones for all tests."""
    made = {}

    def run(size, fn, *args):
        if size not in made or not made[size].is_alive:
            made[size] = ProcessWorld(size)
        return made[size].run(fn, *args, timeout=240)

    yield run
    for world in made.values():
        if world.is_alive:
            world.close()


@pytest.fixture
def train(run_in, tmp_path):
    return lambda size, **run: run_in(size, trained, Run(**run), str(tmp_path))[0]


def assert_alike(got, want, times=1):
    for (loss, norm, tokens), (its_loss, its_norm, its_tokens) in zip(
        got["steps"], want["steps"], strict=True
    ):
        assert loss / times == pytest.approx(its_loss, rel=LOSS)
        assert norm == pytest.approx(its_norm, rel=NORM)
        assert tokens == its_tokens
    assert got["evaluated"] == pytest.approx(want["evaluated"], rel=LOSS)
    assert got["weights"].keys() == want["weights"].keys()
    for name, weight in want["weights"].items():
        error = (got["weights"][name] - weight).abs().max() / weight.abs().max()
        assert error < WEIGHT, name


def test_twenty_steps_equal_one_process(train):
    """Documents, prompts without labels, two micro-batches, kv heads that ranks do not divide; evaluation."""
    want = train(1, options=EVALUATED)
    assert_alike(train(2, strategy=seqpar.RingAttention, parallelism=cp(), options=EVALUATED), want)
    unbalanced = cp(context_parallel_load_balancer=None)
    replicas = {"strategy": seqpar.UlyssesAttention, "parallelism": unbalanced}
    assert_alike(train(4, **replicas, options=EVALUATED), want)


def test_backends_checkpointing_compilation_and_losses_equal_one_process(train):
    want = train(1, steps=3)
    ring = partial(train, 2, steps=3, strategy=seqpar.RingAttention)
    compiled = CompileConfig(enable=True, components=["model"], backend="aot_eager")
    assert_alike(ring(parallelism=cp("spmd_types")), want)
    # With this backend torchtitan logs a loss for each rank, added up, by itself too.
    full = {"activation_checkpoint": FullAC.Config()}
    assert_alike(ring(parallelism=cp("full_dtensor"), options=full), want, times=2)
    selective = {"activation_checkpoint": SelectiveAC.Config(), "loss": CHUNKED}
    assert_alike(ring(parallelism=cp(), options=selective), want)
    assert_alike(ring(parallelism=cp(), options={"compile": compiled}), want)


def test_tensor_parallelism_beside_it_equals_one_process(train):
    want = train(1, model=even_llama, steps=3)
    both = cp(tensor_parallel_degree=2)
    got = train(4, model=even_llama, steps=3, strategy=seqpar.RingAttention, parallelism=both)
    assert_alike(got, want)


def test_sinks_and_windows_equal_one_process(train):
    """gpt-oss; its experts route tokens, and their balance is counted over all ranks."""
    want = train(1, model=small_gpt_oss, steps=3)
    ring = {"strategy": seqpar.RingAttention, "parallelism": cp()}
    for model in (small_gpt_oss, varlen_gpt_oss):
        assert_alike(train(2, model=model, steps=3, **ring), want)


def test_qwen3_equals_one_process(train):
    want = train(1, model=small_qwen3, steps=2)
    ring = {"strategy": seqpar.RingAttention, "parallelism": cp()}
    assert_alike(train(2, model=small_qwen3, steps=2, **ring), want)


def of_the_page():
    """The small model, applied as docs/trainers.md says."""
    (block,) = (b for b in blocks_of("docs/trainers.md") if "torchtitan" in b.text)
    names = {}
    exec(block.side("+"), names)
    config = names["long_context"]()
    assert config.training.disable_cuda_graphs
    assert config.parallelism.context_parallel_degree > 1
    spec = small_llama()
    spec.parallelize_fn = config.model_spec.parallelize_fn
    return spec


def test_what_the_page_changes_trains_as_one_process(train):
    got = train(2, model=of_the_page, steps=3, parallelism=cp())
    assert_alike(got, train(1, steps=3))
