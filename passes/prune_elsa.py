"""prune-elsa: surrogate-free ADMM on the true loss (ELSA, arXiv 2510.01650), and beyond it.

The whole model is trained while an ADMM penalty draws every planned weight to a sparse matrix,
chosen anew once in an interval; see admm.py for the mathematics.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from elsa_compile.errors import UserInputError
from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, PassStats, option, register_pass
from elsa_compile.passes import admm
from elsa_compile.passes.admm_constraint import Admm
from elsa_compile.passes.coupled_units import couplings
from elsa_compile.passes.masking import apply_mask, finish
from elsa_compile.passes.quantisation import group_count
from elsa_compile.passes.training import finish_stats, prepared, snapshots_of
from elsa_compile.passes.training_options import TrainingPass
from elsa_compile.program import Program, Weight


@register_pass
@dataclass(frozen=True, kw_only=True)
class PruneElsa(TrainingPass):
    """Train under an ADMM penalty that draws the weights to sparse ones; the most accurate pass.

    Surrogate-free ADMM on the model's own loss (arXiv 2510.01650). `lam` given as a number is the
    paper's penalty inside Adam; `auto` needs no tuning: each interval closes a share of the gap
    between a weight and its sparse target, whatever the model's scale.
    """

    name: ClassVar[str] = "prune-elsa"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.PLANNED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.MASKED})
    preserves: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES, Fact.PLANNED, Fact.EXPORTABLE})

    lam: float | str = option(
        "auto", "final penalty of the paper, or auto: scale-free", low=0.0, choices=("auto",)
    )
    closing: float = option(
        0.8, "with lam auto: share of the gap that the last interval closes", low=0.0, below=1.0
    )
    lam_schedule: str = option(
        "linear", "how the penalty grows", choices=("constant", "linear", "cosine")
    )
    interval: int | None = option(
        None, "steps between projections; null: fifty projections a run, 32 steps at most", low=1
    )
    projection: str = option(
        "objective",
        "scores: v w^2 with Adam's second moment v, or w^2",
        choices=("objective", "euclidean"),
    )
    anneal: float = option(
        0.0, "share of the run over which the sparsity grows to its goal", low=0.0, high=1.0
    )
    refine: float = option(
        0.3, "share of the run, at its end, that trains with the masks fixed", low=0.0, below=1.0
    )
    quantize: str = option(
        "none",
        "also draw what is kept to a grid of so many bits while refining",
        choices=("none", "int8", "int4"),
    )
    group_size: int | None = option(
        None, "with quantize: inputs that share a scale; null: one for each output", low=2
    )
    merged_state: str = option(
        "fp32", "how the ADMM state is kept", choices=("fp32", "bf16", "fp8")
    )

    def __post_init__(self) -> None:
        """Also check options that need each other; joint quantisation establishes one more fact."""
        super().__post_init__()
        if self.gradient_release and not isinstance(self.lam, str):
            raise UserInputError(
                f"{self.name}: gradient_release updates weights before the penalty of lam="
                f"{self.lam:g} could join their gradients; use lam=auto, which stands beside Adam"
            )
        if self.quantize == "none":
            return
        if self.refine == 0.0:
            raise UserInputError(
                f"{self.name}: quantize={self.quantize} happens while refining, but refine is 0; "
                "leave it at 0.3"
            )
        object.__setattr__(self, "establishes", self.establishes | {Fact.QUANTIZED})

    def training_work(self, parameters: int, corpus_tokens: int, window: int) -> tuple[int, int]:
        """The merged state too."""
        tokens, held = super().training_work(parameters, corpus_tokens, window)
        return tokens, held + {"fp32": 4, "bf16": 2, "fp8": 1}[self.merged_state] * parameters

    def schedule(self) -> admm.Schedule:
        """`lam_schedule`, typed."""
        return self.lam_schedule  # type: ignore[return-value]

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Train, project, write the masks."""
        stats = PassStats()
        pairs = list(program.planned())
        if self.quantize != "none":
            check_groups(self, [w for w, _ in pairs])
        together = couplings(program, program.plans, self.name)
        plan: dict[str, Any] = {w.name: [p.sparsity, str(p.pattern)] for w, p in pairs}
        with prepared(self, program, ctx) as training:
            snapshots = snapshots_of(self, training, ctx, plan)
            dense = snapshots.folder / "dense.safetensors"  # not in memory while training
            save_dense(dense, [w for w, _ in pairs])
            with torch.no_grad():
                constraint = Admm(self, pairs, training.adam, training.settings.steps, together)
            training.constraint = constraint
            training.run(snapshots)
        with safe_open(dense, framework="pt") as file:
            for (weight, plan_of), mask in zip(pairs, constraint.bool_masks, strict=True):
                trained = weight.matrix().clone()
                weight.parameter.data.copy_(file.get_tensor(weight.name))
                stats.changed += apply_mask(weight, plan_of, trained, mask.to(trained.device))
        if constraint.grid is not None:
            for (_, plan_of), grid in zip(pairs, constraint.grid.found(), strict=True):
                plan_of.grid = grid
            stats.counts[self.quantize] = len(pairs)
        snapshots.close()
        return finish(program, finish_stats(training, stats))


def check_groups(owner: PruneElsa, weights: list[Weight]) -> None:
    """Every row must be a whole number of groups.

    Raises:
        UserInputError: one is not.
    """
    for weight in weights:
        try:
            group_count(weight.matrix_shape[1], None if weight.kind == "conv" else owner.group_size)
        except ValueError as error:
            raise UserInputError(
                f"{owner.name}: {weight.name} has {error}; choose another group_size, or null for "
                "one scale an output"
            ) from None


def save_dense(path: Path, weights: list[Weight]) -> None:
    """The planned weights before training, for the error that the report shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({w.name: w.parameter.detach().contiguous() for w in weights}, path)
