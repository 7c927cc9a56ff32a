"""quantize-activations: whether products of quantised weights round their activations."""

from dataclasses import dataclass
from typing import ClassVar

from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, option, register_pass
from elsa_compile.program import Program


@register_pass
@dataclass(frozen=True, kw_only=True)
class QuantizeActivations(Pass):
    """Let the file say how its quantised weights are multiplied: with rounded or exact activations.

    integer is dynamic: int8 with a scale for some 32 entries in onnxruntime, up to 16 bits with one
    scale a token in our kernels. With --eval-data the report has the perplexity of the latter too,
    simulated in torch. float32 makes products exact, and slower. Without this pass it is left to
    whoever opens the file, integer by default. Our runtime obeys the file; a plain onnxruntime
    session does not read it, see docs/passes.md.
    """

    name: ClassVar[str] = "quantize-activations"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})
    preserves: ClassVar[frozenset[Fact]] = frozenset(Fact)

    to: str = option(
        "integer", "what products see of the activations", choices=("integer", "float32")
    )

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Note the choice; the exporter writes it into the file."""
        grids = {n: g for n, g in program.grids().items() if program.weights[n].kind != "conv"}
        stats = PassStats(changed=int(program.activations != self.to))
        program.activations = self.to
        rows = sum(grid.bits == 8 and grid.scale.shape[1] == 1 for grid in grids.values())
        stats.counts = {"a_scale_a_token": rows, "a_scale_a_block": len(grids) - rows}
        if not grids:
            stats.notes.append("only convolutions are quantised, whose activations stay exact")
        return stats
