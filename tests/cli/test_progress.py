"""How far long work is, told to a log and to a terminal."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from seqpar.commands import progress
from seqpar.commands.progress.bar import Bar
from seqpar.commands.progress.log import Log

SCRIPTS = Path(__file__).parents[2] / "scripts" / "train"


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Stream(io.StringIO):
    """Keeps when each line was flushed."""

    def __init__(self, clock, is_terminal=False):
        super().__init__()
        self.clock, self.times, self.is_terminal = clock, [], is_terminal

    def flush(self):
        self.times.append(self.clock())

    def isatty(self):
        return self.is_terminal


def logged(seconds, values="", first=0):
    """(times of lines, lines) of a log of steps that took so many seconds each."""
    clock = Clock()
    stream = Stream(clock)
    with Log("work", first + len(seconds), stream=stream, clock=clock) as log:
        for n, duration in enumerate(seconds):
            clock.now += duration
            log.done(values, number=first + n + 1 if first else None)
    return stream.times, stream.getvalue().splitlines()


@pytest.mark.parametrize("duration", [0.01, 0.9, 3.0, 4.9, 5.1, 7.0, 9.9])
def test_a_log_has_a_line_every_ten_seconds_and_not_many_more(duration):
    times, lines = logged([duration] * int(100 / duration))
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert max(gaps) <= 10
    assert min(gaps[:-1]) >= 5 - 1e-6
    assert len(lines) == len(times) >= 11


def test_a_step_longer_than_that_has_a_line_of_its_own():
    times, lines = logged([25.0, 31.0])
    assert times == [1000, 1025, 1056]
    assert lines[1] == "work: 1 of 2 in 0:00:25, 25 s each, 0:00:25 left"


def test_a_line_tells_steps_times_and_values():
    _, lines = logged([10.0, 2.0, 2.0, 2.0], "loss 2.5")
    assert lines == [
        "work: 4 steps",
        "work: 1 of 4 in 0:00:10, 10 s each, 0:00:30 left, loss 2.5",
        "work: 4 of 4 in 0:00:16, 2 s each, loss 2.5",  # the first step, which warmed up, left out
    ]


def test_steps_of_an_earlier_run_are_done_but_not_timed():
    _, lines = logged([1.0] * 7, first=90)
    assert lines[1] == "work: 95 of 97 in 0:00:05, 1 s each, 0:00:02 left"


def test_what_is_begun_or_said_has_a_line_at_once():
    clock = Clock()
    stream = Stream(clock)
    log = Log("work", 3, stream=stream, clock=clock).__enter__()
    log.done()
    log.begin("P=2")
    log.say("[1, 2]")
    log.__exit__(KeyError, KeyError(), None)
    told = [
        "3 steps",
        "P=2 (2 of 3)",
        "[1, 2]",
        "stopped at 1 of 3 in 0:00:00, 0 s each, 0:00:00 left",
    ]
    assert stream.getvalue().splitlines() == [f"work: {text}" for text in told]


def test_items_are_tracked_in_order_and_named(capsys):
    assert list(progress.track([3, 1, 2], "items", name=lambda x: f"item {x}")) == [3, 1, 2]
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert (out, lines[1:4]) == (
        "",
        [f"items: item {x} ({n} of 3)" for n, x in enumerate([3, 1, 2], 1)],
    )
    assert lines[4].startswith("items: 3 of 3 in ")


def test_other_ranks_tell_nothing(capsys):
    assert list(progress.track([3, 1], "items", name=str, shown=False)) == [3, 1]
    with progress.steps("work", 2, shown=False) as told:
        told.begin("x")
        told.say("y")
        told.done("z", number=2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("is_terminal", "term", "kind"),
    [(True, "xterm-256color", Bar), (True, "dumb", Log), (False, "xterm-256color", Log)],
)
def test_bars_are_for_terminals(monkeypatch, is_terminal, term, kind):
    monkeypatch.setattr(sys, "stderr", Stream(Clock(), is_terminal))
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")  # of tables, not of a log
    told = progress.steps("work", 2)
    assert type(told) is kind
    with told:
        told.begin("P=2")
        told.say("[1, 2]")
        told.done("loss 2.5", number=2)
    text = sys.stderr.getvalue()
    assert all(part in text for part in ("[1, 2]", "P=2", "loss 2.5"))
    assert ("\x1b" in text, "100%" in text) == ((True, True) if kind is Bar else (False, False))


def test_without_rich_a_terminal_has_a_log(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(Clock(), is_terminal=True))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    assert type(progress.steps("work", 2)) is Log


def test_a_redirected_training_is_told_in_plain_lines_by_one_rank(tmp_path):
    """As `torchrun ... byte_level.py > log 2>&1`, but with a line for every step."""
    often = tmp_path / "often.py"
    often.write_text(
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "from seqpar.commands.progress import log\n"
        "log.LINE_SECONDS = 0.0\n"
        f"runpy.run_path({str(SCRIPTS / 'byte_level.py')!r}, run_name='__main__')\n"
    )
    options = ["--length", 40, "--dim", 32, "--max-bytes", 5000, "--warmup", 2, "--steps", 3]
    metrics = tmp_path / "metrics.jsonl"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command = [sys.executable, *torchrun, often, *options, "--metrics", metrics]
    environment = os.environ | {"SEQPAR_CHECK_SHAPES": "0", "FORCE_COLOR": "1"}
    with (tmp_path / "log").open("w") as log:
        subprocess.run(
            list(map(str, command)),
            env=environment,
            stdout=log,
            stderr=log,
            check=True,
            timeout=300,
        )
    text = (tmp_path / "log").read_text()
    assert not re.search(r"[^\n -~]", text)
    lines = [line for line in text.splitlines() if line.startswith("training: ")]
    assert lines[0] == "training: 3 steps"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    for n, (line, record) in enumerate(zip(lines[1:], records, strict=True), 1):
        assert line.startswith(f"training: {n} of 3 in 0:0")
        assert f"loss {record['loss']:.4f}, gradient norm {record['grad_norm']:.3g}" in line
        assert line.endswith(f"{record['tokens_per_second']:.0f} tokens/s")
        assert (" left" in line) == (n < 3)
    assert re.search(r"^3 steps, loss .*P=2", text, re.MULTILINE)
