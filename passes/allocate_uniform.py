"""allocate-uniform: the same sparsity for every targeted weight."""

from dataclasses import dataclass
from typing import ClassVar

from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, option, register_pass
from elsa_compile.passes.allocation import (
    choose,
    ignore_option,
    pattern_option,
    resolve_sparsity,
    targets_option,
    write_plans,
)
from elsa_compile.patterns import parse_pattern
from elsa_compile.program import Program


@register_pass
@dataclass(frozen=True, kw_only=True)
class AllocateUniform(Pass):
    """Give every targeted weight the same sparsity and pattern.

    Without `targets`, all linear layers and convolutions are meant, except the output head of a
    language model: its rows are whole tokens, and pruning it costs far more accuracy than bytes.
    """

    name: ClassVar[str] = "allocate-uniform"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.PLANNED})
    preserves: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES, Fact.EXPORTABLE})

    sparsity: float | None = option(
        None,
        "fraction of zeros in each weight; null: 0.5, or what an N:M pattern implies",
        low=0.0,
        below=1.0,
    )
    pattern: str = pattern_option()
    targets: list[str] = targets_option()
    ignore: list[str] = ignore_option()

    def __post_init__(self) -> None:
        """Also check that sparsity and pattern agree, before any work starts."""
        super().__post_init__()
        resolve_sparsity(self.sparsity, parse_pattern(self.pattern), self.name)

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Write a plan for every prunable weight."""
        pattern = parse_pattern(self.pattern)
        sparsity = resolve_sparsity(self.sparsity, pattern, self.name)
        return write_plans(program, choose(self, program, pattern, sparsity))
