"""What every progress sink is: stages that open and close, and the words all sinks use."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any


class Stage:
    """One stage of a run while it is open.

    Attributes:
        name: of the stage.
        total: number of units to do, or None when unknown.
        unit: what is counted, in the plural.
        done: units finished so far.
        detail: what is in hand, such as the name of a weight.
        depth: number of stages around this one.
        seconds: how long it ran; set when it ends.
        failed: name of the exception that ended it, or None.
    """

    def __init__(
        self, sink: "ProgressSink", name: str, total: int | None, unit: str, depth: int
    ) -> None:
        """Made by `ProgressSink.stage`."""
        self.name = one_line(name)
        self.total = total
        self.unit = unit
        self.done = 0
        self.detail = ""
        self.depth = depth
        self.seconds = 0.0
        self.failed: str | None = None
        self._sink = sink

    def advance(self, n: int = 1, detail: str = "") -> None:
        """Count `n` more units as done; n = 0 only says what is in hand."""
        self.done += n
        if detail:
            self.detail = one_line(detail)
        self._sink.stage_advanced(self)


class ProgressSink:
    """Base of all sinks: opens stages and forgets everything else.

    A subclass overrides what it wants to hear of: `stage_started`, `stage_advanced`,
    `stage_ended`, `metric`, `note`, `warn`, `close`. Stages may lie inside each other.
    """

    def __init__(self) -> None:
        """No stage is open."""
        self._depth = 0

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "weights") -> Iterator[Stage]:
        """Open a stage; it ends when the `with` block is left, in whatever way."""
        stage = Stage(self, name, total, unit, self._depth)
        started = time.monotonic()
        self._depth += 1
        try:
            self.stage_started(stage)
            yield stage
        except BaseException as error:  # Ctrl-C too: what was drawn must be taken down
            stage.failed = type(error).__name__
            raise
        finally:
            self._depth -= 1
            stage.seconds = time.monotonic() - started
            self.stage_ended(stage)

    def stage_started(self, stage: Stage) -> None:
        """A stage begins."""

    def stage_advanced(self, stage: Stage) -> None:
        """Its `done` or `detail` changed."""

    def stage_ended(self, stage: Stage) -> None:
        """It is over; `seconds` and `failed` are set. May come without `stage_started`."""

    def metric(self, name: str, value: float, /, **fields: Any) -> None:
        """A measured number, such as a perplexity; `fields` say of what."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def warn(self, text: str) -> None:
        """Something the user should look at."""

    def close(self) -> None:
        """Nothing follows. May be called twice."""

    def __enter__(self) -> "ProgressSink":
        """The sink itself; it is closed at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


def remaining_s(stage: Stage, elapsed_s: float) -> float | None:
    """Seconds to the end of a stage at the pace so far; None while nothing can be said."""
    if not stage.total or not 0 < stage.done <= stage.total:
        return None
    return elapsed_s / stage.done * (stage.total - stage.done)


def duration(seconds: float) -> str:
    """Seconds for people: "4.2 s", "3 min 05 s", "2 h 07 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def ended_line(stage: Stage, metrics: list[str]) -> str:
    """What is left to read of a stage: "prune-wanda: 30 weights in 12.3 s, loss 2.1"."""
    count = f"{stage.done:,} {stage.unit}" if stage.done or stage.total else "done"
    if stage.failed is not None:
        of = f" of {stage.total:,}" if stage.total is not None else ""
        count = f"stopped by {stage.failed} after {stage.done:,}{of} {stage.unit}"
    return ", ".join([f"{stage.name}: {count} in {duration(stage.seconds)}", *metrics])


def metric_text(name: str, value: float, fields: dict[str, Any]) -> str:
    """A metric for people: "perplexity 12.34 (model=dense)"; the bar tells the step."""
    number = float(value)
    text = f"{number:,.0f}" if number.is_integer() and abs(number) < 1e15 else f"{number:.5g}"
    said = ", ".join(f"{key}={field}" for key, field in fields.items() if key != "step")
    return one_line(f"{name} {text}" + (f" ({said})" if said else ""))


def one_line(text: str) -> str:
    """Text that cannot move the cursor or change colours: names come from files of others."""
    unknown = "\N{REPLACEMENT CHARACTER}"
    return "".join(c if c.isprintable() else " " if c.isspace() else unknown for c in text)
