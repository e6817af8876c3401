"""The backward of torch's CPU op is cut where caches are small, and gives the same gradients either way."""

import pytest
import torch

from seqpar.testing import oracle
from seqpar_kernels import Band, Block, Rows, Score, aten, attend_backward
from seqpar_kernels.caches import level_2_bytes
from seqpar_kernels.whole import attend_whole, attend_whole_backward

CAUSAL = Block(Band(None, 0), Score(scale=0.3))
SMALL, ROOMY = 1 << 20, 2 << 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2048K\n", 2 << 20), ("1M", 1 << 20), ("", 0), ("K", 0), ("512", 0), ("many", 0)],
)
def test_a_size_is_read_as_the_system_writes_it(tmp_path, text, expected):
    path = tmp_path / "size"
    path.write_text(text)
    assert level_2_bytes(path) == expected


def test_a_size_that_nobody_tells_is_0(tmp_path):
    assert level_2_bytes(tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("dtype", "cache", "calls"),
    [
        (torch.float32, SMALL, [300, 300, 300]),
        (torch.float32, ROOMY, [900]),
        (torch.float64, SMALL, [300, 300, 300]),
        (torch.bfloat16, SMALL, [900]),
    ],
)
def test_columns_of_a_call_by_cache(monkeypatch, dtype, cache, calls):
    took, op = [], aten._backward

    def counted(dout, q, k, *others, **named):
        took.append(k.shape[2])
        return op(dout, q, k, *others, **named)

    monkeypatch.setattr(aten, "level_2_bytes", lambda: cache)
    monkeypatch.setattr(aten, "_backward", counted)
    q, k, v, dout = (torch.randn(1, 900, 2, 8, dtype=dtype) for _ in range(4))
    out, lse = attend_whole(q, k, v, CAUSAL)
    into = tuple(torch.zeros(x.shape, dtype=lse.dtype) for x in (q, k, v))
    attend_backward(Rows.of(q, out, dout, lse), k, v, CAUSAL, into=into)
    assert took == calls
    seen = torch.ones(900, 900, dtype=torch.bool).tril()
    expected = oracle.with_gradients(
        *(x.double() for x in (q, k, v, dout)), seen, oracle.Terms(scale=0.3)
    )[1:]
    allowed = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for x, right in zip(into, expected, strict=True):
        assert float((x.double() - right).norm()) <= allowed * float(right.norm())
    whole = attend_whole_backward(dout, q, k, v, out, lse, CAUSAL)
    assert (whole is None) == (len(calls) > 1)
