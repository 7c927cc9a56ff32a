"""The second half of joint pruning and quantisation: ADMM towards a low-bit grid, masks fixed.

    minimise f(w) subject to w in G, the values of the grid; split w = z with z in G, scaled dual u

    each step      w <- w + c (z - u - w)
    each interval  a = w + u;  z = the nearest values to a on the grid that loses least;  u = a - z
    at the end     w is projected: the trained weights are those that the file holds

The scale of each row or group is fitted anew at every projection, weighing errors by Adam's second
moment as the sparse projection does. z is kept as whole numbers, one byte an entry.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from elsa_compile.passes import admm
from elsa_compile.passes.adam import Adam
from elsa_compile.passes.quantisation import fit_scale, from_integers, to_integers
from elsa_compile.program import Grid, Weight


@dataclass
class _State:
    """Of one weight: z = codes * scale, and u in float32."""

    codes: Tensor
    scale: Tensor
    dual: Tensor

    def z(self) -> Tensor:
        return from_integers(self.codes, self.scale)


class GridAdmm:
    """Draws weights with fixed masks to a grid, between two steps of a run.

    Attributes:
        share: of the final strength that is in force.
    """

    def __init__(
        self,
        weights: list[Weight],
        adam: Adam,
        bits: int,
        group_size: int | None,
        span: tuple[int, int],
        interval: int,
        closing: float,
    ) -> None:
        """Z is the projection of the weights as they are, u is zero.

        Args:
            weights: pruned entries exactly zero, and held there by the caller.
            adam: whose second moment weighs rounding errors.
            bits: 8 or 4.
            group_size: entries along K that share a scale; None: a whole row.
            span: first step, and the step after the last one.
            interval: steps between projections.
            closing: share of the gap that the last interval closes.
        """
        self.weights, self.adam, self.bits = weights, adam, bits
        self.group_size, self.span = group_size, span
        self.interval, self.closing = interval, closing
        self.share = 0.0
        self.states = [self._projected(w, w.matrix()) for w in weights]

    def _projected(self, weight: Weight, matrix: Tensor) -> _State:
        moment = self.adam.second_moment(weight.name)
        moment = moment.t() if weight.transposed else moment.reshape(matrix.shape)
        # Rows that never had a gradient weigh their errors alike.
        moment = moment + 1e-3 * moment.mean() + torch.finfo(torch.float32).tiny
        size = None if weight.kind == "conv" else self.group_size
        scale = fit_scale(matrix, self.bits, size, moment)
        codes = to_integers(matrix, scale, self.bits)
        return _State(codes, scale, torch.zeros_like(matrix, dtype=torch.float32))

    def after_step(self, step: int) -> dict[str, float]:
        """Draw the weights to z - u; project once in an interval, and at the end for good."""
        first, end = self.span
        if step + 1 >= end:
            self.states = self.nearest()
            for weight, state in zip(self.weights, self.states, strict=True):
                weight.matrix().copy_(state.z())
            return {}
        if self.share > 0.0:
            strength = admm.pull(self.share * self.closing, self.interval)
            for weight, state in zip(self.weights, self.states, strict=True):
                weight.matrix().lerp_(state.z() - state.dual, strength)
        if (step - first) % self.interval:
            return {}
        return self._update((step + 1 - first) / (end - first))

    def _update(self, share: float) -> dict[str, float]:
        old, new = (admm.pull(s * self.closing, self.interval) for s in (self.share, share))
        gap = norm = 0.0
        for index, (weight, state) in enumerate(zip(self.weights, self.states, strict=True)):
            matrix = weight.matrix()
            sought = matrix + state.dual
            fresh = self._projected(weight, sought)
            z = fresh.z()
            fresh.dual = (sought - z).mul_(old / new)
            gap += float((matrix - z).square().sum())
            norm += float(matrix.square().sum())
            self.states[index] = fresh
        self.share = share
        return {"grid_gap": math.sqrt(gap / max(norm, 1e-30)), "grid_pull": new}

    def nearest(self) -> list[_State]:
        """The projection of the weights as they are now, without the dual."""
        return [self._projected(w, w.matrix()) for w in self.weights]

    def found(self) -> list[Grid]:
        """The grids of weights that lie on them, at the end of the run."""
        return [Grid(self.bits, state.scale.cpu()) for state in self.states]

    def tensors(self) -> dict[str, Tensor]:
        """For a snapshot."""
        held = {"grid.share": torch.tensor(self.share, dtype=torch.float64)}
        for weight, state in zip(self.weights, self.states, strict=True):
            held[f"grid.codes.{weight.name}"] = state.codes
            held[f"grid.scale.{weight.name}"] = state.scale
            held[f"grid.dual.{weight.name}"] = state.dual
        return held

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Back to a snapshot."""
        self.share = float(tensors["grid.share"])
        self.states = [
            _State(*(tensors[f"grid.{part}.{w.name}"] for part in ("codes", "scale", "dual")))
            for w in self.weights
        ]
