"""fold-norm-scale: the scale of a normalisation moves into the layers that read it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from elsa_compile.channel_layout import VIEWS, argument, op_name
from elsa_compile.channel_rules import UNCHANGED
from elsa_compile.channels import Product, Ties, find_ties
from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, register_pass
from elsa_compile.passes.masking import scale_emptied
from elsa_compile.program import Program, Weight


@dataclass(frozen=True)
class Norm:
    """A scale, and perhaps a shift, that follow a normalisation.

    Attributes:
        node: what gives the scaled values.
        scale: graph attribute of the scale (K,).
        offset: what the graph adds to the scale before it multiplies: 1 in Gemma, else 0.
        shift: graph attribute of the shift (K,), or None.
    """

    node: fx.Node
    scale: str
    offset: float
    shift: str | None


def fold_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """W diag(scale), zeros exactly zero whatever the sign of the scale.

    Args:
        weight: (N, K) float.
        scale: (K,) float.
    """
    return torch.where(weight == 0, torch.zeros_like(weight), weight * scale.to(weight.dtype))


@register_pass
@dataclass(frozen=True, kw_only=True)
class FoldNormScale(Pass):
    """Multiply the scale of each normalisation into the linear layers behind it; it becomes one.

    Scores and quantisation grids then see the weight that the normalised input really meets. A
    shift moves into the layers' biases.
    """

    name: ClassVar[str] = "fold-norm-scale"
    preserves: ClassVar[frozenset[Fact]] = frozenset(Fact) - {Fact.QUANTIZED}

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Every normalisation whose readers are all linear layers of their own."""
        found, stats = find_ties(program), PassStats()
        owners = {weight.attribute: weight for weight in program.weights.values()}
        refused: dict[str, int] = {}
        for norm in find_norms(found):
            scale = found.tensors[norm.scale].detach() + norm.offset
            shift = None if norm.shift is None else found.tensors[norm.shift].detach()
            shifted = shift is not None and bool((shift != 0).any())
            if bool((scale == 1).all()) and not shifted:
                continue
            readers = _readers(found, norm, owners, shifted)
            if isinstance(readers, str):
                refused[readers] = refused.get(readers, 0) + 1
                continue
            for product in readers:
                weight = owners[product.weight]
                matrix = weight.matrix()
                if shifted:
                    assert product.bias is not None
                    assert shift is not None
                    bias = found.tensors[product.bias].data
                    bias += (matrix.double() @ shift.double()).to(bias.dtype)
                weight.write(fold_scale(matrix, scale))
                scale_emptied(program.plans.get(weight.name), columns=scale)
            found.tensors[norm.scale].data.fill_(1.0 - norm.offset)
            if shifted:
                found.tensors[norm.shift or ""].data.zero_()
            stats.changed += 1
        stats.counts = {"folded": stats.changed, "refused": sum(refused.values())}
        stats.notes = [f"left {n} normalisations: {why}" for why, n in refused.items()]
        return stats


def find_norms(found: Ties) -> Iterator[Norm]:
    """Scales along the last dimension: layer_norm, rms_norm, and products with a vector."""
    for node in found.program.graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        name = op_name(node)
        if name in ("layer_norm", "rms_norm"):
            scale = _vector(found, argument(node, 2, "weight"), node)
            bias = argument(node, 3, "bias") if name == "layer_norm" else None
            shift = _vector(found, bias, node)
            if scale is not None and (shift is not None or bias is None):
                yield Norm(node, scale[0], 0.0, None if shift is None else shift[0])
        elif name == "mul":
            for operand, other in (node.args[:2], node.args[1::-1]):
                scale = _vector(found, operand, node)
                if scale is not None and isinstance(other, fx.Node) and _normalised(other):
                    yield Norm(node, scale[0], scale[1], None)
                    break


def _vector(found: Ties, value: Any, user: fx.Node) -> tuple[str, float] | None:
    """(attribute, offset) of a 1-D parameter, perhaps plus a number, that only `user` reads."""
    offset = 0.0
    while isinstance(value, fx.Node) and value.op == "call_function" and _alone(value):
        if op_name(value) == "add":
            source, number = value.args[:2]
            if isinstance(number, fx.Node):
                source, number = number, source
            if not isinstance(number, (int, float)) or offset:
                return None
            offset = float(number)
            value = source
        elif op_name(value) in UNCHANGED:
            value = value.args[0]
        else:
            return None
    if not isinstance(value, fx.Node) or value.op != "get_attr" or not _alone(value):
        return None
    name = found.attributes[str(value.target)]
    tensor = found.tensors[name]
    nodes = found.program.graph_module.graph.nodes
    holders = [n for n in nodes if n.op == "get_attr" and found.attributes[str(n.target)] == name]
    single = len(holders) == 1
    fits = isinstance(tensor, torch.nn.Parameter) and tensor.dim() == 1
    fits = fits and found.size(user, -1) == len(tensor)
    return (name, offset) if single and fits else None


def _alone(node: fx.Node) -> bool:
    """True when one node reads a value, assertions about its type aside."""
    return sum(not op_name(user).startswith("_assert") for user in node.users) == 1


def _normalised(node: fx.Node) -> bool:
    """True when a value was divided by its own size: mul(x, rsqrt(...)) through casts."""
    while node.op == "call_function" and op_name(node) in UNCHANGED:
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return False
        node = source
    if node.op != "call_function" or op_name(node) not in ("mul", "div"):
        return False
    sources = [source for source in node.all_input_nodes if source.op == "call_function"]
    return any(op_name(source) in ("rsqrt", "sqrt", "pow") for source in sources)


def _keeps_last(found: Ties, node: fx.Node, name: str, width: int | None) -> bool:
    """True when a node passes its input on with the last dimension whole and in order."""
    moved = name in VIEWS or name == "slice"
    return name in UNCHANGED or (moved and found.size(node, -1) == width)


def _readers(
    found: Ties, norm: Norm, owners: dict[str, Weight], shifted: bool
) -> list[Product] | str:
    """The linear layers that read a normalisation, or why it cannot be folded into them."""
    products: list[Product] = []
    frontier = [norm.node]
    width = found.size(norm.node, -1)  # of the last dimension
    while frontier:
        node = frontier.pop()
        for user in node.users:
            product = found.products.get(user.name)
            name = op_name(user) if user.op == "call_function" else user.op
            if product is not None and product.read[0] == node.name:
                products.append(product)
            elif user.args[0] is node and _keeps_last(found, user, name, width):
                frontier.append(user)
            elif user.users or user.op == "output":
                return f"their values also go to {name}"
    for product in products:
        weight = owners.get(product.weight)
        uses = [p for p in found.products.values() if p.weight == product.weight]
        if weight is None or weight.kind != "linear" or len(uses) > 1:
            return "a layer that reads them shares its weight with another"
        if shifted and product.bias is None:
            return "a layer that reads them has no bias to hold their shift"
        if shifted and sum(p.bias == product.bias for p in found.products.values()) > 1:
            return "a layer that reads them shares its bias with another"
    return products or "no linear layer reads them"
