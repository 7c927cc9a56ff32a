"""finetune-masked: train what is left of a pruned model; the zeros stay."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elsa_compile.errors import UserInputError
from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, PassStats, register_pass
from elsa_compile.passes.masking import finish
from elsa_compile.passes.objective import resolve_loss
from elsa_compile.passes.training import finish_stats, prepared, snapshots_of
from elsa_compile.passes.training_options import TrainingPass
from elsa_compile.program import Program, Weight


class FixedMasks:
    """The constraint of a run whose zeros are given."""

    def __init__(self, masked: list[tuple[Weight, Tensor]]) -> None:
        """The masks, (N, K) bool on the device of their weights."""
        self.masked = masked

    def add_gradient(self, step: int) -> None:
        """Nothing: pruned entries are put back to zero after each step."""

    def after_step(self, step: int) -> dict[str, float]:
        """Hold the zeros."""
        for weight, mask in self.masked:
            weight.matrix().mul_(mask)
        return {}

    @property
    def is_projected(self) -> bool:
        """Always."""
        return True

    @contextlib.contextmanager
    def projected(self) -> Iterator[None]:
        """The weights are sparse all along."""
        yield

    def tensors(self) -> dict[str, Tensor]:
        """Nothing that changes."""
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Nothing that changes."""


@register_pass
@dataclass(frozen=True, kw_only=True)
class FinetuneMasked(TrainingPass):
    """Train a pruned model with its zeros fixed: all other parameters may change.

    After a one-shot pass this is the strong baseline of the ELSA paper; after prune-elsa it is
    more of the refinement that pass ends with. Language models only, on cross-entropy: the dense
    model that others would learn from is gone.
    """

    name: ClassVar[str] = "finetune-masked"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.PLANNED, Fact.MASKED})
    preserves: ClassVar[frozenset[Fact]] = frozenset(
        {Fact.SHAPES, Fact.PLANNED, Fact.MASKED, Fact.EXPORTABLE}
    )

    def resolved_loss(self, program: Program) -> str:
        """Cross-entropy; whatever needs the dense model is refused."""
        loss = "ce" if self.loss == "auto" else self.loss
        if loss != "ce":
            raise UserInputError(
                f"{self.name}: loss is {loss!r}, but the dense model is gone once it is pruned; "
                "use ce, or prune-elsa, which learns from the dense model while it prunes"
            )
        return resolve_loss(loss, program)

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Train; masks and counts of zeros stay as they are."""
        pairs = [(weight, plan.mask) for weight, plan in program.planned()]
        plan = {w.name: int(mask.sum()) for w, mask in pairs if mask is not None}
        with prepared(self, program, ctx) as training:
            device = ctx.device
            masked = [(w, mask.to(device)) for w, mask in pairs if mask is not None]
            training.constraint = FixedMasks(masked)
            snapshots = snapshots_of(self, training, ctx, plan)
            training.run(snapshots)
            snapshots.close()
        stats = PassStats(changed=len(program.weights))
        for weight, _ in pairs:
            # -0.0 * mask is -0.0, which some readers would count as a value.
            matrix = weight.matrix()
            weight.write(torch.where(matrix == 0, 0, matrix))
        return finish(program, finish_stats(training, stats))
