"""allocate-budget: as many zeros as a size, a count or a speed asks for, and no more."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from elsa_compile.errors import UserInputError
from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, option, register_pass
from elsa_compile.passes.allocate_fisher import fisher_distribution
from elsa_compile.passes.allocate_owl import owl_distribution
from elsa_compile.passes.allocation import (
    NO_DATA,
    Distribution,
    Pieces,
    choose,
    evenly,
    ignore_option,
    pattern_option,
    pieces,
    planned,
    refuse_fixed,
    samples_option,
    set_zeros,
    targets_option,
    write_plans,
)
from elsa_compile.passes.file_size import FileSize, nonzeros, parse_size, size_text
from elsa_compile.passes.latency import DecodeLatency, decode_cost, parse_speedup
from elsa_compile.patterns import parse_pattern
from elsa_compile.program import Program, WeightPlan
from elsa_compile.runtime.calibrate import load as load_table

Cost = Callable[[Sequence[int]], float]


def fewest_zeros(cost: Cost, distribution: Distribution, budget: float, most: int) -> int | None:
    """The smallest total of zeros whose cost is within budget, by bisection.

    Args:
        cost: pruned pieces of each weight -> what they cost; falls as they grow.
        distribution: total -> pruned pieces of each weight.
        budget: the largest cost allowed.
        most: largest total to try.

    Returns:
        Entries to prune, or None when even `most` is not enough. The cost at the answer has been
        computed: it is within budget however the distribution rounds.
    """
    if cost(distribution(0)) <= budget:
        return 0
    if cost(distribution(most)) > budget:
        return None
    low, high = 0, most  # cost(low) > budget >= cost(high)
    while high - low > 1:
        middle = (low + high) // 2
        if cost(distribution(middle)) <= budget:
            high = middle
        else:
            low = middle
    return high


BFLOAT16 = (
    "all weights are bfloat16 numbers: where the passes that follow only mask them, kernels keep "
    "two bytes a value and are faster than predicted; dtype: bf16 predicts that"
)


def _all_bfloat16(program: Program, plans: Mapping[str, WeightPlan]) -> bool:
    """Whether every planned weight holds numbers of bfloat16 alone."""
    weights = (program.weights[name].parameter.data for name in plans)
    return bool(plans) and all(torch.equal(w, w.to(torch.bfloat16).to(w.dtype)) for w in weights)


@register_pass
@dataclass(frozen=True, kw_only=True)
class AllocateBudget(Pass):
    """Find the sparsity that meets a file size, a number of nonzero weights, or a decoding speed.

    Give one of `size`, `nonzeros` and `latency`. Each counts the whole model: embeddings, the
    output head and what is listed in ignore stay dense and take their part of the budget. `latency`
    is a speed-up of single tokens over the dense float32 model in onnxruntime; it is predicted with
    the kernel table of this machine (elsa-run calibrate) and the dense model, timed in onnxruntime.
    `within` says how the zeros are distributed among weights; fisher and owl need data.
    """

    name: ClassVar[str] = "allocate-budget"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.PLANNED})
    preserves: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES, Fact.EXPORTABLE})

    size: str | None = option(
        None, "of the exported file: bytes as in 60MB or 60MiB, or 40% of the dense file"
    )
    nonzeros: int | None = option(None, "parameters of the whole model that are not zero", low=1)
    latency: str | float | None = option(
        None, "speed-up of decoding over the dense float32 model in onnxruntime, as in 2.5x"
    )
    context: int = option(128, "of latency: tokens before the one decoded", low=1)
    threads: int | None = option(None, "of latency: threads to decode with; null: all cores", low=1)
    within: str = option(
        "uniform",
        "how zeros are distributed: alike, or as allocate-fisher or allocate-owl do by default",
        choices=("uniform", "fisher", "owl"),
    )
    dtype: str = option(
        "fp32",
        "how weights will be stored: as given to --dtype, or int8 by quantize-weights",
        choices=("fp32", "fp16", "bf16", "int8"),
    )
    limit: float = option(
        0.99, "largest fraction of zeros in all targeted weights together", low=0.0, below=1.0
    )
    pattern: str = pattern_option()
    targets: list[str] = targets_option()
    ignore: list[str] = ignore_option()
    samples: int = samples_option(128)

    def __post_init__(self) -> None:
        """Also check that there is one budget, and that the pattern leaves something to solve."""
        super().__post_init__()
        given = [k for k in ("size", "nonzeros", "latency") if getattr(self, k) is not None]
        if len(given) != 1:
            problem = f"{' and '.join(given)} are given" if given else "none is given"
            raise UserInputError(
                f"{self.name}: wanted one of size, as in 60MB or 40%, nonzeros, and latency, as in "
                f"2.5x, but {problem}"
            )
        if self.size is not None:
            parse_size(self.size, f"{self.name}: size")
        if self.latency is not None:
            parse_speedup(self.latency, f"{self.name}: latency")
        refuse_fixed(parse_pattern(self.pattern), self.name)
        # Of this instance: whether data are needed depends on an option.
        object.__setattr__(self, "needs_data", self.within != "uniform")

    def check(self) -> None:
        """A latency needs the kernel table of this machine."""
        if self.latency is not None:
            load_table(self.threads)

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Solve for the total, write a plan for every prunable weight."""
        plans = choose(self, program, parse_pattern(self.pattern))
        chosen = planned(plans)
        parts = [pieces(plan) for plan in chosen.values()]
        distribution = self._distribution(program, chosen, ctx)
        file_size = FileSize(program, chosen, {"fp32": 4, "int8": 1}.get(self.dtype, 2))
        total = sum(part.entries for part in parts)
        rest = sum(nonzeros(w) for w in program.weights.values() if w.name not in chosen)
        latency = None if self.latency is None else self._decoding(program, chosen, ctx)

        def count(zeros: Sequence[int]) -> float:
            return rest + total - _entries(zeros, parts)

        cost: Cost = latency or (count if self.size is None else file_size)
        budget = self._budget(file_size([0] * len(parts)), latency)
        most = int(self.limit * total)
        found = fewest_zeros(cost, distribution, budget, most)
        if found is None:
            raise UserInputError(self._unreachable(distribution(most), cost, budget, latency))
        zeros = distribution(found)
        set_zeros(plans, zeros)
        stats = write_plans(program, plans)
        pruned = _entries(zeros, parts)
        stats.counts |= {
            "sparsity": pruned / total,
            "nonzeros": count(zeros),
            "predicted_bytes": round(file_size(zeros)),
        }
        stats.notes.append(
            f"{pruned / total:.2%} zeros in {len(parts)} weights: {int(count(zeros)):,} parameters "
            f"stay, and the file will take about {size_text(file_size(zeros))}"
        )
        if latency is not None:
            stats.counts |= latency.prediction(zeros)
            stats.notes.append(latency.sentence(zeros))
            if self.dtype == "fp32" and _all_bfloat16(program, chosen):
                stats.notes.append(BFLOAT16)
        if ctx.samples is None and self.within != "uniform":
            stats.notes.append(NO_DATA)
        return stats

    def _decoding(
        self, program: Program, chosen: dict[str, WeightPlan], ctx: Context
    ) -> DecodeLatency:
        if program.kind != "decoder":
            raise UserInputError(
                f"{self.name}: latency is about decoding, but {program.source} is no language "
                "model with a cache; give size or nonzeros"
            )
        table = load_table(self.threads)
        cost = decode_cost(program, ctx, table, self.context, self.threads)
        # fp16 is widened while loading, or kept where that is at least as fast.
        dtype = {"bf16": "bfloat16", "int8": "int8"}.get(self.dtype, "float32")
        return DecodeLatency(program, chosen, table, cost, dtype)

    def _distribution(
        self, program: Program, plans: dict[str, WeightPlan], ctx: Context
    ) -> Distribution:
        if ctx.samples is None or self.within == "uniform":
            return evenly([pieces(plan) for plan in plans.values()])
        samples = ctx.samples.take(self.samples, ctx.seed)
        if self.within == "owl":
            return owl_distribution(self, program, plans, ctx, samples)
        return fisher_distribution(self, program, plans, ctx, samples)

    def _budget(self, dense_bytes: float, latency: DecodeLatency | None) -> float:
        if latency is not None:
            assert self.latency is not None
            return latency.dense_s / parse_speedup(self.latency, f"{self.name}: latency")
        if self.size is None:
            assert self.nonzeros is not None
            return self.nonzeros
        value, is_share = parse_size(self.size, f"{self.name}: size")
        return value * dense_bytes if is_share else value

    def _unreachable(
        self, zeros: Sequence[int], cost: Cost, budget: float, latency: DecodeLatency | None
    ) -> str:
        least = cost(zeros)
        if latency is not None:
            wanted, found = f"latency {self.latency}", latency.bounds(zeros)
        elif self.size is None:
            wanted, found = f"{budget:,.0f} nonzeros", f"{least:,.0f} stay"
        else:
            wanted = f"a file of {size_text(budget)}"
            found = f"it takes about {size_text(least)}"
        return (
            f"{self.name}: {wanted} cannot be reached: with {self.limit:.2%} of the targeted "
            f"weights zero, the most that limit allows, {found}; allow that much, raise limit, or "
            "target more of the model"
        )


def _entries(zeros: Sequence[int], parts: Sequence[Pieces]) -> int:
    return sum(count * part.size for count, part in zip(zeros, parts, strict=True))
