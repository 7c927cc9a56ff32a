"""Which units contribute nothing: constants that flow along channels, columns that are all zero.

A unit is dead when every weight that reads it either has zeros there or reads a constant: a zero,
or a value that can be added to the reader's bias instead.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, fx

from elsa_compile.channel_layout import op_name
from elsa_compile.channel_rules import ELEMENTWISE, UNCHANGED
from elsa_compile.channels import Key, Product, Tie, Ties, Units

# Dimension -> (size,) float64: the value where it is the same for every input and place, else NaN.
Constants = dict[Key, Tensor]
_POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "mean", "amax", "amin")


@dataclass
class Dead:
    """The dead units of one group.

    Attributes:
        group: the units.
        dead: (count,) bool.
        refused: why units that make nothing but constants stay.
    """

    group: Units
    dead: Tensor
    refused: list[str] = field(default_factory=list)


def stored_matrix(found: Ties, product: Product) -> Tensor:
    """The product's weight as (N, K, rest): outputs, inputs, kernel."""
    weight = found.tensors[product.weight].detach()
    if product.rows == 1:
        weight = weight.t()
    return weight.reshape(*weight.shape[:2], -1)


def find_dead(found: Ties, groups: list[Units]) -> tuple[list[Dead], Constants]:
    """Dead units of every group that is not pinned, and the constants that led to them."""
    constants = _Flow(found).run()
    free = [group for group in groups if group.pinned is None]
    return [_dead_units(found, group, constants) for group in free], constants


def _dead_units(found: Ties, group: Units, constants: Constants) -> Dead:
    alive = torch.zeros(group.count, dtype=torch.bool)
    refused: dict[str, int] = {}
    for product in readers(found, group):
        labels = torch.from_numpy(group.labels[product.read])
        matrix = stored_matrix(found, product)
        unread = ~(matrix != 0).any(dim=2).any(dim=0)
        value = constants.get(product.read)
        steady = torch.zeros_like(unread) if value is None else ~torch.isnan(value)
        zero = torch.zeros_like(unread) if value is None else value == 0
        gone = unread | zero
        if product.bias is not None and not product.padded:
            gone |= steady
        else:
            why = "has no bias" if product.bias is None else "pads its input with zeros"
            stuck = set(labels[steady & ~gone].tolist())
            if len(stuck):
                refused[f"they are constant, but {product.weight} {why} to hold it"] = len(stuck)
        alive[labels[~gone]] = True
    reasons = [f"{group.name}: {count} stay, {why}" for why, count in refused.items()]
    return Dead(group, ~alive, reasons)


def readers(found: Ties, group: Units) -> list[Product]:
    """The products that sum over the units of a group."""
    return [
        product
        for product in found.products.values()
        if product.columns is not None and product.read in group.labels
    ]


class _Flow:
    """Constants along channel dimensions, node by node in graph order."""

    def __init__(self, found: Ties) -> None:
        self.found = found
        self.constants: Constants = {}
        self.by_node: dict[str, list[Tie]] = {}
        for tie in found.ties:
            self.by_node.setdefault(tie.node, []).append(tie)

    def run(self) -> Constants:
        """Visit every operator that ties something."""
        for node in self.found.program.graph_module.graph.nodes:
            if node.op != "call_function" or node.name not in self.by_node:
                continue
            name = op_name(node)
            if node.name in self.found.products:
                self._product(node, self.found.products[node.name])
            elif name == "batch_norm":
                self._batch_norm(node)
            elif name in ELEMENTWISE:
                self._elementwise(node)
            elif name == "cat":
                self._cat(node)
            else:
                zeros_only = name == "scaled_dot_product_attention" or name.startswith(_POOLS)
                known = name in UNCHANGED or name in _MOVES or zeros_only
                if known:
                    sources = node.all_input_nodes[:1]
                    if name == "scaled_dot_product_attention":
                        sources = [node.args[2]]
                    self._move(node, sources, zeros_only)
        return self.constants

    def _set(self, key: Key, value: Tensor) -> None:
        if not bool(torch.isnan(value).all()):
            self.constants[key] = value

    def _product(self, node: fx.Node, product: Product) -> None:
        """A row of zeros gives its bias, whatever it reads; so does one that reads constants."""
        matrix = stored_matrix(self.found, product).double()
        varying = (matrix != 0).any(dim=2)
        base = torch.zeros(len(matrix), dtype=torch.float64)
        if product.bias is not None:
            base = base + self.found.tensors[product.bias].detach().double()
        read = self.constants.get(product.read)
        if read is not None and product.columns is not None and not product.padded:
            steady = ~torch.isnan(read)
            base = base + matrix[:, steady].sum(dim=2) @ read[steady]
            varying = varying[:, ~steady]
        elif read is not None and product.columns is not None:
            varying = varying[:, read != 0]
        elif read is not None:
            varying &= (read != 0).repeat_interleave(len(matrix) // len(read))[:, None]
        base[varying.any(dim=1)] = torch.nan
        self._set(product.made, base)

    def _batch_norm(self, node: fx.Node) -> None:
        x, *rest = node.args[:5]
        epsilon: Any = node.args[7] if op_name(node) == "batch_norm" else node.args[6]
        value = self.constants.get((getattr(x, "name", ""), 1))
        if value is None or any(not isinstance(arg, fx.Node) for arg in rest):
            return
        scale, shift, mean, var = (self._tensor(arg) for arg in rest)
        self._set((node.name, 1), (value - mean) / (var + epsilon).sqrt() * scale + shift)

    def _tensor(self, node: Any) -> Tensor:
        return self.found.tensors[self.found.attributes[str(node.target)]].detach().double()

    def _elementwise(self, node: fx.Node) -> None:
        """Evaluate the operator on the constants; what is not constant is NaN."""
        shape = self.found.shape(node)
        for dim, size in enumerate(shape):
            if size is None or (node.name, dim) not in self.found.sizes:
                continue
            back = len(shape) - dim
            values = [self._aligned(source, back, size) for source in node.all_input_nodes]
            if all(bool(torch.isnan(value).all()) for value in values):
                continue
            # Unknown values are NaN: a choice by a condition, which has none, cannot be evaluated.
            if op_name(node) in _CONDITIONAL:
                continue
            # In-place operators write into their arguments.
            copies = [value.clone() for value in values]
            result = _evaluate(node, dict(zip(node.all_input_nodes, copies, strict=True)))
            if not isinstance(result, Tensor) or not result.is_floating_point():
                continue
            if op_name(node) in ("mul", "mul_"):
                zero = torch.stack([value == 0 for value in values]).any(dim=0)
                result = torch.where(zero, torch.zeros_like(result), result)
            self._set((node.name, dim), result)

    def _aligned(self, source: fx.Node, back: int, size: int) -> Tensor:
        """(size,) float64 of a source along the dimension `back` from the end."""
        unknown = torch.full((size,), torch.nan, dtype=torch.float64)
        shape = self.found.shape(source)
        if len(shape) < back or shape[-back] != size:
            return unknown
        if source.op == "get_attr":
            value = self._tensor(source)
            return value.reshape(-1) if value.numel() == size else unknown
        return self.constants.get((source.name, len(shape) - back), unknown)

    def _move(self, node: fx.Node, sources: list[Any], zeros_only: bool) -> None:
        """Entries change their places; several that become one must all be zero."""
        names = {source.name for source in sources}
        for tie in self.by_node[node.name]:
            value = self.constants.get(tie.a)
            if value is None or tie.a[0] not in names or tie.b[0] != node.name:
                continue
            size = self.found.sizes[tie.b]
            if len(numpy.unique(tie.ib)) == len(tie.ib) and not zeros_only:
                result = torch.full((size,), torch.nan, dtype=torch.float64)
                result[torch.from_numpy(tie.ib)] = value[torch.from_numpy(tie.ia)]
            else:
                zero = torch.ones(size, dtype=torch.bool)
                varies = (value != 0)[torch.from_numpy(tie.ia)]
                zero[torch.from_numpy(tie.ib)[varies]] = False
                result = torch.where(zero, 0.0, torch.nan).double()
            self._set(tie.b, result)

    def _cat(self, node: fx.Node) -> None:
        """Constant where every part is and agrees: a cache that comes from outside is not."""
        ties = [tie for tie in self.by_node[node.name] if tie.b[0] == node.name]
        for key in {tie.b for tie in ties}:
            parts = [tie for tie in ties if tie.b == key]
            size = self.found.sizes[key]
            result = torch.full((size,), torch.inf, dtype=torch.float64)
            for tie in parts:
                value = self.constants.get(tie.a)
                given = torch.full((len(tie.ia),), torch.nan, dtype=torch.float64)
                if value is not None:
                    given = value[torch.from_numpy(tie.ia)]
                where = torch.from_numpy(tie.ib)
                old = result[where]
                agreed = torch.where(torch.isinf(old) | (old == given), given, torch.nan)
                result[where] = agreed
            self._set(key, torch.where(torch.isinf(result), torch.nan, result))


def _evaluate(node: fx.Node, values: dict[fx.Node, Tensor]) -> Any:
    args = fx.node.map_arg(node.args, lambda source: values[source])
    kwargs = fx.node.map_arg(node.kwargs, lambda source: values[source])
    assert callable(node.target)
    return node.target(*args, **kwargs)


_CONDITIONAL = frozenset(
    {
        *("where", "masked_fill", "logical_and", "logical_or", "logical_not", "bitwise_and"),
        *("bitwise_or", "__and__", "__or__"),
    }
)
_MOVES = frozenset(
    {
        *("view", "reshape", "flatten", "unflatten", "_unsafe_view", "transpose", "permute", "t"),
        *("unsqueeze", "squeeze", "expand", "slice", "getitem"),
    }
)
