"""What was made once is used again, and of many kinds the one that was not asked for longest goes."""

import pytest

from seqpar.comm import kept
from seqpar.comm.kept import Kept


def test_what_was_made_is_kept_by_what_it_depends_on():
    made, here = [], Kept()
    for key in ("a", "b", "a", "b"):
        assert here.get(key, lambda key=key: made.append(key) or key.upper()) == key.upper()
    assert made == ["a", "b"]


def test_the_one_not_asked_for_longest_goes(monkeypatch):
    monkeypatch.setattr(kept, "MOST", 2)
    made, here = [], Kept()
    for key in ("a", "b", "a", "c", "a", "b"):
        here.get(key, lambda key=key: made.append(key))
    assert made == ["a", "b", "c", "b"]


def test_what_cannot_be_made_is_tried_again():
    here = Kept()
    with pytest.raises(ZeroDivisionError) as caught:
        here.get("a", lambda: 1 // 0)
    assert caught.value.__context__ is None, "the key, which may be long, is no news"
    assert here.get("a", lambda: 1) == 1
