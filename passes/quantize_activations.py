"""quantize-activations: whether products of quantised weights round their activations to int8."""

from dataclasses import dataclass
from typing import ClassVar

from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, option, register_pass
from elsa_compile.program import Program


@register_pass
@dataclass(frozen=True, kw_only=True)
class QuantizeActivations(Pass):
    """Let the file say how its quantised weights are multiplied: int8 or exact activations.

    int8 is dynamic, one scale a token: the report then has the perplexity of that too, simulated in
    torch. float32 makes products exact, and slower. Without this pass it is left to whoever opens
    the file, int8 by default. Our runtime obeys the file; a plain onnxruntime session does not read
    it, see docs/passes.md.
    """

    name: ClassVar[str] = "quantize-activations"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})
    preserves: ClassVar[frozenset[Fact]] = frozenset(Fact)

    to: str = option("int8", "what products see of the activations", choices=("int8", "float32"))

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Note the choice; the exporter writes it into the file."""
        products = [n for n in program.grids() if program.weights[n].kind == "linear"]
        stats = PassStats(changed=int(program.activations != self.to))
        program.activations = self.to
        stats.counts = {"layers": len(products)}
        grouped = [n for n in products if program.grids()[n].scale.shape[1] > 1]
        if grouped and self.to == "int8":
            stats.notes.append(
                f"{len(grouped)} layers have scales for groups: onnxruntime multiplies them, and "
                "rounds activations with a scale for each group, which loses less than is simulated"
            )
        return stats
