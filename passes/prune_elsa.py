"""prune-elsa: surrogate-free ADMM on the true loss (ELSA, arXiv 2510.01650), and beyond it.

The whole model is trained while an ADMM penalty draws every planned weight to a sparse matrix,
chosen anew once in an interval; see admm.py for the mathematics.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, PassStats, option, register_pass
from elsa_compile.passes import admm
from elsa_compile.passes.adam import Adam
from elsa_compile.passes.masking import apply_mask, finish
from elsa_compile.passes.training import TrainingPass, finish_stats, prepared, snapshots_of
from elsa_compile.program import Program, Weight, WeightPlan

STORES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
FP8_MAX = 448.0
FP8_BLOCK = 256
UPDATES = 50  # projections of a run; twelve were too few (docs/elsa.md)


class Store:
    """The merged ADMM state t of one weight in float32, bfloat16, or float8 with block scales."""

    def __init__(self, kind: str) -> None:
        """Empty; `write` comes first."""
        self.kind = kind
        self.values = self.scale = torch.empty(0)

    def write(self, target: Tensor) -> None:
        """Keep t (N, K) float32."""
        self.shape = target.shape
        if self.kind != "fp8":
            self.values = target.to(STORES[self.kind])
            return
        flat = target.reshape(-1)
        flat = nn.functional.pad(flat, (0, -len(flat) % FP8_BLOCK)).view(-1, FP8_BLOCK)
        self.scale = flat.abs().amax(dim=1, keepdim=True).div_(FP8_MAX).clamp_min_(1e-30)
        self.values = (flat / self.scale).to(STORES["fp8"])

    def read(self) -> Tensor:
        """T (N, K) float32; the stored tensor itself when that is float32."""
        if self.kind != "fp8":
            return self.values.float()
        flat = (self.values.float() * self.scale).view(-1)
        return flat[: self.shape.numel()].view(self.shape)


class Admm:
    """The constraint of a run: state, penalty and projection of every planned weight.

    Attributes:
        share: of the final penalty that is in force.
        masks: packed, of the last update; the final ones once `fixed`.
        fixed: the masks no longer change; pruned entries are held at zero.
    """

    def __init__(
        self, options: "PruneElsa", pairs: list[tuple[Weight, WeightPlan]], adam: Adam, steps: int
    ) -> None:
        """Z is the projection of the dense weights by magnitude, u is zero."""
        self.options, self.adam, self.pairs = options, adam, pairs
        self.interval = options.interval or min(32, max(1, steps // UPDATES))
        self.until = max(1, round(steps * (1.0 - options.refine)))
        self.share = admm.penalty_share(options.schedule(), 0.0)
        self.fixed = False
        self.masks: list[Tensor] = []
        self.targets = [Store(options.merged_state) for _ in pairs]
        self.bool_masks: list[Tensor] = []
        for (weight, plan), store in zip(pairs, self.targets, strict=True):
            matrix = weight.matrix()
            mask = admm.project(matrix.float().square(), self._sparsity(plan, 0), plan.pattern)
            store.write(admm.initial_target(matrix, mask))
            self.masks.append(admm.pack_mask(mask))

    def _sparsity(self, plan: WeightPlan, step: int) -> float:
        from elsa_compile.patterns import NM

        if isinstance(plan.pattern, NM):
            return plan.sparsity
        return admm.annealed_sparsity(plan.sparsity, step / self.until, self.options.anneal)

    def _strength(self, share: float) -> float:
        """lam, or the share of the gap that a step closes when lam is auto."""
        lam = self.options.lam
        if isinstance(lam, str):
            return admm.pull(share * self.options.closing, self.interval)
        return share * lam

    def add_gradient(self, step: int) -> None:
        """The paper's penalty: lam (w - t) joins the gradient, after clipping."""
        if self.fixed or isinstance(self.options.lam, str) or self.share == 0.0:
            return
        for (weight, _), store in zip(self.pairs, self.targets, strict=True):
            if weight.parameter.grad is not None:
                gap = weight.matrix() - store.read()
                weight.parameter.grad.add_(weight.to_stored(gap), alpha=self._strength(self.share))

    def after_step(self, step: int) -> dict[str, float]:
        """Draw the weights to t; project once in an interval; hold the zeros once fixed."""
        if self.fixed:
            self._hold()
            return {}
        if isinstance(self.options.lam, str) and self.share > 0.0:
            strength = self._strength(self.share)
            for (weight, _), store in zip(self.pairs, self.targets, strict=True):
                weight.matrix().lerp_(store.read(), strength)
        last = step + 1 >= self.until
        values = self.update(step) if step % self.interval == 0 and not last else {}
        if last:
            self._fix()
        return values

    def update(self, step: int) -> dict[str, float]:
        """One ADMM update of z and u for every weight; what changed."""
        share = admm.penalty_share(self.options.schedule(), step / self.until)
        old, new = self._strength(self.share), self._strength(share)
        rescale = old / new if new > 0.0 else 1.0
        primal = norm = dual = changed = entries = 0.0
        for index, (weight, plan) in enumerate(self.pairs):
            matrix, store = weight.matrix(), self.targets[index]
            mask = admm.unpack_mask(self.masks[index], matrix.shape)
            target = store.read()
            accumulation = admm.accumulated(matrix, target, mask)
            kept = self._project(weight, plan, accumulation, self._sparsity(plan, step))
            dual += float(
                (torch.where(kept, accumulation, 0) - torch.where(mask, target, 0)).square().sum()
            )
            fresh = admm.split(accumulation, kept, rescale)
            gap, size = admm.primal_residual(matrix, fresh, kept)
            primal, norm = primal + gap, norm + size
            changed, entries = changed + admm.churn(mask, kept), entries + mask.numel()
            store.write(fresh)
            self.masks[index] = admm.pack_mask(kept)
        self.share = share
        return {
            "primal": math.sqrt(primal / max(norm, 1e-30)),
            "dual": math.sqrt(dual / max(norm, 1e-30)),
            "churn": changed / entries,
            "penalty": new,
        }

    def _project(self, weight: Weight, plan: WeightPlan, matrix: Tensor, sparsity: float) -> Tensor:
        moment = self.adam.second_moment(weight.name)
        moment = moment.t() if weight.transposed else moment.reshape(matrix.shape)
        scores = admm.importance(matrix, moment, self.options.projection)  # type: ignore[arg-type]
        return admm.project(scores, sparsity, plan.pattern)

    def _fix(self) -> None:
        """The final projection, of w itself; from here on the masks stay."""
        self.bool_masks = []
        for index, (weight, plan) in enumerate(self.pairs):
            matrix = weight.matrix()
            mask = self._project(weight, plan, matrix, plan.sparsity)
            self.masks[index] = admm.pack_mask(mask)
            self.bool_masks.append(mask)
        self.fixed, self.targets = True, []
        self._hold()

    def _hold(self) -> None:
        for (weight, _), mask in zip(self.pairs, self.bool_masks, strict=True):
            weight.matrix().mul_(mask)

    @contextlib.contextmanager
    def projected(self) -> Iterator[None]:
        """The weights projected as at the end of the run."""
        if self.fixed:
            yield
            return
        saved = [weight.parameter.detach().clone() for weight, _ in self.pairs]
        try:
            for weight, plan in self.pairs:
                matrix = weight.matrix()
                matrix.mul_(self._project(weight, plan, matrix, plan.sparsity))
            yield
        finally:
            for (weight, _), values in zip(self.pairs, saved, strict=True):
                weight.parameter.data.copy_(values)

    def tensors(self) -> dict[str, Tensor]:
        """Targets, packed masks, the penalty's share and whether the masks are fixed."""
        found = {"share": torch.tensor(self.share, dtype=torch.float64)}
        found["fixed"] = torch.tensor(self.fixed)
        for (weight, _), mask in zip(self.pairs, self.masks, strict=True):
            found[f"mask.{weight.name}"] = mask
        for (weight, _), store in zip(self.pairs, self.targets, strict=False):
            found[f"target.{weight.name}"] = store.values
            if store.kind == "fp8":
                found[f"scale.{weight.name}"] = store.scale
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Back to a snapshot."""
        self.share, self.fixed = float(tensors["share"]), bool(tensors["fixed"])
        names = [weight.name for weight, _ in self.pairs]
        self.masks = [tensors[f"mask.{name}"] for name in names]
        self.bool_masks, self.targets = [], []
        for weight, mask in zip([w for w, _ in self.pairs], self.masks, strict=True):
            if self.fixed:
                self.bool_masks.append(admm.unpack_mask(mask, weight.matrix().shape))
                continue
            store = Store(self.options.merged_state)
            store.values, store.shape = tensors[f"target.{weight.name}"], weight.matrix().shape
            store.scale = tensors.get(f"scale.{weight.name}", store.scale)
            self.targets.append(store)

    def state_bytes(self) -> int:
        """Bytes held for targets and masks."""
        held = [*self.masks, *self.bool_masks, *(s.values for s in self.targets)]
        held += [s.scale for s in self.targets if s.kind == "fp8"]
        return sum(t.numel() * t.element_size() for t in held)


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
    merged_state: str = option(
        "fp32", "how the ADMM state is kept", choices=("fp32", "bf16", "fp8")
    )

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
        plan: dict[str, Any] = {w.name: [p.sparsity, str(p.pattern)] for w, p in pairs}
        with prepared(self, program, ctx) as training:
            snapshots = snapshots_of(self, training, ctx, plan)
            dense = snapshots.folder / "dense.safetensors"  # not in memory while training
            save_dense(dense, [w for w, _ in pairs])
            with torch.no_grad():
                constraint = Admm(self, pairs, training.adam, training.settings.steps)
            training.constraint = constraint
            training.run(snapshots)
        with safe_open(dense, framework="pt") as file:
            for (weight, plan_of), mask in zip(pairs, constraint.bool_masks, strict=True):
                trained = weight.matrix().clone()
                weight.parameter.data.copy_(file.get_tensor(weight.name))
                stats.changed += apply_mask(weight, plan_of, trained, mask.to(trained.device))
        snapshots.close()
        return finish(program, finish_stats(training, stats))


def save_dense(path: Path, weights: list[Weight]) -> None:
    """The planned weights before training, for the error that the report shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({w.name: w.parameter.detach().contiguous() for w in weights}, path)
