"""quantize-weights: whole numbers of few bits times a scale; zeros stay zeros."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elsa_compile.errors import UserInputError
from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, option, register_pass
from elsa_compile.passes.allocation import samples_option
from elsa_compile.passes.layerwise import change_layerwise
from elsa_compile.passes.prune_sparsegpt import Hessian
from elsa_compile.passes.quantisation import (
    compensate,
    fit_scale,
    from_integers,
    group_count,
    to_integers,
)
from elsa_compile.passes.selection import check_entries, matches
from elsa_compile.program import Grid, Program, Weight, WeightPlan

# Rounding to float16 errs by 2^-11 at most, but for numbers below 6e-5 and beyond 65504.
_HALF_ERROR = 1e-3
MIN_BYTES = 1024  # a smaller weight saves less than its scales and two more graph nodes cost


@dataclass(frozen=True)
class Choice:
    """How one weight is to be quantised: bits, and entries that share a scale (None: the row)."""

    bits: int
    group_size: int | None


@register_pass
@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass):
    """Store weights as int8 or int4; pruned entries stay exactly zero.

    Grids are symmetric. The body (linear layers, convolutions) takes `bits`, one scale for each
    output channel or, with `group_size`, for so many entries along the input; convolutions always
    have one for each channel. `head` is the output head of a language model, `embedding` every
    lookup table; int8 has one scale a row there, int4 takes `group_size` too. A head tied to the
    embedding is one weight with one grid: both rules must agree.

    Clipping is chosen for the least squared error. `compensated` needs data and lets the kept
    entries of a row make up for each other's rounding, layer by layer; embeddings are rounded. Put
    it last: a pass that moves weights off their grid is refused behind it.
    """

    name: ClassVar[str] = "quantize-weights"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})
    preserves: ClassVar[frozenset[Fact]] = frozenset(
        {Fact.SHAPES, Fact.PLANNED, Fact.MASKED, Fact.EXPORTABLE}
    )

    bits: str = option("int8", "of the model's body", choices=("int8", "int4"))
    group_size: int | None = option(
        None, "entries along the input that share a scale; null: one for each output", low=2
    )
    head: str = option("int8", "the output head", choices=("int8", "int4", "none"))
    embedding: str = option("int8", "lookup tables", choices=("int8", "int4", "none"))
    method: str = option(
        "rtn",
        "rtn: nearest level; compensated: the least error of each layer's output on the data",
        choices=("rtn", "compensated"),
    )
    scales: str = option(
        "float32",
        "how scales are stored; float16 saves 10 % of int4 in groups of 32",
        choices=("float32", "float16"),
    )
    targets: list[str] = option(
        [], "weights to quantise: names, module types, or re:<expression>; empty: all"
    )
    ignore: list[str] = option([], "weights to leave as they are, written like targets")
    samples: int = samples_option(128)
    damping: float = option(
        0.01, "compensated: weight of the rounding error itself, see docs", low=0.0, high=10.0
    )

    def __post_init__(self) -> None:
        """Whether data are needed depends on the method."""
        super().__post_init__()
        object.__setattr__(self, "needs_data", self.method == "compensated")

    def choice(self, weight: Weight, is_decoder: bool) -> Choice | str:
        """How a weight is to be quantised, or why not.

        Raises:
            UserInputError: group_size does not divide its K, or two rules disagree on one weight.
        """
        if weight.kind == "other":
            return "neither a matrix, a convolution nor a lookup table"
        if any(matches(entry, weight) for entry in self.ignore):
            return "listed in ignore"
        if self.targets and not any(matches(entry, weight) for entry in self.targets):
            return "not among targets"
        rule, rows = self.bits, False
        if weight.kind == "embedding" or (weight.is_head and is_decoder):
            rule, rows = (self.embedding if weight.kind == "embedding" else self.head), True
            if weight.kind == "embedding" and weight.is_head and self.head != self.embedding:
                raise UserInputError(
                    f"{self.name}: {weight.name} is both embedding ({self.embedding}) and head "
                    f"({self.head}), one weight that has one grid; set both options alike"
                )
        if rule == "none":
            return "its rule is none"
        if 4 * weight.parameter.numel() < MIN_BYTES:
            return f"smaller than {MIN_BYTES} bytes"
        bits = int(rule.removeprefix("int"))
        alone = weight.kind == "conv" or (rows and bits == 8)
        size = None if alone else self.group_size
        try:
            group_count(weight.matrix_shape[1], size)
        except ValueError as error:
            raise UserInputError(
                f"{self.name}: {weight.name} has {error}; add it to ignore, choose another "
                "group_size, or null for one scale an output channel"
            ) from None
        return Choice(bits, size)

    def stored_bits(self, weight: Weight, is_decoder: bool) -> tuple[int, int] | None:
        """(bits of an entry, bytes of its scales); raises as `choice` does."""
        choice = self.choice(weight, is_decoder)
        if not isinstance(choice, Choice):
            return None
        rows, columns = weight.matrix_shape
        return choice.bits, self._scale_bytes * rows * group_count(columns, choice.group_size)

    @property
    def _scale_bytes(self) -> int:
        return 2 if self.scales == "float16" else 4

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Choose for every weight, then round the tables, then the products in graph order."""
        weights = list(program.weights.values())
        check_entries(f"{self.name}: targets", self.targets, weights)
        check_entries(f"{self.name}: ignore", self.ignore, weights)
        found = {w.name: self.choice(w, program.kind == "decoder") for w in weights}
        choices = {name: choice for name, choice in found.items() if isinstance(choice, Choice)}
        if not choices:
            name, why = next(iter(found.items()))
            raise UserInputError(
                f"{self.name}: no weight is left to quantise among {len(weights)} ({name}: {why}); "
                "check targets, ignore, head and embedding"
            )
        kept = program.grids()
        half = self.scales == "float16"
        waiting = [
            n for n, c in choices.items() if not _is_on(kept.get(n), c, half, program.weights[n])
        ]
        stale = [n for n, p in program.plans.items() if p.grid is not None and n not in kept]
        for name in stale:
            program.plans[name].grid = None
        products = {n for n in waiting if program.weights[n].prunable}
        stats = PassStats()
        for name in waiting:
            if self.method == "rtn" or name not in products:
                stats.changed += self._quantise(program, name, choices[name], ctx, None)
        if self.method == "compensated" and products:

            def change(weight: Weight, seen: Hessian) -> bool:
                return self._quantise(program, weight.name, choices[weight.name], ctx, seen.total)

            names = [n for n in waiting if n in products]
            done = change_layerwise(self, program, ctx, self.samples, names, Hessian, change)
            stats.changed += done.changed
            stats.counts |= done.counts
        return self._count(program, found, stats)

    def _quantise(
        self, program: Program, name: str, choice: Choice, ctx: Context, hessian: Tensor | None
    ) -> bool:
        """Put one weight on its grid; True when its values changed."""
        weight = program.weights[name]
        plan = program.plans.get(name)
        if plan is None:
            why = "a lookup table" if weight.kind == "embedding" else "no pass planned zeros for it"
            plan = program.plans[name] = WeightPlan(weight.matrix_shape, skipped=why)
        before = weight.matrix().to(ctx.device)
        mask = None if plan.mask is None else plan.mask.to(ctx.device)
        importance = None if hessian is None else hessian.diagonal()[None]
        scale = fit_scale(before, choice.bits, choice.group_size, importance)
        if self.scales == "float16":
            scale = self._rounded(name, scale)
        if hessian is None:
            after = from_integers(to_integers(before, scale, choice.bits), scale)
        else:
            after = compensate(before, hessian, scale, choice.bits, mask, damping=self.damping)
        plan.grid = Grid(choice.bits, scale.cpu(), self.scales == "float16")
        norm = float(before.norm())
        plan.relative_error = float((after - before).norm()) / norm if norm else 0.0
        changed = not torch.equal(before, after)
        weight.write(after.to(weight.parameter.device))
        return changed

    def _rounded(self, name: str, scale: Tensor) -> Tensor:
        """Scales as float16 numbers, in float32; refused where float16 has none that is near."""
        half = scale.half().float()
        bad = ~((half - scale).abs() <= scale * _HALF_ERROR)
        if bool(bad.any()):
            raise UserInputError(
                f"{self.name}: {name} has a scale of {float(scale[bad][0]):.3g}, which float16 "
                "cannot hold to a thousandth; set scales to float32, or add the weight to ignore"
            )
        return half

    def _count(
        self, program: Program, found: dict[str, Choice | str], stats: PassStats
    ) -> PassStats:
        """Weights of each kind, the bits an entry takes with its scales, and who was left alone."""
        entries = bits = 0
        for name, choice in found.items():
            if not isinstance(choice, Choice):
                continue
            grid = program.plans[name].grid
            assert grid is not None
            size = program.weights[name].parameter.numel()
            entries += size
            bits += grid.bits * size + 8 * self._scale_bytes * grid.scale.numel()
            key = f"int{grid.bits}"
            stats.counts[key] = stats.counts.get(key, 0) + 1
        stats.counts["bits_an_entry"] = round(bits / entries, 3)
        left: dict[str, list[str]] = {}
        for name, why in found.items():
            if isinstance(why, str) and program.weights[name].kind != "other":
                left.setdefault(why, []).append(name)
        for why, names in left.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            stats.notes.append(f"{names[0]}{more} left in float: {why}")
        return stats


def _is_on(grid: Grid | None, choice: Choice, half: bool, weight: Weight) -> bool:
    """True when a weight lies on the chosen kind of grid already: a second run changes nothing."""
    columns = weight.matrix_shape[1]
    groups = group_count(columns, choice.group_size)
    if grid is None or grid.half != half:
        return False
    return grid.bits == choice.bits and grid.scale.shape[1] == groups
