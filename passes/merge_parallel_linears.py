"""merge-parallel-linears: layers that read the same values become one product in the file."""

from dataclasses import dataclass
from typing import ClassVar

from elsa_compile.channels import Product, Ties, find_ties
from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, option, register_pass
from elsa_compile.passes.selection import check_entries, matches
from elsa_compile.program import Program, Weight


@register_pass
@dataclass(frozen=True, kw_only=True)
class MergeParallelLinears(Pass):
    """Store layers that read the same values, q/k/v and gate/up, as one matrix in the file.

    The program keeps them apart, with their plans and grids; the exporter puts their columns side
    by side and cuts the product. Weights must be quantised alike: put it behind quantize-weights,
    so that what cannot be merged is said here.
    """

    name: ClassVar[str] = "merge-parallel-linears"
    preserves: ClassVar[frozenset[Fact]] = frozenset(Fact)

    ignore: list[str] = option([], "weights to leave apart: names, types, or re:<expression>")

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Note the groups that the exporter is to merge."""
        check_entries(f"{self.name}: ignore", self.ignore, program.prunable.values())
        found, stats = find_ties(program), PassStats()
        groups: list[tuple[str, ...]] = []
        for products in _same_input(found):
            ways: dict[str, list[str]] = {}
            for product in products:
                weight = _owner(program, product.weight)
                why = self._refusal(found, weight, product)
                if why is not None or weight is None:
                    stats.notes.append(f"{product.weight} stays apart: {why}")
                else:
                    ways.setdefault(_form(program, weight), []).append(weight.name)
            groups += [tuple(names) for names in ways.values() if len(names) > 1]
            if len(ways) > 1:
                parts = "; ".join(f"{form}: {', '.join(names)}" for form, names in ways.items())
                stats.notes.append(f"only what is stored alike is merged: {parts}")
        stats.changed = int(groups != program.parallel)
        program.parallel = groups
        stats.counts = {"merged": len(groups), "layers": sum(len(group) for group in groups)}
        return stats

    def _refusal(self, found: Ties, weight: Weight | None, product: Product) -> str | None:
        if weight is None or weight.kind != "linear":
            return "it is no linear layer"
        if any(matches(entry, weight) for entry in self.ignore):
            return "listed in ignore"
        if sum(each.weight == product.weight for each in found.products.values()) > 1:
            return "several products read it"
        return None


def _same_input(found: Ties) -> list[list[Product]]:
    """Products by the value they read, where there is more than one, in graph order."""
    by_input: dict[str, list[Product]] = {}
    for product in found.products.values():
        if product.columns is not None and found.tensors[product.weight].dim() == 2:
            by_input.setdefault(product.read[0], []).append(product)
    return [products for products in by_input.values() if len(products) > 1]


def _owner(program: Program, attribute: str) -> Weight | None:
    return next((w for w in program.weights.values() if w.attribute == attribute), None)


def _form(program: Program, weight: Weight) -> str:
    """How the file will hold a weight's entries."""
    grid = program.grids().get(weight.name)
    if grid is None:
        return "float"
    size = grid.group_size(weight.matrix_shape[1])
    return f"int{grid.bits}" + (f" in groups of {size}" if size else "")
