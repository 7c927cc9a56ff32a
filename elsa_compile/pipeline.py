"""Running passes: the order check, the facts, timing, dumps of the graph.

`check_order` needs neither a model nor data and runs before anything expensive.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from elsa_compile import facts
from elsa_compile.errors import ElsaError, UserInputError
from elsa_compile.facts import Fact, FactError
from elsa_compile.pass_base import Context, Pass
from elsa_compile.program import PassRecord, Program

log = logging.getLogger(__name__)

Verify = Literal["each", "end", "off"]
INITIAL = frozenset({Fact.SHAPES, Fact.EXPORTABLE})  # what a freshly traced program has
VERIFY_DEFAULT: Verify = "each"


def held_after(held: Iterable[Fact], step: Pass) -> frozenset[Fact]:
    """Facts after a pass: what it preserves of those held, and what it establishes."""
    return (frozenset(held) & step.preserves) | step.establishes


def check_order(passes: Sequence[Pass], held: Iterable[Fact] = INITIAL) -> frozenset[Fact]:
    """Facts that will hold at the end.

    Raises:
        UserInputError: a pass stands before what it requires (names a pass that would supply it),
            or behind the quantisation it would undo.
    """
    now = frozenset(held)
    for step in passes:
        missing = sorted(fact.name for fact in step.requires - now)
        if missing:
            raise UserInputError(
                f"{step.name} needs {', '.join(missing)}, which no pass before it establishes"
                f"{_advice(step.requires - now)}"
            )
        if Fact.QUANTIZED in now - held_after(now, step):
            raise UserInputError(
                f"{step.name} moves weights off the grid they were quantised to; put the pass that "
                "quantises behind it"
            )
        now = held_after(now, step)
    return now


def _advice(missing: frozenset[Fact]) -> str:
    from elsa_compile.pass_base import registered_passes

    known = registered_passes()
    able = [n for n, cls in known.items() if missing <= cls.establishes]
    if able:
        return f"; put one of these before it: {', '.join(able)}"
    parts = []
    for fact in Fact:
        able = [n for n, cls in known.items() if fact in missing & cls.establishes]
        parts += [f"; for {fact.name}, put one of these before it: {', '.join(able)}"] * bool(able)
    return "".join(parts)


def check_data(passes: Sequence[Pass], has_data: bool) -> None:
    """Raise UserInputError when a pass needs data and there is none."""
    for step in passes:
        if step.needs_data and not has_data:
            raise UserInputError(
                f"{step.name} needs calibration data and none was given; add --data FILE (text for "
                "language models, .npz or .safetensors otherwise)"
            )


@dataclass
class Dump:
    """Writes the graph as numbered text after every pass that changed it.

    Files are `NN-pass.txt`; 00 is the program as traced.
    """

    folder: Path
    number: int = 0
    last: str = ""

    def write(self, program: Program, name: str) -> None:
        """Write one file, unless the text is that of the last one."""
        text = program.to_text()
        if text != self.last:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / f"{self.number:02d}-{name}.txt").write_text(text, encoding="utf-8")
            except OSError as error:
                raise UserInputError(
                    f"--dump-ir: {self.folder} cannot be written: {error.strerror}"
                ) from None
            self.last = text
        self.number += 1


def check_facts(program: Program, after: str) -> None:
    """Run the checker of every held fact.

    Raises:
        ElsaError: names the pass, the fact and the weight.
    """
    for fact in Fact:
        if fact not in program.facts:
            continue
        try:
            facts.check(program, fact)
        except FactError as error:
            raise ElsaError(f"after {after}, {fact.name} no longer holds: {error}") from error


def run(
    program: Program,
    passes: Sequence[Pass],
    ctx: Context,
    *,
    verify: Verify | None = None,
    dump: Path | None = None,
) -> None:
    """Run passes in order on a program, in place.

    Args:
        program: gets its weights, plans, facts and history changed.
        passes: in order.
        ctx: what the passes may read.
        verify: "each" re-checks every held fact after every pass, "end" once, "off" never; None
            takes VERIFY_DEFAULT.
        dump: folder for the graph as text.

    Raises:
        UserInputError: wrong order, missing data.
        ElsaError: a fact does not hold.
    """
    verify = verify or VERIFY_DEFAULT
    program.facts = program.facts or set(INITIAL)
    check_order(passes, program.facts)
    check_data(passes, ctx.samples is not None or ctx.training is not None)
    dumped = Dump(dump) if dump is not None else None
    if dumped is not None:
        dumped.write(program, "traced")
    for step in passes:
        started = time.perf_counter()
        stats = step.run(program, ctx)
        seconds = time.perf_counter() - started
        program.facts = set(held_after(program.facts, step))
        program.history.append(PassRecord(step.name, step.options(), seconds, stats))
        counts = ", ".join(f"{key} {value:g}" for key, value in stats.counts.items())
        log.info("%s: changed %d in %.1f s%s", step.name, stats.changed, seconds,
                 f" ({counts})" if counts else "")  # fmt: skip
        for note in stats.notes:
            ctx.progress.note(f"{step.name}: {note}")
        for warning in stats.warnings:
            ctx.progress.warn(f"{step.name}: {warning}")
        if verify == "each":
            check_facts(program, step.name)
        if dumped is not None:
            dumped.write(program, step.name)
    if verify == "end":
        check_facts(program, passes[-1].name if passes else "tracing")
