"""`seqpar doctor --measure`: what was fastest is kept, and chooses from then on."""

import pytest
import torch

from seqpar import cli
from seqpar.commands import profile
from seqpar_kernels import Request, choose
from seqpar_kernels.profile import FOLDER, Profile, device_name, forget

CPU = torch.device("cpu")
QUICK = ["doctor", "--measure", "--lengths", "48", "--widths", "16", "--rounds", "2", "--profiles"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    copy = tmp_path_factory.mktemp("json") / "profile.json"
    assert cli.main([*QUICK, str(folder), "--json", str(copy)]) == 0
    (path,) = folder.iterdir()
    assert copy.read_text() == path.read_text()
    return folder, Profile.read(path)


def test_every_problem_is_timed(run):
    _, found = run
    assert found.device == device_name(CPU)
    assert found.capability is None
    assert [problem.kind[3:] for problem in found.problems] == list(profile.MASKS)
    assert {problem.kind[:3] for problem in found.problems} == {(16, 16, 48)}
    for problem in found.problems:
        assert set(problem.seconds) == {"aten", "reference"}
        assert all(seconds > 0 for seconds in problem.seconds.values())


def test_what_was_fastest_is_chosen_from_then_on(run, monkeypatch):
    folder, found = run
    monkeypatch.setenv(FOLDER, str(folder))
    forget()
    first = min(found.problems[0].seconds, key=found.problems[0].seconds.get)
    assert choose(Request(CPU, torch.bfloat16, 16, 16, length=48)) == first
    text = capture(monkeypatch, ["doctor", "--no-selfcheck"])
    assert f"By a measurement on {device_name(CPU)} (torch {torch.__version__}" in text


def test_without_one_the_doctor_says_so(monkeypatch):
    assert "Not measured on this device" in capture(monkeypatch, ["doctor", "--no-selfcheck"])


def capture(monkeypatch, arguments):
    lines = []
    monkeypatch.setattr("builtins.print", lambda *text, **_: lines.extend(map(str, text)))
    assert cli.main(arguments) == 0
    return "\n".join(lines)


def twice(step):
    return lambda: [2 * x for x in step()]


def partly_nan(step):
    return lambda: [*step()[:-1], torch.full((1,), float("nan"))]


def failing(_step):
    def step():
        raise MemoryError("no room")

    return step


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (twice, "aten is WRONG, off by 1 of the norm, and is not timed"),
        (partly_nan, "aten is WRONG, off by nan of the norm, and is not timed"),
        (failing, "aten FAILED and is not timed: MemoryError: no room"),
    ],
)
def test_what_is_wrong_or_fails_is_named_and_not_kept(breaks, words, monkeypatch):
    made, said = profile._step, []

    def one(kind, device, name):
        step = made(kind, device, name)
        return breaks(step) if name == "aten" else step

    monkeypatch.setattr(profile, "_step", one)
    with pytest.raises(ValueError, match="no choice to measure"):
        profile.measure(CPU, said.append, widths=[16], lengths=[32], rounds=1)
    assert sum(words in line for line in said) == len(profile.MASKS)


def test_what_is_wrong_is_kept_as_such(monkeypatch, tmp_path):
    made = profile._step

    def one(kind, device, name):
        step = made(kind, device, name)
        return twice(step) if name == "aten" and kind.windowed else step

    monkeypatch.setattr(profile, "_step", one)
    found = profile.measure(CPU, lambda _: None, widths=[16], lengths=[32], rounds=1)
    wrong = {problem.kind.windowed: problem.wrong for problem in found.problems}
    assert wrong == {False: (), True: ("aten",)}
    found.write(tmp_path / "x.json")
    assert Profile.read(tmp_path / "x.json") == found
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"], "nothing half written is left"


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        profile.measure(CPU, print, rounds=0)
