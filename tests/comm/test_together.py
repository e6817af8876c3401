"""Small tensors for one rank are one message, and all is received as it was sent."""

import pytest
import torch

from seqpar import simulate
from seqpar.comm import together
from seqpar.comm.together import exchange_together

SMALL, LARGE = (3, 5), (together.SMALL // 4 + 1,)  # float32
CASES = {  # shapes from rank 0 to 1 -> messages, types
    "small": ([SMALL, (2, 2, 7), (0, 4)], [torch.float32] * 3, 1),
    "large": ([SMALL, LARGE], [torch.float32] * 2, 2),
    "one": ([SMALL], [torch.float32], 1),
    "two types": ([SMALL, SMALL], [torch.float32, torch.float64], 2),
    "nothing": ([(0, 4)], [torch.float32], 0),
}


def numbers(shape, dtype, start):
    x = torch.arange(start, start + torch.Size(shape).numel(), dtype=dtype)
    # Sent as a view that is not contiguous, as slices of heads are.
    return torch.stack((x, -x), dim=-1)[..., 0].view(shape)


def swap(group, there, back):
    """Rank 0 sends `there`, rank 1 `back`, at once: what came, what was due, messages sent."""
    (out, out_types), (come, come_types) = (there, back) if group.rank == 0 else (back, there)
    messages, peer = [], 1 - group.rank
    exchange = group.transport.exchange

    def counted(primitive, sends, *args):
        messages.extend(sends)
        return exchange(primitive, sends, *args)

    group.transport.exchange = counted
    sends = [(peer, numbers(s, t, 10 * group.rank)) for s, t in zip(out, out_types, strict=True)]
    came = [torch.full(s, -1, dtype=t) for s, t in zip(come, come_types, strict=True)]
    exchange_together(group, "test", sends, [(peer, x) for x in came]).wait()
    due = [numbers(s, t, 10 * peer) for s, t in zip(come, come_types, strict=True)]
    return came, due, len(messages)


@pytest.mark.parametrize("back", CASES)
@pytest.mark.parametrize("there", CASES)
def test_each_direction_has_as_few_messages_as_pay(there, back):
    results = simulate(2, swap, CASES[there][:2], CASES[back][:2])
    for (came, due, messages), case in zip(results, (there, back), strict=True):
        assert messages == CASES[case][2]
        assert all(torch.equal(a, b) for a, b in zip(came, due, strict=True))


def test_tensors_for_different_ranks_stay_apart():
    def run(group):
        others = [(group.rank + n) % 3 for n in (1, 2)]
        sends = [
            (peer, torch.tensor([10.0 * group.rank + peer + n]))
            for n in (0, 100)
            for peer in others
        ]
        came = [(peer, torch.zeros(1)) for _ in range(2) for peer in others]
        exchange_together(group, "test", sends, came).wait()
        due = [10.0 * peer + group.rank + n for n in (0, 100) for peer in others]
        return [float(x) for _, x in came] == due

    assert all(simulate(3, run))
