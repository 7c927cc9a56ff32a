"""allocate-fisher: one threshold for all weights, on what removing each would cost.

To second order, removing a weight w raises the loss by v w^2 / 2, where v is the diagonal of the
Fisher information (optimal brain damage). Whatever lies under one global threshold goes.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from elsa_compile.data import Samples
from elsa_compile.pass_base import Context, Pass, option, register_pass
from elsa_compile.passes.allocation import Distribution, MeasuringAllocator, pieces
from elsa_compile.passes.fisher import LOSSES, squared_gradients
from elsa_compile.passes.global_threshold import kept_bounds, kept_pieces, piece_scores
from elsa_compile.program import Program, WeightPlan

FLOOR = 0.4
CAP = 3.0


def fisher_distribution(
    owner: Pass,
    program: Program,
    plans: dict[str, WeightPlan],
    ctx: Context,
    samples: Samples,
    loss: str = "auto",
    floor: float = FLOOR,
    cap: float = CAP,
) -> Distribution:
    """Measure the Fisher information; returns what distributes a total by one threshold.

    Args:
        owner: the pass, for messages.
        program: the model.
        plans: of the weights to prune.
        ctx: device, seed, progress.
        samples: one gradient each.
        loss: see `fisher`.
        floor: see `kept_bounds`.
        cap: see `kept_bounds`.
    """
    weights = [program.weights[name] for name in plans]
    information = squared_gradients(owner, program, weights, samples, ctx, loss)
    ascending: list[Tensor] = []
    for weight, plan in zip(weights, plans.values(), strict=True):
        cost = information.pop(weight.name)
        cost = cost * weight.matrix().to(cost.device).float().square()
        ascending.append(piece_scores(cost, plan.pattern))
    parts = [pieces(plan) for plan in plans.values()]
    sizes, entries = [part.size for part in parts], sum(part.entries for part in parts)

    def distribution(total: int) -> list[int]:
        bounds = kept_bounds(parts, 1 - total / entries, floor, cap)
        counts = kept_pieces(ascending, sizes, entries - total, *bounds)
        return [part.count - count for part, count in zip(parts, counts, strict=True)]

    return distribution


@register_pass
@dataclass(frozen=True, kw_only=True)
class AllocateFisher(MeasuringAllocator):
    """Keep the weights whose removal would raise the loss most; needs data and gradients.

    One threshold on Fisher information times squared weight decides how much each weight matrix
    keeps, within bounds; which entries it keeps is for the pruning pass to decide.
    """

    name: ClassVar[str] = "allocate-fisher"

    loss: str = option(
        "auto",
        "whose gradients: next-token (language models), labels drawn from the model's own class "
        "scores, or outputs; auto: by the model",
        choices=LOSSES,
    )
    floor: float = option(
        FLOOR, "least density of a weight, in units of the mean density", low=0.0, high=1.0
    )
    cap: float = option(CAP, "largest density of a weight, in the same units", low=1.0)

    def measure(
        self, program: Program, plans: dict[str, WeightPlan], ctx: Context, samples: Samples
    ) -> Distribution:
        """One threshold on what removal would cost."""
        return fisher_distribution(
            self, program, plans, ctx, samples, self.loss, self.floor, self.cap
        )
