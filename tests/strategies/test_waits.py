"""On a GPU nothing in a call waits for the device: tensors that say they are on one tell who would wait."""

from dataclasses import dataclass

import pytest
import torch
from on_cuda import CPU, CUDA, OnCuda, WaitError, backward
from torch import Tensor

from seqpar import Dropout, Mask, Plan, Score, attention, attention_with_lse, masks, zigzag
from seqpar.comm import silent
from seqpar.strategies import STRATEGIES
from seqpar_kernels import custom_ops, flash_ops, refusal, triton_attention, triton_softmax
from seqpar_kernels.choice import Request


@pytest.fixture
def hopper(monkeypatch):
    """A machine that says it has one, whose ops and kernels give something of the right shape."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    monkeypatch.setattr(custom_ops, "nobody_looks", lambda _: True)
    for module in (triton_attention, triton_softmax):
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)

    def forward(q, *_, **__):
        b, i, h, _ = q.shape
        return torch.empty_like(q), q.new_empty(b, h, i, dtype=torch.float32)

    def backward_op(_dout, *qkv, **__):
        return tuple(map(torch.empty_like, qkv[:3]))

    def cudnn_forward(q, *_, **__):
        return torch.empty_like(q), q.new_empty(*q.shape[:3], 1, dtype=torch.float32)

    monkeypatch.setattr(flash_ops, "_forward", forward)
    monkeypatch.setattr(flash_ops, "_cudnn", cudnn_forward)
    for name in ("_backward", "_cudnn_back"):
        monkeypatch.setattr(flash_ops, name, backward_op)


@dataclass(frozen=True)
class Asked:
    """What is asked of a call besides causal attention."""

    mask: Mask = Mask(causal=True)
    score: dict | None = None
    dropout: float = 0.0
    with_lse: bool = False
    dtype: torch.dtype = torch.bfloat16


N = 48
ASKED = {
    "causal": Asked(),
    "window": Asked(Mask(causal=True, window=7)),
    "documents": Asked(Mask(causal=True, documents=(0, 5, 20, N))),
    "full": Asked(Mask()),
    "two layers": Asked(masks.shared_prompt(10, [20, 18])),
    "by batch entry": Asked((masks.keys(0, 30),)),
    "float32": Asked(dtype=torch.float32),
    "softcap": Asked(score={"softcap": 5.0}),
    "ALiBi": Asked(score={"alibi_slopes": torch.full((4,), 0.5)}),
    "sinks": Asked(score={"sinks": torch.zeros(4)}),
    "dropout": Asked(dropout=0.3),
    "lse": Asked(with_lse=True),
}


def step(strategy, asked, implementation, size):
    """A forward and backward of rank 0, after one that made the schedules."""
    group = silent(0, size)
    score = {
        name: x.clone().requires_grad_() if isinstance(x, Tensor) else x
        for name, x in (asked.score or {}).items()
    }
    plan = Plan(
        group, zigzag(N, size), asked.mask, Score(**score), strategy, implementation,
        dropout=Dropout(asked.dropout, seed=1) if asked.dropout else None,
        grid=group.grid(ulysses=min(2, size)) if STRATEGIES[strategy].needs_grid else None,
    )  # fmt: skip
    rows = plan.layout.rows[0]
    qkv = [
        torch.zeros(1, rows, heads, 16, dtype=asked.dtype, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    leaves = [*qkv, *(x for x in score.values() if isinstance(x, Tensor))]
    attend = attention_with_lse if asked.with_lse else attention
    with OnCuda():
        for _ in range(2):
            ends = attend(*qkv, plan)
            ends = ends if isinstance(ends, tuple) else (ends,)
            grads = tuple(map(torch.zeros_like, ends))
            backward(ends, leaves, grads)


def serves(strategy, asked, implementation):
    """Whether an implementation takes what is asked, on a GPU."""
    if STRATEGIES[strategy].stores_scores:
        return implementation in ("reference", "triton")
    x = torch.empty(1, 1, 4, 16, dtype=asked.dtype)
    plan = Plan(silent(0, 1), zigzag(N, 1), asked.mask, Score(**(asked.score or {})))
    with OnCuda():
        dropped = (Dropout(asked.dropout, seed=1),) if asked.dropout else ()
        request = Request.of(
            x, x, (*plan.score.resolve(16).terms, *plan.terms, *dropped), lse=asked.with_lse
        )
    return refusal(implementation, request) is None


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("implementation", ["reference", "triton", "aten", "cudnn"])
@pytest.mark.parametrize("what", ASKED)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_waits_for_the_device(strategy, what, implementation):
    if not serves(strategy, ASKED[what], implementation):
        return
    for size in (1, 4):
        step(strategy, ASKED[what], implementation, size)


def reads_a_number(x):
    return x.sum().item()


def asks_whether(x):
    return bool((x > 0).any())


def counts(x):
    return x[x > 0]


def copies_pages(x):
    return torch.arange(3).to(x.device)


def copies_a_list(x):
    return torch.tensor([1, 2], device=x.device)


def waits_for_a_copy(x):
    return torch.arange(3).pin_memory().to(x.device)


def copies_into(x):
    return x.copy_(torch.zeros(3))


def copies_back(x):
    return (2 * x).to(torch.device("cpu"))


@pytest.mark.parametrize(
    "waits",
    [
        reads_a_number, asks_whether, counts, copies_pages, copies_a_list, waits_for_a_copy, copies_into,
        copies_back,
    ],
)  # fmt: skip
def test_what_waits_is_found(waits):
    x = torch.ones(3)
    with OnCuda(), pytest.raises(WaitError):
        waits(x)


def test_what_only_queues_is_not_taken_for_a_wait():
    x = torch.ones(3)
    with OnCuda():
        y = torch.arange(3).pin_memory().to(x.device, non_blocking=True)
        assert y.device == CUDA
        assert (x + y).device == CUDA
        assert x.new_empty(3).device == CUDA
        assert torch.zeros(3, device=x.device).device == CUDA
        host = torch.tensor([1, 2])
        assert host.device == CPU
        assert (host + 1).tolist() == [2, 3]
        assert x.to(torch.float64).to(CUDA).device == CUDA
