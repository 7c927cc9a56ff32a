"""What a run tells while it works: stages, metrics, notes and warnings, and where they go.

Everything is written to standard error; standard output is for results. A sink is opened once and
given to whoever works (`Context.progress`):

    with open_progress("auto") as progress:
        with progress.stage("prune-wanda", total=30) as stage:
            for weight in weights:
                stage.advance(0, weight.name)  # in hand
                ...
                stage.advance()

A stage that is left by an exception ends like any other, so a terminal is never left half-drawn.
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from elsa_compile.errors import UserInputError
from elsa_compile.progress_sink import (
    ProgressSink,
    Stage,
    duration,
    ended_line,
    metric_text,
    one_line,
    remaining_s,
)

__all__ = [
    "Interrupts",
    "JsonlMetrics",
    "Kind",
    "Plain",
    "ProgressSink",
    "Silent",
    "Stage",
    "Tee",
    "open_progress",
]

Kind = Literal["auto", "live", "plain", "silent"]
Clock = Callable[[], float]  # seconds from any fixed point

_PLAIN_EVERY_S = 10.0
_JSONL_EVERY_S = 1.0


class Silent(ProgressSink):
    """Says nothing: for Python callers and tests."""


@dataclass
class _Watched:
    """What Plain remembers of an open stage."""

    started_s: float
    spoke_s: float
    metrics: dict[str, str]


class Plain(ProgressSink):
    """Log lines: the start and end of each stage, and every ten seconds how far it is."""

    def __init__(
        self,
        stream: IO[str] | None = None,
        clock: Clock = time.monotonic,
        every_s: float = _PLAIN_EVERY_S,
    ) -> None:
        """Write to `stream` (standard error), at most one line in `every_s` while a stage runs."""
        super().__init__()
        self._stream = stream
        self._clock = clock
        self._every_s = every_s
        self._began_s = clock()
        self._watched: dict[Stage, _Watched] = {}

    def _write(self, text: str, depth: int = 0) -> None:
        # Looked up late: standard error may have been replaced since.
        stream = self._stream if self._stream is not None else sys.stderr
        stream.write(f"[{self._clock() - self._began_s:8.1f} s] {'  ' * depth}{text}\n")
        stream.flush()

    def stage_started(self, stage: Stage) -> None:
        """One line with what is to be done."""
        now = self._clock()
        self._watched[stage] = _Watched(now, now, {})
        size = "" if stage.total is None else f", {stage.total:,} {stage.unit}"
        self._write(f"{stage.name}: start{size}", stage.depth)

    def stage_advanced(self, stage: Stage) -> None:
        """One line if the last one is long ago."""
        watched = self._watched.get(stage)
        if watched is None or self._clock() - watched.spoke_s < self._every_s:
            return
        watched.spoke_s = self._clock()
        parts = [f"{stage.done:,} {stage.unit}"]
        if stage.total:
            share = stage.done / stage.total
            parts = [f"{stage.done:,} of {stage.total:,} {stage.unit} ({share:.0%})"]
        left_s = remaining_s(stage, watched.spoke_s - watched.started_s)
        if left_s is not None:
            parts.append(f"about {duration(left_s)} left")
        parts += watched.metrics.values()
        if stage.detail:
            parts.append(stage.detail)
        self._write(f"{stage.name}: {', '.join(parts)}", stage.depth)

    def stage_ended(self, stage: Stage) -> None:
        """One line with the time it took and the last metrics."""
        watched = self._watched.pop(stage, None)
        if watched is not None:
            self._write(ended_line(stage, list(watched.metrics.values())), stage.depth)

    def metric(self, name: str, value: float, /, **fields: Any) -> None:
        """Kept for the stage's next line; outside of stages a line of its own."""
        text = metric_text(name, value, fields)
        if not self._watched:
            self._write(text)
            return
        self._watched[next(reversed(self._watched))].metrics[name] = text

    def note(self, text: str) -> None:
        """One line."""
        self._write(one_line(text), self._depth_now())

    def warn(self, text: str) -> None:
        """One line that says so."""
        self._write(f"warning: {one_line(text)}", self._depth_now())

    def _depth_now(self) -> int:
        # Under a Tee the stages are opened there, so the stages themselves have to tell.
        return max((stage.depth + 1 for stage in self._watched), default=0)


class JsonlMetrics(ProgressSink):
    """One JSON object a line for machines, flushed at once.

    Every line has `time` (seconds since 1970) and `event`; inside a stage also `stage`. Events:
    stage_start (total, unit), progress (done, total, detail; at most one a second and stage),
    stage_end (done, seconds, failed), metric (name, value and its fields), note and warning
    (text). JSON has no infinity and no NaN: they are the texts "inf", "-inf" and "nan".
    """

    def __init__(self, path: Path, clock: Clock = time.time) -> None:
        """Start the file anew.

        Raises:
            UserInputError: it cannot be written.
        """
        super().__init__()
        self._path = path
        self._clock = clock
        self._open: dict[Stage, float] = {}  # when each last wrote a progress line
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserInputError:
        return UserInputError(
            f"the metrics file {self._path} cannot be written: {error.strerror or error}; "
            "name a file in an existing folder that you may write, on a disk with free space"
        )

    def _write(self, event: str, **fields: Any) -> None:
        line: dict[str, Any] = {"time": round(self._clock(), 3), "event": event}
        if self._open:
            line["stage"] = next(reversed(self._open)).name
        line |= {key: _plain_value(value) for key, value in fields.items()}
        try:
            self._file.write(json.dumps(line, default=str, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def stage_started(self, stage: Stage) -> None:
        """stage_start."""
        self._open[stage] = -math.inf
        self._write("stage_start", stage=stage.name, total=stage.total, unit=stage.unit)

    def stage_advanced(self, stage: Stage) -> None:
        """progress, unless the last one is less than a second old."""
        last = stage.total is not None and stage.done >= stage.total
        if last or self._clock() - self._open.get(stage, -math.inf) >= _JSONL_EVERY_S:
            self._open[stage] = self._clock()
            self._write(
                "progress",
                stage=stage.name,
                done=stage.done,
                total=stage.total,
                detail=stage.detail,
            )

    def stage_ended(self, stage: Stage) -> None:
        """stage_end."""
        if stage in self._open:
            del self._open[stage]
            self._write(
                "stage_end",
                stage=stage.name,
                done=stage.done,
                seconds=round(stage.seconds, 3),
                failed=stage.failed,
            )

    def metric(self, name: str, value: float, /, **fields: Any) -> None:
        """Metric; a field never hides `name`, `value`, `time`, `event` or `stage`."""
        own = {"name": name, "value": float(value)}
        taken = {*own, "time", "event", "stage"}
        self._write(
            "metric", **own, **{(f"{k}_" if k in taken else k): v for k, v in fields.items()}
        )

    def note(self, text: str) -> None:
        """A note."""
        self._write("note", text=text)

    def warn(self, text: str) -> None:
        """A warning."""
        self._write("warning", text=text)

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError as error:
            raise self._unwritable(error) from None


class Tee(ProgressSink):
    """Tells several sinks the same, in their order. All are told, even when one of them fails."""

    def __init__(self, *sinks: ProgressSink) -> None:
        """The sinks in the order in which they are told."""
        super().__init__()
        self._sinks = sinks

    def _tell(self, call: Callable[[ProgressSink], None]) -> None:
        with ExitStack() as calls:
            for sink in reversed(self._sinks):  # the stack calls the last one first
                calls.callback(call, sink)

    def stage_started(self, stage: Stage) -> None:
        """Passed on."""
        self._tell(lambda sink: sink.stage_started(stage))

    def stage_advanced(self, stage: Stage) -> None:
        """Passed on."""
        self._tell(lambda sink: sink.stage_advanced(stage))

    def stage_ended(self, stage: Stage) -> None:
        """Passed on."""
        self._tell(lambda sink: sink.stage_ended(stage))

    def metric(self, name: str, value: float, /, **fields: Any) -> None:
        """Passed on."""
        self._tell(lambda sink: sink.metric(name, value, **fields))

    def note(self, text: str) -> None:
        """Passed on."""
        self._tell(lambda sink: sink.note(text))

    def warn(self, text: str) -> None:
        """Passed on."""
        self._tell(lambda sink: sink.warn(text))

    def close(self) -> None:
        """Passed on."""
        self._tell(lambda sink: sink.close())


class Interrupts(ProgressSink):
    """Ctrl-C and SIGTERM interrupt, and keep doing so.

    Python drops an exception that is raised in a destructor or a callback, and an interrupted
    export has ended as if nothing had happened. So the wish is remembered, and raised again at the
    next sign of progress, before anything is published.
    """

    def __init__(self) -> None:
        """Take over both signals, where that is allowed: not outside of the main thread."""
        super().__init__()
        self._asked = False
        self._before: dict[int, Any] = {}
        with suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True
        raise KeyboardInterrupt

    def _raise(self) -> None:
        if self._asked:
            raise KeyboardInterrupt

    def stage_started(self, stage: Stage) -> None:
        """A sign of progress."""
        self._raise()

    def stage_advanced(self, stage: Stage) -> None:
        """A sign of progress."""
        self._raise()

    def stage_ended(self, stage: Stage) -> None:
        """A sign of progress."""
        self._raise()

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def open_progress(kind: Kind, metrics: Path | None = None) -> ProgressSink:
    """The sink a command line asks for.

    Args:
        kind: "auto" is "live" on a terminal and "plain" elsewhere.
        metrics: a file for JsonlMetrics, told beside the other.

    Raises:
        UserInputError: the file cannot be written, or "live" without a terminal.
    """
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    if kind == "live" and not terminal:
        raise UserInputError(
            "progress: live needs a terminal and standard error is none; use auto or plain"
        )
    files = [JsonlMetrics(metrics)] if metrics is not None else []
    shown: ProgressSink
    if kind == "silent":
        shown = Silent()
    elif kind == "plain" or not terminal:
        shown = Plain()
    else:
        from elsa_compile.progress_live import Live  # rich is worth loading only here

        shown = Live()
    return Tee(shown, *files) if files else shown


def _plain_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
