"""Which dimension of which weight is tied to which: dependencies of sizes in a traced graph.

Removing entry i of one dimension forces the removal of entries of other dimensions: row i of a
layer, entry i of its bias, column i of the layer that reads it. `find_ties` walks the graph once
and notes, operator by operator, which entries go together; `units` makes the classes of entries
that leave together: an MLP neuron, an attention head (with its group of query heads), a channel.

What an operator does to a dimension is written in `channel_rules` and `channel_layout`. A dimension
that something unknown, a normalisation or the outside world looks at as a whole is pinned, with the
reason.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import networkx
import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from elsa_compile.program import Program

Key = tuple[str, int]  # (node, or graph attribute of a weight or buffer; dimension)
Indices = NDArray[numpy.int64]
UnitKind = Literal["neurons", "heads", "channels"]


@dataclass(frozen=True)
class Tie:
    """Entry ia[j] of one dimension and entry ib[j] of another leave together, for every j.

    Attributes:
        node: the operator that ties them.
        a: a dimension of what it reads.
        b: a dimension of what it gives, or of something else that it reads.
    """

    node: str
    a: Key
    b: Key
    ia: Indices
    ib: Indices


@dataclass(frozen=True)
class Product:
    """A node that multiplies by a weight.

    Attributes:
        node: its name.
        weight: graph attribute of the weight.
        rows: dimension of the stored weight along its outputs.
        columns: dimension of the stored weight along its inputs; None where every output has one
            input of its own (depthwise convolution).
        read: the dimension that is summed over.
        made: the dimension of the outputs.
        bias: graph attribute of the bias, or None.
        padded: True when zeros stand beside the input: a constant input is none at the edges.
    """

    node: str
    weight: str
    rows: int
    columns: int | None
    read: Key
    made: Key
    bias: str | None
    padded: bool = False


@dataclass
class Ties:
    """What `find_ties` found in a program.

    Attributes:
        sizes: of every dimension that has a fixed size above 1.
        ties: in graph order.
        pins: dimension -> why nothing of it may be removed.
        attention: dimensions of heads.
        convolved: dimensions of channels.
        products: by node.
        tensors: graph attribute -> weight or buffer; one name for each tensor.
        attributes: every graph attribute -> the name in `tensors`.
    """

    program: Program
    sizes: dict[Key, int] = field(default_factory=dict)
    ties: list[Tie] = field(default_factory=list)
    pins: dict[Key, str] = field(default_factory=dict)
    attention: set[Key] = field(default_factory=set)
    convolved: set[Key] = field(default_factory=set)
    products: dict[str, Product] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)

    def shape(self, node: fx.Node) -> list[int | None]:
        """Sizes of a node's value, None where dynamic; [] when it is no tensor."""
        if node.op == "get_attr":
            return list(self.tensors[self.attributes[str(node.target)]].shape)
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return []
        return [size if isinstance(size, int) else None for size in value.shape]

    def key(self, node: fx.Node, dim: int) -> Key:
        """The dimension of a node's value; negative ones count from the end."""
        rank = len(self.shape(node))
        name = self.attributes[str(node.target)] if node.op == "get_attr" else node.name
        return name, dim % max(rank, 1)

    def size(self, node: fx.Node, dim: int) -> int | None:
        """Its size when fixed."""
        return self.shape(node)[dim]

    def tie(
        self,
        node: fx.Node,
        a: tuple[fx.Node, int],
        b: tuple[fx.Node, int],
        ia: Indices | None = None,
        ib: Indices | None = None,
    ) -> None:
        """Tie two dimensions entry by entry; without indices they must have one size."""
        size_a, size_b = self.size(*a), self.size(*b)
        if size_a is None or size_b is None or max(size_a, size_b) < 2:
            return
        key_a, key_b = self.key(*a), self.key(*b)
        self.sizes[key_a], self.sizes[key_b] = size_a, size_b
        if ia is None and ib is None and size_a != size_b:
            self.pin(*a, f"{node.target} broadcasts it")
            self.pin(*b, f"{node.target} broadcasts it")
            return
        first = numpy.arange(size_a) if ia is None else ia
        second = numpy.arange(size_b) if ib is None else ib
        self.ties.append(Tie(node.name, key_a, key_b, first, second))

    def pin(self, node: fx.Node, dim: int, reason: str) -> None:
        """Nothing of this dimension may be removed."""
        size = self.size(node, dim)
        if size is not None and size > 1:
            key = self.key(node, dim)
            self.sizes[key] = size
            self.pins.setdefault(key, reason)

    def pin_all(self, node: fx.Node, reason: str) -> None:
        """Nothing of this value may be removed."""
        for dim in range(len(self.shape(node))):
            self.pin(node, dim, reason)


def attribute(owner: Any, target: str) -> Any:
    """`owner.a.b.c` for the target "a.b.c"."""
    for part in target.split("."):
        owner = getattr(owner, part)
    return owner


def find_ties(program: Program) -> Ties:
    """Walk the traced graph and note which entries of which dimensions go together."""
    from elsa_compile.channel_rules import apply_rule

    found = Ties(program)
    names: dict[int, str] = {}
    nodes = list(program.graph_module.graph.nodes)
    for node in nodes:
        if node.op == "get_attr":
            value = attribute(program.graph_module, str(node.target))
            if isinstance(value, Tensor):
                first = names.setdefault(id(value), str(node.target))
                found.tensors[first] = value
                found.attributes[str(node.target)] = first
    by_name = dict(zip(_leaf_nodes(nodes), program.signature.input_names, strict=False))
    for node in nodes:
        if node.op == "placeholder":
            _pin_input(found, node, by_name.get(node, ""))
        elif node.op == "output":
            _pin_outputs(found, node)
        elif node.op == "call_function":
            apply_rule(found, node)
    return found


def _leaf_nodes(nodes: list[fx.Node]) -> list[fx.Node]:
    return [node for node in nodes if node.op == "placeholder"]


def _pin_input(found: Ties, node: fx.Node, name: str) -> None:
    for dim in range(len(found.shape(node))):
        if not (name.startswith("past_key_values.") and dim == 1):
            found.pin(node, dim, f"it is a size of the model's input {name or node.name}")


def _pin_outputs(found: Ties, node: fx.Node) -> None:
    names = found.program.signature.output_names
    for index, source in enumerate(output_nodes(node)):
        name = names[index] if index < len(names) else f"output {index}"
        for dim in range(len(found.shape(source))):
            if not (name.startswith("present.") and dim == 1):
                found.pin(source, dim, f"it is a size of the model's output {name}")


def output_nodes(node: fx.Node) -> list[fx.Node]:
    """The values that the graph returns, in the order of `signature.output_names`."""
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(node.args) if isinstance(leaf, fx.Node)]


# --- Units --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    """Classes of entries that leave together, all along one group of tied dimensions.

    Attributes:
        name: canonical name of the first weight that reads them.
        kind: "heads" when attention works on them one by one, "channels" of convolutions, else
            "neurons".
        count: how many units there are.
        labels: dimension -> (size,) the unit of each of its entries.
        pinned: why none may be removed, or None.
    """

    name: str
    kind: UnitKind
    count: int
    labels: dict[Key, Indices]
    pinned: str | None = None

    @property
    def weights(self) -> list[str]:
        """Names of the tensors and nodes whose sizes hang on these units."""
        return list(dict.fromkeys(name for name, _ in self.labels))


def units(found: Ties) -> list[Units]:
    """All groups of units that some weight makes or reads, in graph order.

    Pinned groups (the residual stream, a head's inner width) are among them.
    """
    graph: networkx.Graph[Key] = networkx.Graph()
    graph.add_nodes_from(found.sizes)
    graph.add_edges_from((tie.a, tie.b) for tie in found.ties)
    inside: dict[Key, int] = {}
    components = [set(keys) for keys in networkx.connected_components(graph)]
    for number, keys in enumerate(components):
        inside.update(dict.fromkeys(keys, number))
    own: list[list[Tie]] = [[] for _ in components]
    for tie in found.ties:
        own[inside[tie.a]].append(tie)
    canonical = {w.attribute: w.name for w in found.program.weights.values()}
    groups = []
    for keys, ties in zip(components, own, strict=True):
        readers = [
            p.weight
            for p in found.products.values()
            if p.columns is not None and (p.weight, p.columns) in keys
        ]
        if not any(name in found.tensors for name, _ in keys):
            continue
        first = readers[0] if readers else next(n for n, _ in keys if n in found.tensors)
        groups.append(_unit_group(found, canonical.get(first, first), keys, ties, bool(readers)))
    order = {name: i for i, name in enumerate(canonical.values())}
    return sorted(groups, key=lambda group: order.get(group.name, -1))


def _unit_group(found: Ties, name: str, keys: set[Key], ties: list[Tie], read: bool) -> Units:
    ordered = sorted(keys)
    pinned = next((found.pins[key] for key in ordered if key in found.pins), None)
    if pinned is None and not read:
        pinned = "no weight reads it"
    kind: UnitKind = "neurons"
    if keys & found.attention:
        kind = "heads"
    elif keys & found.convolved:
        kind = "channels"
    count, labels = _classes({key: found.sizes[key] for key in ordered}, ties)
    return Units(name, kind, count, labels, pinned)


def _classes(sizes: dict[Key, int], ties: list[Tie]) -> tuple[int, dict[Key, Indices]]:
    """Number of classes, and (size,) the class of each entry of each dimension."""
    starts: dict[Key, int] = {}
    total = 0
    for key, size in sizes.items():
        starts[key], total = total, total + size
    label = numpy.arange(total)
    pairs = [(tie.ia + starts[tie.a], tie.ib + starts[tie.b]) for tie in ties]
    changed = True
    while changed:  # the smallest number of each class spreads along the ties
        before = label.copy()
        for ia, ib in [*pairs, *reversed(pairs)]:
            least = numpy.minimum(label[ia], label[ib])
            numpy.minimum.at(label, ia, least)
            numpy.minimum.at(label, ib, least)
        changed = bool((label != before).any())
    distinct, numbers = numpy.unique(label, return_inverse=True)
    flat = numbers.reshape(-1).astype(numpy.int64)
    return len(distinct), {k: flat[starts[k] : starts[k] + sizes[k]] for k in sizes}


# --- Matrices -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One matrix that a group of units runs through.

    Attributes:
        weight: canonical name.
        axis: 0 when each unit has rows of the matrix (N, K), 1 when it has columns.
        labels: (N,) or (K,) int64, the unit of each row or column.
    """

    weight: str
    axis: Literal[0, 1]
    labels: Tensor


def members(found: Ties, group: Units) -> Iterator[Member]:
    """The prunable matrices of a group, in graph order."""
    labels = group.labels
    for weight in found.program.prunable.values():
        name = found.attributes.get(weight.attribute)
        if name is None:
            continue
        rows, columns = (1, 0) if weight.transposed else (0, 1)
        if (name, rows) in labels:
            yield Member(weight.name, 0, torch.from_numpy(labels[name, rows]))
        if (name, columns) in labels and weight.parameter.shape[columns] > 1:
            kernel = int(weight.parameter[0, 0].numel()) if weight.kind == "conv" else 1
            spread = torch.from_numpy(labels[name, columns]).repeat_interleave(kernel)
            yield Member(weight.name, 1, spread)
