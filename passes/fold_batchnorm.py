"""fold-batchnorm: a BatchNorm becomes part of the convolution or linear layer before it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from elsa_compile.channel_layout import op_name
from elsa_compile.channels import Product, Ties, attribute, find_ties
from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, register_pass
from elsa_compile.passes.masking import scale_emptied
from elsa_compile.program import Program, Weight


@dataclass(frozen=True)
class Statistics:
    """What a BatchNorm computes: (x - mean) / sqrt(var + epsilon) * scale + shift; (N,) each."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    var: Tensor
    epsilon: float

    @property
    def factor(self) -> Tensor:
        """What each output is multiplied by, (N,) float64."""
        return self.scale.double() / (self.var.double() + self.epsilon).sqrt()


def fold(weight: Tensor, bias: Tensor | None, norm: Statistics) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that computes both; zeros stay zero.

    Args:
        weight: (N, K) float.
        bias: (N,) float or None.
        norm: of the N outputs.
    """
    factor = norm.factor
    start = torch.zeros_like(factor) if bias is None else bias.double()
    moved = (start - norm.mean.double()) * factor + norm.shift.double()
    scaled = torch.where(weight == 0, 0.0, weight.double() * factor[:, None])
    return scaled.to(weight.dtype), moved.to(weight.dtype)


@register_pass
@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm(Pass):
    """Merge each BatchNorm into the layer before it, which gets a bias if it has none."""

    name: ClassVar[str] = "fold-batchnorm"
    preserves: ClassVar[frozenset[Fact]] = frozenset(Fact) - {Fact.QUANTIZED}

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Every BatchNorm that alone reads a convolution or linear layer."""
        found, stats = find_ties(program), PassStats()
        refused: dict[str, int] = {}
        gone: set[str] = set()
        graph = program.graph_module.graph
        for node in [n for n in graph.nodes if n.op == "call_function"]:
            if op_name(node) != "batch_norm":
                continue
            why = _refusal(found, node)
            if why is not None:
                refused[why] = refused.get(why, 0) + 1
                continue
            gone |= {str(arg.target) for arg in node.args[1:5] if isinstance(arg, fx.Node)}
            _fold_node(found, node)
            stats.changed += 1
        if stats.changed:
            graph.eliminate_dead_code()
            program.graph_module.recompile()
            _forget(program, gone)
        stats.counts = {"folded": stats.changed, "refused": sum(refused.values())}
        stats.notes = [f"left {n} BatchNorms: {why}" for why, n in refused.items()]
        return stats


def _refusal(found: Ties, node: fx.Node) -> str | None:
    """Why a BatchNorm stays, or None."""
    source = node.args[0]
    product = found.products.get(source.name) if isinstance(source, fx.Node) else None
    if product is None or not isinstance(source, fx.Node):
        return "no convolution or linear layer stands directly before it"
    if len(source.users) > 1:
        return "what it normalises is read elsewhere too"
    if bool(node.args[5]) or any(not isinstance(arg, fx.Node) for arg in node.args[3:5]):
        return "it has no fixed statistics"
    if product.made != (source.name, 1):
        return "it normalises another dimension than the layer's outputs"
    mean = found.attributes[str(node.args[3].target)]  # type: ignore[union-attr]
    others = [n for n in found.program.graph_module.graph.nodes if n is not node]
    if any(_reads(found, other, mean) for other in others):
        return "it serves several layers"
    weight = _owner(found.program, product.weight)
    uses = [p for p in found.products.values() if p.weight == product.weight]
    if weight is None or not weight.prunable or len(uses) > 1:
        return "the layer shares its weight with another"
    biases = [p for p in found.products.values() if p.bias == product.bias]
    if product.bias is not None and len(biases) > 1:
        return "the layer shares its bias with another"
    if op_name(source) in ("mm", "matmul", "addmm") and product.bias is None:
        return "the layer has no place for a bias"
    return None


def _reads(found: Ties, node: fx.Node, name: str) -> bool:
    """True when an operator reads a weight or buffer."""
    return any(
        source.op == "get_attr" and found.attributes.get(str(source.target)) == name
        for source in node.all_input_nodes
    )


def _owner(program: Program, name: str) -> Weight | None:
    return next((w for w in program.weights.values() if w.attribute == name), None)


def _fold_node(found: Ties, node: fx.Node) -> None:
    """Change the layer's weights, then let everything read the layer instead of the BatchNorm."""
    program, layer = found.program, node.args[0]
    assert isinstance(layer, fx.Node)
    product = found.products[layer.name]
    weight = _owner(program, product.weight)
    assert weight is not None
    matrix = weight.matrix()
    bias = None if product.bias is None else found.tensors[product.bias].data
    norm = _statistics(found, node, len(matrix))
    scaled, moved = fold(matrix, bias, norm)
    weight.write(scaled)
    scale_emptied(program.plans.get(weight.name), rows=norm.factor)
    if bias is not None:
        bias.copy_(moved)
    else:
        _give_bias(program, layer, product, weight, moved)
    node.replace_all_uses_with(layer)
    _silence_module(program, found, node)
    program.graph_module.graph.erase_node(node)


def _statistics(found: Ties, node: fx.Node, width: int) -> Statistics:
    def value(index: int, default: float) -> Tensor:
        arg = node.args[index]
        if not isinstance(arg, fx.Node):
            return torch.full((width,), default)
        return found.tensors[found.attributes[str(arg.target)]].detach()

    epsilon: Any = node.args[7]
    return Statistics(value(1, 1.0), value(2, 0.0), value(3, 0.0), value(4, 1.0), float(epsilon))


def _give_bias(
    program: Program, layer: fx.Node, product: Product, weight: Weight, values: Tensor
) -> None:
    """A new bias, the same Parameter in the graph and in the module."""
    parameter = nn.Parameter(values.clone())
    target = f"{product.weight.rpartition('.')[0]}.bias".lstrip(".")
    owner: Any = (
        attribute(program.graph_module, target.rpartition(".")[0])
        if "." in target
        else (program.graph_module)
    )
    owner.bias = parameter
    graph = program.graph_module.graph
    with graph.inserting_before(layer):
        holder = graph.get_attr(target)
    args = list(layer.args)
    args[2:3] = [holder]
    layer.args = tuple(args)
    name = f"{weight.name.rpartition('.')[0]}.bias".lstrip(".")
    program.weights[name] = Weight(name, target, parameter, "other", type_name=weight.type_name)
    if program.module is not None:
        module: Any = program.module.get_submodule(weight.name.rpartition(".")[0])
        module.bias = parameter


def _silence_module(program: Program, found: Ties, node: fx.Node) -> None:
    """Put an Identity where the module has the BatchNorm."""
    module = program.module
    if module is None:
        return
    mean: Any = node.args[3]
    buffer = found.tensors[found.attributes[str(mean.target)]]
    for name, child in module.named_modules():
        if getattr(child, "running_mean", None) is buffer:
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, nn.Identity())
            return


def _forget(program: Program, attributes: set[str]) -> None:
    """Parameters of BatchNorms that nothing reads any more."""
    read = {str(n.target) for n in program.graph_module.graph.nodes if n.op == "get_attr"}
    for name, weight in list(program.weights.items()):
        if weight.attribute in attributes - read:
            del program.weights[name]
    program.graph_module.delete_all_unused_submodules()
