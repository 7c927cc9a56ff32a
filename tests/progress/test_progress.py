"""What a run tells: log lines, JSON lines, a terminal."""

import contextlib
import io
import json
import signal

import pytest

from elsa_compile.errors import UserInputError
from elsa_compile.progress import Interrupts, JsonlMetrics, Plain, Silent, Tee, open_progress
from elsa_compile.progress_live import Live
from elsa_compile.progress_sink import duration, one_line


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_plain_lines_are_sparse_and_tell_what_is_left():
    stream, clock = io.StringIO(), Clock()
    sink = Plain(stream, clock)
    with sink.stage("prune", 4) as stage:
        for second in (1, 2, 11, 12):
            clock.now = second
            stage.advance(1, "layer")
    lines = stream.getvalue().splitlines()
    assert [line[13:] for line in lines[:2]] == [
        "prune: start, 4 weights",
        "prune: 3 of 4 weights (75%), about 3.7 s left, layer",
    ]
    assert len(lines) == 3
    assert "prune: 4 weights in" in lines[2]


def test_metrics_appear_with_their_stage():
    stream = io.StringIO()
    sink = Plain(stream)
    with sink.stage("perplexity", 1, "windows") as stage:
        stage.advance()
        sink.metric("perplexity", 21.5537, model="dense")
    assert "perplexity 21.554 (model=dense)" in stream.getvalue().splitlines()[-1]


def test_json_lines_are_valid_whatever_the_numbers(tmp_path):
    path = tmp_path / "m.jsonl"
    with JsonlMetrics(path) as sink:
        with sink.stage("s", 2) as stage:
            stage.advance()
            sink.metric("loss", float("inf"), name="other", step=3)
        sink.warn("careful")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [e["event"] for e in events] == [
        "stage_start", "progress", "metric", "stage_end", "warning",
    ]  # fmt: skip
    assert events[2]["value"] == "inf"
    assert events[2]["name"] == "loss"
    assert events[2]["name_"] == "other"


def test_a_stage_that_fails_says_so(tmp_path):
    stream = io.StringIO()
    path = tmp_path / "m.jsonl"
    sink = Tee(Plain(stream), JsonlMetrics(path))

    def interrupted():
        with sink.stage("export", 3) as stage:
            stage.advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    sink.close()
    assert "stopped by KeyboardInterrupt after 1 of 3" in stream.getvalue()
    last = json.loads(path.read_text().splitlines()[-1])
    assert last["failed"] == "KeyboardInterrupt"


def test_the_live_display_draws_and_leaves_one_line_a_stage():
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, force_interactive=False)
    sink = Live(console)
    with sink.stage("prune", 2) as stage:
        stage.advance(1, "layer.0")
        stage.advance(1)
    sink.note("done [red]well[/red]")
    sink.close()
    text = stream.getvalue()
    assert "prune: 2 weights in" in text
    assert "[red]" in text  # names from files are no markup


def test_live_needs_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with pytest.raises(UserInputError, match="needs a terminal"):
        open_progress("live")
    assert isinstance(open_progress("auto"), Plain)
    assert isinstance(open_progress("silent"), Silent)


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.24, "4.2 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")]
)
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text


def test_names_cannot_move_the_cursor():
    assert "\x1b" not in one_line("a\x1b[2Jb\nc")


def test_an_interrupt_that_was_dropped_is_raised_again():
    def run(sink):
        with sink.stage("export"), contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # dropped, as Python does in a destructor
        raise AssertionError("it went on")

    before = signal.getsignal(signal.SIGINT)
    with Tee(Silent(), Interrupts()) as sink, pytest.raises(KeyboardInterrupt):
        run(sink)
    assert signal.getsignal(signal.SIGINT) is before
