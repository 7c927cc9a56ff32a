"""allocate-owl: layers with more outliers keep more weights.

OWL (Yin et al., "Outlier Weighed Layerwise Sparsity", arXiv 2310.05175). The outlier ratio of a
layer is the share of its entries |W_ij| * ||X_j||_2 greater than `threshold` times their mean.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from elsa_compile.calibration import iterate
from elsa_compile.data import Samples, graph_inputs
from elsa_compile.errors import UserInputError
from elsa_compile.pass_base import Context, Pass, option, register_pass
from elsa_compile.passes.allocation import (
    Distribution,
    MeasuringAllocator,
    exact_zeros,
    pieces,
    samples_option,
)
from elsa_compile.passes.prune_wanda import SquareSums
from elsa_compile.program import Program, Weight, WeightPlan

THRESHOLD = 5.0
SPREAD = 0.08
LEAST_DENSITY = 0.1  # of the mean density: what the poorest layer keeps even with a wide spread


def layer_of(name: str) -> str:
    """The transformer block a weight lies in, or the weight itself.

    >>> layer_of("model.layers.10.mlp.up_proj.weight"), layer_of("head.weight")
    ('model.layers.10', 'head.weight')
    """
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match[0] if match else name


def outlier_ratio(weights: Sequence[Tensor], square_sums: Sequence[Tensor], m: float) -> float:
    """Share of a layer's entries |W_ij| * ||X_j||_2 greater than m times the layer's mean.

    Args:
        weights: each (N, K) float, the matrices of one layer.
        square_sums: for each (K,) float, the sum of squares of its inputs.
        m: how many times the mean an outlier is.
    """
    scores = [
        weight.float().abs() * squares.float().sqrt()
        for weight, squares in zip(weights, square_sums, strict=True)
    ]
    size = sum(score.numel() for score in scores)
    limit = m * sum(float(score.double().sum()) for score in scores) / size
    return sum(int((score > limit).sum()) for score in scores) / size


def owl_sparsities(
    ratios: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float
) -> list[float]:
    """Sparsity of each layer, linear in its outlier ratio, with the wanted mean over all entries.

    The layer farthest from the mean ratio deviates by `spread`, unless that would take a layer
    beyond dense or nearly to empty: then all deviate less.

    >>> [round(s, 3) for s in owl_sparsities([0.0, 0.1, 0.05], [10, 10, 10], 0.7, 0.08)]
    [0.78, 0.62, 0.7]

    Args:
        ratios: outlier ratio of each layer.
        sizes: entries of each layer.
        sparsity: their mean sparsity, weighted by size.
        spread: largest deviation.
    """
    center = sum(r * n for r, n in zip(ratios, sizes, strict=True)) / sum(sizes)
    richest, poorest = max(ratios) - center, center - min(ratios)
    if richest + poorest < 1e-12:  # rounding of equal ratios must not be stretched to the spread
        return [sparsity] * len(ratios)
    fewer = min(spread, (1 - sparsity) * (1 - LEAST_DENSITY))
    slope = min(spread / richest, sparsity / richest, fewer / poorest)
    return [sparsity - slope * (ratio - center) for ratio in ratios]


def owl_distribution(
    owner: Pass,
    program: Program,
    plans: dict[str, WeightPlan],
    ctx: Context,
    samples: Samples,
    threshold: float = THRESHOLD,
    spread: float = SPREAD,
) -> Distribution:
    """Measure outliers in the model as it is; returns what distributes a total by them.

    Args:
        owner: the pass, for messages.
        program: the model.
        plans: of the weights to prune.
        ctx: device, progress.
        samples: calibration samples.
        threshold: see `outlier_ratio`.
        spread: see `owl_sparsities`.
    """
    weights = [program.weights[name] for name in plans]
    sums = _observe(owner, program, weights, ctx, samples)
    layers: dict[str, list[Weight]] = {}
    for weight in weights:
        layers.setdefault(layer_of(weight.name), []).append(weight)
    ratios, sizes = [], []
    for members in layers.values():
        matrices = [weight.matrix().to(ctx.device) for weight in members]
        ratios.append(outlier_ratio(matrices, [sums[w.name] for w in members], threshold))
        sizes.append(sum(matrix.numel() for matrix in matrices))
    parts = [pieces(plan) for plan in plans.values()]

    def distribution(total: int) -> list[int]:
        found = owl_sparsities(ratios, sizes, total / sum(sizes), spread)
        of = dict(zip(layers, found, strict=True))
        return exact_zeros([of[layer_of(weight.name)] for weight in weights], parts, total)

    return distribution


def _observe(
    owner: Pass, program: Program, weights: Sequence[Weight], ctx: Context, samples: Samples
) -> dict[str, Tensor]:
    """Sum of squares (K,) of each weight's inputs."""
    inputs = [graph_inputs(program, row) for row in samples.inputs]
    seen: dict[str, SquareSums] = {}

    def observe(group: tuple[Weight, ...], rows: Tensor) -> None:
        if group[0].name not in seen:
            shared = SquareSums(rows.shape[1], ctx.device)
            seen.update((weight.name, shared) for weight in group)
        seen[group[0].name].add(rows)

    with ctx.progress.stage(owner.name, len(weights), "weights") as stage:
        for run, segment in iterate(program, [w.name for w in weights], inputs, ctx.device):
            run.observe(segment, observe)
            stage.advance(len(segment.weights))
    unseen = [weight.name for weight in weights if weight.name not in seen]
    if unseen:
        raise UserInputError(
            f"{owner.name}: the data never reaches {unseen[0]} ({len(unseen)} weights in all); add "
            "them to ignore"
        )
    return {name: sums.total for name, sums in seen.items()}


@register_pass
@dataclass(frozen=True, kw_only=True)
class AllocateOWL(MeasuringAllocator):
    """Keep more weights in layers with more outliers; needs data (OWL, arXiv 2310.05175).

    A layer is a transformer block where names show blocks, else a weight. The total is exact.
    """

    name: ClassVar[str] = "allocate-owl"

    samples: int = samples_option(32)
    threshold: float = option(
        THRESHOLD, "how many times the layer's mean an entry must be to be an outlier", low=1.0
    )
    spread: float = option(
        SPREAD, "largest deviation of a layer's sparsity from the mean", low=0.0, below=1.0
    )

    def measure(
        self, program: Program, plans: dict[str, WeightPlan], ctx: Context, samples: Samples
    ) -> Distribution:
        """By the outlier ratios of the layers."""
        return owl_distribution(self, program, plans, ctx, samples, self.threshold, self.spread)
