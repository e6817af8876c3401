"""What backward needs is as it was, wherever it waited; and it is gone afterwards."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import seqpar
from seqpar import host_memory


def blocks(num=3):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layers = (nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(num))
        return nn.ModuleList(layers).double()


def rows():
    return torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def forward(model, x):
    for block in model:
        x = x + checkpoint(block, x, use_reentrant=False)
    return x


def on_host(**options):
    return seqpar.saved_on_host(**({"least_bytes": 0} | options))


def gradients(out, model):
    return torch.autograd.grad(out.square().sum(), list(model.parameters()))


@pytest.mark.parametrize("ahead", [0, 1, 2, 9])
def test_gradients_are_the_same_bits_whatever_comes_back_ahead(ahead):
    model, x = blocks(), rows()
    with on_host(ahead=ahead) as memory:
        out = forward(model, x)
    assert memory.bytes == 3 * x.numel() * 8, "the input of each block, and nothing else"
    assert all(map(torch.equal, gradients(out, model), gradients(forward(model, x), model)))


def test_without_checkpointing_parameters_stay():
    model, x = blocks(1), rows()
    model[0][2].weight.requires_grad_(False)
    with on_host() as memory:
        out = model[0](x)
    assert memory.bytes == 2 * x.numel() * 8, (
        "x and the input of GELU; what is frozen needs no more"
    )
    out.sum().backward()


@pytest.mark.parametrize("strategy", [seqpar.RingAttention, seqpar.UlyssesAttention])
def test_what_attention_gave_is_kept_there_too(strategy):
    def fn(group):
        attend, layout = strategy(group), seqpar.zigzag(9, group.size)
        x = torch.randn(1, layout.rows[group.rank], 16).double().requires_grad_()

        def block(y):
            heads = y.sin().unflatten(-1, (4, 4))
            return attend(heads, heads.cos(), heads, layout).flatten(2).sin()

        def run():
            group.traffic.reset()
            y = x.sin()
            for _ in range(2):
                y = checkpoint(block, y, use_reentrant=False, context_fn=seqpar.keep_attention)
            return y

        want = torch.autograd.grad(run().square().sum(), x)[0], group.traffic.total.bytes
        with on_host() as memory:
            out = run()
        got = torch.autograd.grad(out.square().sum(), x)[0], group.traffic.total.bytes
        assert torch.equal(got[0], want[0])
        assert got[1] == want[1], "attention is not computed again"
        return memory.bytes / (x.numel() * 8)

    for share in seqpar.simulate(2, fn):
        assert share > 2 * 2, "of each block its input and out; and lse, which is smaller"


def test_several_forwards_go_back_in_any_order_and_more_than_once():
    model = blocks()
    with on_host():
        outs = [forward(model, rows() + n) for n in range(3)]
    for n in (1, 0, 2):
        want = gradients(forward(model, rows() + n), model)
        for again in (True, False):
            got = torch.autograd.grad(
                outs[n].square().sum(), list(model.parameters()), retain_graph=again
            )
            assert all(map(torch.equal, got, want))


def living(memory):
    gc.collect()
    return sum(reference() is not None for reference in memory._order)


def test_memory_is_given_back_after_backward_and_when_a_graph_is_dropped():
    model = blocks()
    with on_host() as memory:
        out, dropped = forward(model, rows()), forward(model, rows())
    assert living(memory) == 6
    gradients(out, model)
    assert living(memory) == 3
    del dropped
    assert living(memory) == 0


def test_a_tensor_that_several_blocks_get_moves_once():
    model, other, x = blocks(), rows().cos(), rows()
    with on_host() as memory:
        out = sum(
            checkpoint(lambda a, b, f=f: f(a + b), x, other, use_reentrant=False) for f in model
        )
    assert memory.bytes == 2 * x.numel() * 8
    got = gradients(out, model)
    assert all(map(torch.equal, got, gradients(sum(f(x + other) for f in model), model)))


def test_small_tensors_integers_and_forwards_without_gradients_stay():
    model, x = blocks(1), rows()
    ids = torch.arange(5)
    with on_host(least_bytes=x.numel() * 8 + 1) as memory:
        forward(model, x)
    with torch.no_grad(), on_host() as unused:
        forward(model, x)
    with on_host() as of_ids:
        checkpoint(lambda ids: model[0](x[:, ids]), ids, use_reentrant=False)
    assert memory.bytes == unused.bytes == of_ids.bytes == 0


def failing(memory):
    with memory:
        forward(blocks(), rows())
        raise KeyError


def test_an_error_ends_the_block():
    with pytest.raises(KeyError):
        failing(on_host())
    assert host_memory.current_host_memory() is None
    with pytest.raises(ValueError, match="ahead must not be negative"), on_host(ahead=-1):
        pass
    with on_host() as outer:
        with on_host() as inner:
            forward(blocks(), rows())
        assert outer.bytes == 0 < inner.bytes


def writing(model, x):
    with on_host():
        x.add_(checkpoint(model, x, use_reentrant=False).detach())


def test_writing_to_what_is_being_copied_is_refused():
    with pytest.raises(RuntimeError, match="written to in place while it was copied"):
        writing(blocks(1)[0], rows().sin())


class Device:
    """What torch calls the module of a device: streams that say what they are told."""

    def __init__(self):
        self.told, self.names = [], iter(["out", "back"])
        self.now = Stream(self, "computing")

    def Stream(self):  # noqa: N802
        return Stream(self, next(self.names))

    def current_stream(self, _):
        return self.now

    def stream(self, stream):
        return stream


class Stream:
    def __init__(self, device, name):
        self.device, self.name, self.events = device, name, 0

    def wait_stream(self, other):
        self.device.told.append((self.name, "waits for", other.name))

    def wait_event(self, event):
        self.device.told.append((self.name, "waits for", event))

    def record_event(self):
        self.events += 1
        event = f"{self.name} {self.events}"
        self.device.told.append((self.name, "records", event))
        return event

    def __enter__(self):
        self.device.told.append((self.name, "copies"))

    def __exit__(self, *error):
        pass


def test_streams_wait_for_each_other_and_no_host_for_a_device(monkeypatch):
    """Of two blocks: the second one's input comes back, and the first one's in its backward."""
    device, model = Device(), blocks(2)
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    leaving = lambda n: [  # noqa: E731
        ("out", "waits for", "computing"),
        ("out", "copies"),
        ("out", "records", f"out {n}"),
    ]
    coming = lambda n, left: [  # noqa: E731
        ("back", "waits for", "computing"),
        ("back", "waits for", f"out {left}"),
        ("back", "copies"),
        ("back", "records", f"back {n}"),
    ]
    with on_host(ahead=1):
        out = forward(model, rows())
    freed = [("computing", "waits for", f"out {n}") for n in (1, 2)]
    assert device.told == [*leaving(1), freed[0], *leaving(2), freed[1]]
    device.told.clear()
    gradients(out, model)
    used = [("computing", "waits for", f"back {n}") for n in (1, 2)]
    assert device.told == [*coming(1, 2), used[0], *coming(2, 1), used[1]]


def test_what_came_back_for_nobody_is_not_freed_before_its_copy(monkeypatch):
    device, model = Device(), blocks(2)
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    with on_host(ahead=1):
        x = checkpoint(model[0], rows().sin(), use_reentrant=False)
        y = checkpoint(model[1], x.detach().sin(), use_reentrant=False)
    gone = weakref.ref(x)
    y.sum().backward()
    assert device.told[-1] != ("computing", "waits for", "back 2")
    del x
    gc.collect()
    assert gone() is None
    assert device.told[-1] == ("computing", "waits for", "back 2")
