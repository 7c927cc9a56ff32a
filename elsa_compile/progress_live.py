"""Progress on a terminal: a bar for each open stage, what is in hand, the last metrics.

Drawn only while a stage is open; what is over scrolls away as one plain line each. So whatever
ends the last stage, Ctrl-C included, gives the terminal back.
"""

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live as LiveDisplay
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from elsa_compile.progress_sink import ProgressSink, Stage, ended_line, metric_text, one_line

_REFRESH_PER_S = 8.0


class _Count(TextColumn):
    """Units done, "12 of 30 weights", or "12 weights" when the total is unknown."""

    def __init__(self) -> None:
        """Text that is made in `render`."""
        super().__init__("", markup=False)

    def render(self, task: Task) -> Text:
        """The text for one bar."""
        of = f" of {task.total:,.0f}" if task.total is not None else ""
        if task.total is None and not task.completed:
            return Text("")
        return Text(f"{task.completed:,.0f}{of} {task.fields['unit']}", no_wrap=True)


class Live(ProgressSink):
    """A live display on standard error."""

    def __init__(self, console: Console | None = None) -> None:
        """Draw on `console` (standard error)."""
        super().__init__()
        self._console = console if console is not None else Console(stderr=True)
        self._tasks: dict[Stage, TaskID] = {}
        self._metrics: dict[Stage, dict[str, str]] = {}
        self._display: LiveDisplay | None = None
        self._bars = self._new_bars()

    def _new_bars(self) -> Progress:
        # markup=False everywhere: a weight may be called "[red]".
        return Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            _Count(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
        )

    def _frame(self) -> RenderableType:
        metrics = [text for of_stage in self._metrics.values() for text in of_stage.values()]
        details = [stage.detail for stage in self._tasks if stage.detail]
        below = [(" \N{MIDDLE DOT} ".join(metrics), ""), (details[-1] if details else "", "dim")]
        lines = [
            Text("  " + text, style=style, no_wrap=True, overflow="ellipsis")
            for text, style in below
            if text
        ]
        return Group(self._bars, *lines)

    def stage_started(self, stage: Stage) -> None:
        """Draw its bar."""
        if self._display is None:
            self._bars = self._new_bars()
            self._display = LiveDisplay(
                get_renderable=self._frame,
                console=self._console,
                refresh_per_second=_REFRESH_PER_S,
                transient=True,
                redirect_stdout=False,  # results go there, not into the display
            )
            self._display.start()
        label = "  " * stage.depth + stage.name
        self._tasks[stage] = self._bars.add_task(label, total=stage.total, unit=stage.unit)
        self._metrics[stage] = {}

    def stage_advanced(self, stage: Stage) -> None:
        """Move its bar; the display redraws itself at its own pace."""
        if stage in self._tasks:
            self._bars.update(self._tasks[stage], completed=stage.done)

    def stage_ended(self, stage: Stage) -> None:
        """Replace its bar by one line; after the last stage take the display down."""
        task = self._tasks.pop(stage, None)
        metrics = self._metrics.pop(stage, {})
        if task is not None:
            self._bars.remove_task(task)
        if not self._tasks:
            self.close()
        if task is not None:
            mark, style = ("x", "red") if stage.failed else ("\N{CHECK MARK}", "green")
            if self._console.options.ascii_only:
                mark = "x" if stage.failed else "+"
            line = Text("  " * stage.depth).append(mark, style=style)
            self._print(line.append(" " + ended_line(stage, list(metrics.values()))))

    def metric(self, name: str, value: float, /, **fields: Any) -> None:
        """Shown while its stage runs and in the stage's line; outside of stages a line."""
        text = metric_text(name, value, fields)
        if self._metrics:
            self._metrics[next(reversed(self._metrics))][name] = text
        else:
            self._print(Text(text))

    def note(self, text: str) -> None:
        """A line above the bars."""
        self._print(Text(one_line(text)))

    def warn(self, text: str) -> None:
        """A line above the bars that says so."""
        self._print(Text("warning: ", style="yellow").append(one_line(text), style="default"))

    def close(self) -> None:
        """Take the display down."""
        display, self._display = self._display, None
        if display is not None:
            display.stop()

    def _print(self, text: Text) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)
