"""What ranks tell of themselves, in words; a program's handlers cannot stop the telling."""

import logging
import threading

import pytest

from seqpar.comm import watch
from seqpar.comm.tales import Tales


class Store(dict):
    """A store in one process."""

    set = dict.__setitem__

    def add(self, key, amount):
        self[key] = self.get(key, 0) + amount
        return self[key]

    def check(self, keys):
        return all(key in self for key in keys)


def tale(**changes):
    return {"every": 1.0, "busy": 0, "waits": [], "end": "", "left": False} | changes


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (None, "rank 1 has not begun"),
        (tale(left=True), "rank 1 has left"),
        (tale(busy=1), "rank 1 is busy with something else"),
        (tale(), "rank 1 is busy with something else"),
        (
            tale(waits=[[[2, 3], "here", "a gather", 1.0]]),
            "rank 1 waits for ranks 2, 3 in a gather",
        ),
    ],
)
def test_what_a_rank_does(told, words):
    store = Store()
    here, there = Tales(store, 0), Tales(store, 1)
    here.tell(tale())
    if told is not None:
        there.tell(told)
    assert here.doing(1) == words


def test_a_tale_is_as_old_as_the_beats_since_it_was_first_heard():
    store = Store()
    here, there = Tales(store, 0), Tales(store, 1)
    there.tell(tale())
    here.tell(tale())
    assert here.listen(1).at == 1
    here.tell(tale())
    assert here.listen(1).at == 1
    there.tell(tale())
    assert (here.listen(1).at, here.beat, here.tellers) == (2, 2, 1)


def test_handlers_that_raise_or_block_do_not_hold_the_watch_up(monkeypatch):
    reached, free, raised = threading.Event(), threading.Event(), threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: raised.set())

    class Handler(logging.Handler):
        def emit(self, record):
            reached.set()
            free.wait(10)
            raise ValueError(record)

    handler = Handler()
    watch.LOGGER.addHandler(handler)
    try:
        watch._warn("text with a %s in it")
        assert reached.wait(10)
        assert not raised.is_set()
        free.set()
        assert raised.wait(10)
    finally:
        free.set()
        watch.LOGGER.removeHandler(handler)
