"""On a GPU nothing in a call waits for the device: tensors that say they are on one tell who would wait."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakIdKeyDictionary

from seqpar import Dropout, Mask, Plan, Score, attention, attention_with_lse, zigzag
from seqpar.comm import silent
from seqpar.strategies import STRATEGIES
from seqpar_kernels import custom_ops, flash_ops, refusal, triton_attention, triton_softmax
from seqpar_kernels.choice import Request

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# Whoever asks for these is told when the device has done all that it was given.
READS = {
    "item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__",
    "nonzero", "argwhere", "is_nonzero", "equal", "allclose", "masked_select", "unique",
    "unique_consecutive", "bincount", "histc", "__array__",
}  # fmt: skip


class WaitError(AssertionError):
    """The host would wait for the device."""


class OnCuda(TorchFunctionMode):
    """All tensors are on a GPU, but for those made on the host inside of this mode.

    What is copied to the device must be pinned, and the copy only queued; nothing is copied back.
    """

    def __init__(self):
        super().__init__()
        self._host, self._pinned = WeakIdKeyDictionary(), WeakIdKeyDictionary()

    def is_host(self, x):
        return x.untyped_storage() in self._host

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return CPU if self.is_host(args[0]) else CUDA
        if func == Tensor.is_cuda.__get__:
            return not self.is_host(args[0])
        assert "seqpar" not in str(func), "inside of an op nothing would be seen"
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        on_host = all(map(self.is_host, given))
        if name == "pin_memory":
            result = args[0].clone()
            self._host[result.untyped_storage()] = self._pinned[result.untyped_storage()] = True
            return result
        if not on_host:
            self._check(name, args)
        device = kwargs.pop("device", None) or next(
            (x for x in args if isinstance(x, torch.device)), None
        )
        device = None if device is None else torch.device(device)
        args = tuple(CPU if isinstance(x, torch.device) else x for x in args)
        if device is not None and device.type == "cuda" and on_host:
            self._check_copy(name, given, kwargs)
            return func(*args, **kwargs).clone()
        if device is not None and device.type == "cpu" and not on_host:
            raise WaitError(f"{name} copies from the device")
        result = func(*args, **kwargs)
        if on_host and (given or device is None or device.type == "cpu"):
            for x in tree_flatten(result)[0]:
                if isinstance(x, Tensor):
                    self._host[x.untyped_storage()] = True
        elif name == "copy_" and not self.is_host(args[0]) and self.is_host(args[1]):
            self._check_copy(name, [args[1]], kwargs)
        return result

    def _check(self, name, args):
        indices = args[1] if name in ("__getitem__", "__setitem__") else ()
        if any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_flatten(indices)[0]):
            raise WaitError("an index of booleans counts them")
        counts = name == "repeat_interleave" and isinstance(args[-1], Tensor)
        if name in READS or counts or (name == "where" and len(args) == 1):
            raise WaitError(f"{name} reads from the device")

    def _check_copy(self, name, given, kwargs):
        if name == "tensor" or any(x.numel() for x in given):
            pinned = given and all(x.untyped_storage() in self._pinned for x in given)
            if not (pinned and kwargs.get("non_blocking")):
                raise WaitError(f"{name} copies to the device from memory that may be paged out")


@pytest.fixture
def hopper(monkeypatch):
    """A machine that says it has one, whose ops and kernels give something of the right shape."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    monkeypatch.setattr(custom_ops, "nobody_looks", lambda _: True)
    for module in (triton_attention, triton_softmax):
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)

    def forward(q, *_, **__):
        b, i, h, _ = q.shape
        return torch.empty_like(q), q.new_empty(b, h, i, dtype=torch.float32)

    def backward(_dout, *qkv, **__):
        return tuple(map(torch.empty_like, qkv[:3]))

    def cudnn_forward(q, *_, **__):
        return torch.empty_like(q), q.new_empty(*q.shape[:3], 1, dtype=torch.float32)

    for name, op in (
        ("_forward", forward), ("_backward", backward), ("_cudnn", cudnn_forward), ("_cudnn_back", backward)
    ):  # fmt: skip
        monkeypatch.setattr(flash_ops, name, op)


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
            # torch.autograd.grad would run outside of the mode.
            torch.autograd.graph._engine_run_backward(
                ends,
                grads,
                False,
                False,
                tuple(leaves),
                allow_unreachable=True,
                accumulate_grad=False,
            )


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
