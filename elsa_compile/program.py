"""Program: the one object that flows through the compiler.

It holds the traced graph, the weights (one Parameter object each, shared by the graph and the
original module), the per-weight plans, the facts that hold and the history. Passes are its only
writers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn

from elsa_compile.facts import Fact
from elsa_compile.patterns import Pattern, Unstructured

if TYPE_CHECKING:
    import networkx

    from elsa_compile.pass_base import PassStats

Kind = Literal["decoder", "encoder", "generic"]
WeightKind = Literal["linear", "conv", "embedding", "other"]


@dataclass
class Weight:
    """One canonical weight. Tied weights are one Weight with several uses.

    Attributes:
        name: canonical name, that of the original module's state dict.
        attribute: the weight's name inside the traced graph.
        parameter: the shared Parameter.
        kind: what the graph does with it; an embedding that is also the output head is "embedding".
        transposed: True when stored (K, N), as GPT-2's Conv1D does.
        is_head: produces the logits of a language model.
        type_name: class of the owning module, for `targets`.
        aliases: other names of the same Parameter.
    """

    name: str
    attribute: str
    parameter: nn.Parameter
    kind: WeightKind
    transposed: bool = False
    is_head: bool = False
    type_name: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def prunable(self) -> bool:
        """True for matrices and convolutions, wherever they stand."""
        return self.kind in ("linear", "conv")

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(N, K) of `matrix()`."""
        shape = self.parameter.shape
        if self.transposed:
            return shape[1], shape[0]
        return shape[0], self.parameter.numel() // max(shape[0], 1)

    def matrix(self) -> Tensor:
        """The weight as (N, K) float: output features by input features, a view where possible.

        A convolution (out, in/groups, *kernel) is flattened behind its first dimension.
        """
        data = self.parameter.data
        return data.t() if self.transposed else data.reshape(data.shape[0], -1)

    def to_stored(self, matrix: Tensor) -> Tensor:
        """Inverse of the layout change in `matrix()`: (N, K) to the stored shape."""
        return matrix.t() if self.transposed else matrix.reshape(self.parameter.shape)

    def write(self, matrix: Tensor) -> None:
        """Store (N, K) values in place, so that graph and module both see them."""
        self.parameter.data.copy_(self.to_stored(matrix))


@dataclass(frozen=True, eq=False)
class Grid:
    """The low-bit grid of one weight: symmetric, so zero stays exactly zero.

    Every entry is the float32 product of a whole number in [-limit, limit] and its group's scale.
    Example: bits 4 and scale 0.5 allow -3.5, -3.0, ..., 0, ..., 3.5.

    Attributes:
        bits: 8 or 4.
        scale: (N, groups) float32, positive; a row's K entries are cut into groups of equal size.
        half: the scales are float16 numbers, and so stored in the file.
    """

    bits: int
    scale: Tensor
    half: bool = False

    @property
    def limit(self) -> int:
        """Largest whole number: 127 or 7. The most negative one has no opposite and is not used."""
        return (1 << (self.bits - 1)) - 1

    def group_size(self, columns: int) -> int | None:
        """Entries that share a scale in rows of `columns`; None when it is the whole row."""
        groups = self.scale.shape[1]
        return None if groups == 1 else columns // groups


@dataclass
class WeightPlan:
    """What is decided for one weight.

    Attributes:
        shape: (N, K) of the weight's matrix.
        sparsity: planned fraction of zeros in [0, 1).
        pattern: which zeros are allowed.
        mask: (N, K) bool, True = kept; None until a pruning pass ran.
        skipped: why the weight is left dense, or None.
        grid: what values are allowed, or None when not quantised. Weights that are never pruned,
            embeddings for instance, have a plan only when they have a grid, and are skipped.
        relative_error: ||W - W0|| / ||W0|| over the last pass that changed it.
        emptied: (row, column, value) of the largest entry, before it was pruned, of each row that
            lost all of its entries; (R,) each.
    """

    shape: tuple[int, int]
    sparsity: float = 0.0
    pattern: Pattern = field(default_factory=Unstructured)
    mask: Tensor | None = None
    skipped: str | None = None
    grid: Grid | None = None
    relative_error: float | None = None
    emptied: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass
class PassRecord:
    """One line of a program's history."""

    name: str
    options: dict[str, Any]
    seconds: float
    stats: "PassStats"


@dataclass
class Signature:
    """How the traced graph is called.

    Attributes:
        args: example inputs, positional, as given to torch.export.
        dynamic_shapes: torch.export's dynamic shapes for `args`.
        input_names: flat names of the graph's inputs in order.
        output_names: flat names of the graph's outputs in order.
        axes: name of each input's dynamic dimensions: {input: {dimension: name}}.
    """

    args: tuple[Any, ...]
    dynamic_shapes: Any
    input_names: list[str]
    output_names: list[str]
    axes: dict[str, dict[int, str]]


@dataclass
class Program:
    """A traced model with its weights, plans, facts and history."""

    graph_module: fx.GraphModule
    signature: Signature
    kind: Kind
    weights: dict[str, Weight]
    module: nn.Module | None = None
    config: dict[str, Any] | None = None
    folder: Path | None = None  # where config and tokenizer came from
    source: str = "module"
    plans: dict[str, WeightPlan] = field(default_factory=dict)
    facts: set[Fact] = field(default_factory=set)
    history: list[PassRecord] = field(default_factory=list)
    parallel: list[tuple[str, ...]] = field(default_factory=list)  # one matrix each in the file
    activations: str | None = None  # of quantised products, "integer" or "float32"

    @property
    def prunable(self) -> dict[str, Weight]:
        """Weights that pruning passes may touch, by canonical name."""
        return {name: weight for name, weight in self.weights.items() if weight.prunable}

    def planned(self) -> Iterator[tuple[Weight, WeightPlan]]:
        """Weights with a plan that asks for zeros, in graph order."""
        for name, plan in self.plans.items():
            if plan.skipped is None and plan.sparsity > 0:
                yield self.weights[name], plan

    def grids(self) -> dict[str, Grid]:
        """Grids by weight; none unless QUANTIZED holds: a later pass may have moved the values."""
        if Fact.QUANTIZED not in self.facts:
            return {}
        return {name: plan.grid for name, plan in self.plans.items() if plan.grid is not None}

    def parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        seen = {id(p): p.numel() for p in self.graph_module.parameters()}
        if self.module is not None:
            seen |= {id(p): p.numel() for p in self.module.parameters()}
        return sum(seen.values())

    @property
    def graph(self) -> "networkx.DiGraph[str]":
        """The traced graph as a networkx graph: node names, edges from producer to consumer.

        Node attributes: `op`, `target` (text), `weight` (canonical name, get_attr nodes only).
        """
        import networkx

        by_attribute = {weight.attribute: name for name, weight in self.weights.items()}
        view: networkx.DiGraph[str] = networkx.DiGraph()
        for node in self.graph_module.graph.nodes:
            attributes: dict[str, Any] = {"op": node.op, "target": str(node.target)}
            if node.op == "get_attr" and node.target in by_attribute:
                attributes["weight"] = by_attribute[node.target]
            view.add_node(node.name, **attributes)
            view.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
        return view

    def run(self, *args: Any) -> Any:
        """Run the traced graph on inputs laid out like `signature.args`."""
        with torch.no_grad():
            return self.graph_module(*args)

    def to_text(self) -> str:
        """The graph as numbered text, one node a line, with shapes and planned sparsity."""
        by_attribute = {weight.attribute: weight for weight in self.weights.values()}
        lines = []
        for index, node in enumerate(self.graph_module.graph.nodes):
            lines.append(f"{index:5d}  {_node_text(node, by_attribute, self.plans)}")
        return "\n".join(lines) + "\n"


def _node_text(node: fx.Node, by_attribute: dict[str, Weight], plans: dict[str, WeightPlan]) -> str:
    value = node.meta.get("val")
    shape = ""
    if isinstance(value, Tensor):
        dims = ", ".join(str(size) for size in value.shape)
        shape = f" : {str(value.dtype).removeprefix('torch.')}[{dims}]"
    if node.op == "get_attr":
        weight = by_attribute.get(str(node.target))
        name = weight.name if weight else str(node.target)
        if weight is not None:
            shape = f" : {list(weight.parameter.shape)}"
        plan = plans.get(name)
        note = ""
        if plan is not None and plan.skipped is None:
            note = f"  # sparsity {plan.sparsity:g} {plan.pattern}"
            if weight is not None and plan.mask is not None:
                note += f", now {float((weight.parameter == 0).float().mean()):.4f}"
        return f"%{node.name} = weight {name}{shape}{note}"
    target = str(node.target) if node.op != "placeholder" else ""
    args = ", ".join(
        [_argument_text(a) for a in node.args]
        + [f"{k}={_argument_text(v)}" for k, v in node.kwargs.items()]
    )
    label = node.op if node.op in ("placeholder", "output") else target
    return f"%{node.name} = {label}({args}){shape}"


def _argument_text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument_text(v) for v in value) + "]"
    return str(value)
