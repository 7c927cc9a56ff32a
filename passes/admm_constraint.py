"""The ADMM constraint of a training run: state, penalty and projection of every planned weight.

admm.py has the mathematics; prune_elsa.py runs it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from elsa_compile.passes import admm
from elsa_compile.passes.adam import Adam
from elsa_compile.passes.coupled_units import Coupling, coupled_masks
from elsa_compile.passes.grid_constraint import GridAdmm
from elsa_compile.patterns import NM, Neurons
from elsa_compile.program import Weight, WeightPlan

if TYPE_CHECKING:
    from elsa_compile.passes.prune_elsa import PruneElsa

STORES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
DROPPED_BITS = {"fp32": 0, "bf16": 16, "fp8": 20}  # of the mantissa of a float32
FP8_MAX = 448.0
FP8_BLOCK = 256
CHUNK = 1 << 20  # entries that are rounded at a time
UPDATES = 50  # projections of a run; twelve were too few (docs/elsa.md)


class Store:
    """The merged ADMM state t of one weight in float32, bfloat16, or float8 with block scales.

    Rounded stochastically to fewer bits. A kept entry has t = w: rounded to the nearest number, t
    would be the same again at every update until w had moved by half a step of the grid, and
    would draw w back to it.
    """

    def __init__(self, kind: str) -> None:
        """Empty; `write` comes first."""
        self.kind = kind
        self.values = self.scale = torch.empty(0)

    def write(self, target: Tensor, noise: Tensor) -> None:
        """Keep t.

        Args:
            target: t (N, K) float32.
            noise: of `rounding_noise`, on its device.
        """
        self.shape = target.shape
        if self.kind == "fp32":
            self.values = target
            return
        flat = target.reshape(-1)
        if self.kind == "fp8":
            blocks = nn.functional.pad(flat, (0, -len(flat) % FP8_BLOCK)).view(-1, FP8_BLOCK)
            self.scale = blocks.abs().amax(dim=1, keepdim=True).div_(FP8_MAX).clamp_min_(1e-30)
            flat = (blocks / self.scale).view(-1)
        self.values = torch.empty(flat.shape, dtype=STORES[self.kind], device=flat.device)
        for start in range(0, len(flat), CHUNK):
            part = rounded(flat[start : start + CHUNK], noise, DROPPED_BITS[self.kind])
            if self.kind == "fp8":
                part.clamp_(-FP8_MAX, FP8_MAX)  # a quotient may be a little larger, then NaN
            self.values[start : start + CHUNK] = part

    def read(self) -> Tensor:
        """T (N, K) float32; the stored tensor itself when that is float32."""
        if self.kind == "fp32":
            return self.values
        if self.kind == "bf16":
            return self.values.float().view(self.shape)
        flat = (self.values.float().view(-1, FP8_BLOCK) * self.scale).view(-1)
        return flat[: self.shape.numel()].view(self.shape)


def rounding_noise(kind: str, seed: int, step: int, device: torch.device) -> Tensor:
    """For `rounded`, one draw an update for all weights.

    Args:
        kind: of the store.
        seed: of the run.
        step: of the update.
        device: of the weights.

    Returns:
        (2^20,) int32, uniform over all numbers of the bits that are dropped; empty for float32.
    """
    if kind == "fp32":
        return torch.empty(0, dtype=torch.int32, device=device)
    generator = torch.Generator(device)
    generator.manual_seed(hash((seed, step, 1)) & 0x7FFFFFFFFFFFFFFF)  # not what Adam draws
    high = 1 << DROPPED_BITS[kind]
    return torch.randint(high, (CHUNK,), dtype=torch.int32, generator=generator, device=device)


def rounded(values: Tensor, noise: Tensor, bits: int) -> Tensor:
    """Float32 values with a shorter mantissa, up or down by chance so that the mean is the value.

    A cast to float8 then still rounds numbers below 2^-6 of its own, to nearest: entries below
    3.5e-5 of the largest of their block.

    >>> float(rounded(torch.tensor([1.0]), torch.tensor([65535], dtype=torch.int32), 16))
    1.0

    Args:
        values: (n,) float32, n at most that of `noise`.
        noise: int32, uniform in 0 .. 2^bits - 1.
        bits: of the mantissa that become zero.
    """
    raised = values.view(torch.int32) + noise[: len(values)]
    return raised.bitwise_and_(-(1 << bits)).view(torch.float32)


class Admm:
    """The constraint of a run: state, penalty and projection of every planned weight.

    Attributes:
        share: of the final penalty that is in force.
        masks: packed, of the last update; the final ones once `fixed`.
        fixed: the masks no longer change; pruned entries are held at zero.
        grid: draws the kept entries to a low-bit grid once the masks are fixed, if asked for.
    """

    def __init__(
        self,
        options: "PruneElsa",
        pairs: list[tuple[Weight, WeightPlan]],
        adam: Adam,
        steps: int,
        couplings: Sequence[Coupling] = (),
    ) -> None:
        """Z is the projection of the dense weights by magnitude, u is zero.

        Args:
            options: of the pass.
            pairs: the weights to prune and their plans.
            adam: whose second moment scores entries.
            steps: of the run.
            couplings: of weights that are planned as whole neurons or heads.
        """
        self.options, self.adam, self.pairs = options, adam, pairs
        self.couplings = couplings
        self.interval = options.interval or min(32, max(1, steps // UPDATES))
        self.until = max(1, round(steps * (1.0 - options.refine)))
        self.share = admm.penalty_share(options.schedule(), 0.0)
        self.fixed, self.steps = False, steps
        self.grid: GridAdmm | None = None
        self.masks: list[Tensor] = []
        self.targets = [Store(options.merged_state) for _ in pairs]
        self.bool_masks: list[Tensor] = []
        noise = self._rounding_noise(0)
        masks = self._projections(self._weight, 0, by_magnitude=True)
        for (weight, _), store, mask in zip(pairs, self.targets, masks, strict=True):
            store.write(admm.initial_target(weight.matrix(), mask), noise)
            self.masks.append(admm.pack_mask(mask))

    def _sparsity(self, plan: WeightPlan, step: int) -> float:
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
            found = {} if self.grid is None else self.grid.after_step(step)
            self._hold()
            return found
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
        noise = self._rounding_noise(step + 1)
        for index, kept in enumerate(self._projections(self._accumulated, step)):
            matrix, store = self._weight(index), self.targets[index]
            mask, target = self._mask(index), store.read()
            accumulation = admm.accumulated(matrix, target, mask)
            dual += float(
                (torch.where(kept, accumulation, 0) - torch.where(mask, target, 0)).square().sum()
            )
            fresh = admm.split(accumulation, kept, rescale)
            gap, size = admm.primal_residual(matrix, fresh, kept)
            primal, norm = primal + gap, norm + size
            changed, entries = changed + admm.churn(mask, kept), entries + mask.numel()
            store.write(fresh, noise)
            self.masks[index] = admm.pack_mask(kept)
        self.share = share
        return {
            "primal": math.sqrt(primal / max(norm, 1e-30)),
            "dual": math.sqrt(dual / max(norm, 1e-30)),
            "churn": changed / entries,
            "penalty": new,
        }

    def _rounding_noise(self, update: int) -> Tensor:
        device = self._weight(0).device if self.pairs else torch.device("cpu")
        return rounding_noise(self.options.merged_state, self.adam.seed, update, device)

    def _weight(self, index: int) -> Tensor:
        return self.pairs[index][0].matrix()

    def _mask(self, index: int) -> Tensor:
        return admm.unpack_mask(self.masks[index], self._weight(index).shape)

    def _accumulated(self, index: int) -> Tensor:
        target = self.targets[index].read()
        return admm.accumulated(self._weight(index), target, self._mask(index))

    def _projections(
        self, matrix: Callable[[int], Tensor], step: int | None, by_magnitude: bool = False
    ) -> Iterator[Tensor]:
        """Masks of all weights, one after another; those of whole units are chosen together.

        Args:
            matrix: what is projected, (N, K) by index.
            step: for the sparsity that is annealed to; None: the final one.
            by_magnitude: not by the second moment, which is empty at first.
        """

        def scores(index: int) -> Tensor:
            weight, values = self.pairs[index][0], matrix(index)
            if by_magnitude:
                return values.float().square()
            moment = self.adam.second_moment(weight.name)
            moment = moment.t() if weight.transposed else moment.reshape(values.shape)
            return admm.importance(values, moment, self.options.projection)  # type: ignore[arg-type]

        def sparsity(plan: WeightPlan) -> float:
            return plan.sparsity if step is None else self._sparsity(plan, step)

        units = {
            weight.name: (index, sparsity(plan))
            for index, (weight, plan) in enumerate(self.pairs)
            if isinstance(plan.pattern, Neurons)
        }
        together = coupled_masks(
            {name: scores(index) for name, (index, _) in units.items()},
            self.couplings,
            {c.name: units[c.members[0].weight][1] for c in self.couplings},
        )
        for index, (weight, plan) in enumerate(self.pairs):
            if weight.name in together:
                yield together[weight.name]
            else:
                yield admm.project(scores(index), sparsity(plan), plan.pattern)

    def _fix(self) -> None:
        """The final projection, of w itself; from here on the masks stay."""
        self.bool_masks = list(self._projections(self._weight, None))
        self.masks = [admm.pack_mask(mask) for mask in self.bool_masks]
        self.fixed, self.targets = True, []
        self._hold()
        self.grid = self._new_grid()

    def _new_grid(self) -> GridAdmm | None:
        options = self.options
        if options.quantize == "none":
            return None
        return GridAdmm(
            [weight for weight, _ in self.pairs],
            self.adam,
            int(options.quantize.removeprefix("int")),
            options.group_size,
            (self.until, self.steps),
            self.interval,
            options.closing,
        )

    def _hold(self) -> None:
        for (weight, _), mask in zip(self.pairs, self.bool_masks, strict=True):
            weight.matrix().mul_(mask)

    @property
    def is_projected(self) -> bool:
        """Whether the masks are fixed and nothing else is to be projected."""
        return self.fixed and self.grid is None

    @contextlib.contextmanager
    def projected(self) -> Iterator[None]:
        """The weights projected as at the end of the run."""
        if self.is_projected:
            yield
            return
        saved = [weight.parameter.detach().clone() for weight, _ in self.pairs]
        try:
            if self.grid is not None:
                for (weight, _), state in zip(self.pairs, self.grid.nearest(), strict=True):
                    weight.matrix().copy_(state.z())
            else:
                for index, mask in enumerate(self._projections(self._weight, None)):
                    self._weight(index).mul_(mask)
            yield
        finally:
            for (weight, _), values in zip(self.pairs, saved, strict=True):
                weight.parameter.data.copy_(values)

    def tensors(self) -> dict[str, Tensor]:
        """Targets, packed masks, the penalty's share and whether the masks are fixed."""
        found = {"share": torch.tensor(self.share, dtype=torch.float64)}
        found["fixed"] = torch.tensor(self.fixed)
        found |= {} if self.grid is None else self.grid.tensors()
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
        self.grid = self._new_grid() if self.fixed else None
        if self.grid is not None:
            self.grid.load(tensors)

    def state_bytes(self) -> int:
        """Bytes held for targets and masks."""
        held = [*self.masks, *self.bool_masks, *(s.values for s in self.targets)]
        held += [s.scale for s in self.targets if s.kind == "fp8"]
        return sum(t.numel() * t.element_size() for t in held)
