"""Calibration on the traced graph, a segment at a time.

Layer-wise pruners need the inputs that each weight sees once everything before it has been pruned.
Instead of knowing how each model family nests its blocks, the graph itself is cut where few values
are alive (in a transformer: the residual stream after attention and after the MLP), and one
segment after another is run over all samples. Between segments only the values that cross the cut
are kept, so memory is that of one segment's activations for one batch plus the crossing values.

Values that depend on no sample (masks, rotary tables, positions) are computed once and shared.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from elsa_compile.program import Program, Weight

Values = dict[fx.Node, Any]
# observe(weights, rows): the (M, K) rows that the product of each of these weights consumes.
Observer = Callable[[tuple[Weight, ...], Tensor], None]


@dataclass(frozen=True)
class Segment:
    """A run of consecutive graph nodes and the weights whose products lie in it."""

    nodes: tuple[fx.Node, ...]
    products: tuple[tuple[fx.Node, Weight], ...]  # product node, its weight

    @property
    def weights(self) -> list[Weight]:
        """The segment's weights, each once, in graph order."""
        return list({w.name: w for _, w in self.products}.values())


def product_nodes(program: Program, names: Sequence[str]) -> dict[fx.Node, Weight]:
    """Nodes that multiply by one of the named weights: linear, matmul, addmm, convolution."""
    attributes = {program.weights[name].attribute: program.weights[name] for name in names}
    objects = {id(weight.parameter): weight for weight in attributes.values()}
    found: dict[fx.Node, Weight] = {}
    for node in program.graph_module.graph.nodes:
        if node.op != "get_attr":
            continue
        value: Any = program.graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        weight = objects.get(id(value))
        if weight is None:
            continue
        frontier = [node]
        while frontier:  # through transposes and views of the weight
            current = frontier.pop()
            for user in current.users:
                if len(user.all_input_nodes) == 1:
                    frontier.append(user)
                elif "embedding" not in str(user.target):
                    found[user] = weight
    return found


class SegmentedRun:
    """Runs the traced graph over samples segment by segment.

    Use: for each segment in `segments()`, call `observe` (inputs of its weights, with the weights
    as they are), change the weights, then `advance` (recompute with the new weights).
    """

    def __init__(
        self,
        program: Program,
        names: Sequence[str],
        samples: Sequence[tuple[Any, ...]],
        device: torch.device,
    ) -> None:
        """Place sample-independent values and prepare the cuts.

        Args:
            program: the traced model.
            names: weights to observe.
            samples: per sample the flat graph inputs, Tensor each, in placeholder order.
            device: where segments run; crossing values are stored on the CPU.
        """
        self.device = device
        self.program = program
        self.products = product_nodes(program, names)
        nodes = list(program.graph_module.graph.nodes)
        self.needed = _ancestors(self.products)
        self.placeholders = [n for n in nodes if n.op == "placeholder"]
        self.varying = self._varying_nodes(nodes, samples)
        self.shared: Values = {}
        self.states: list[Values] = [{} for _ in samples]
        for node, *values in zip(self.placeholders, *samples, strict=True):
            if node not in self.varying:
                self.shared[node] = values[0]
                continue
            for state, value in zip(self.states, values, strict=True):
                state[node] = value

    def _varying_nodes(
        self, nodes: list[fx.Node], samples: Sequence[tuple[Any, ...]]
    ) -> set[fx.Node]:
        """Nodes whose value differs between samples, or depends on a weight being pruned.

        The size of a value is no such dependence as long as all samples have one shape: masks
        and rotary tables are made from sizes, and would otherwise cross every cut.
        """
        varying: set[fx.Node] = set()
        one_shape = all(
            isinstance(value, Tensor) and value.shape == first.shape
            for first, *rest in zip(*samples, strict=True)
            for value in rest
        )
        for index, node in enumerate(self.placeholders):
            first = samples[0][index]
            if any(not _same(first, sample[index]) for sample in samples[1:]) or index == 0:
                varying.add(node)
        for node in nodes:
            if one_shape and "sym_size" in str(node.target):
                continue
            if node in self.products or any(source in varying for source in node.all_input_nodes):
                varying.add(node)
        return varying

    def segments(self) -> list[Segment]:
        """Cut the graph where at most as many varying tensors live as at its inputs.

        A cut directly after node i is allowed when a single varying value crosses it; the last
        segment ends with the last product.
        """
        nodes = [n for n in self.program.graph_module.graph.nodes if n in self.needed]
        position = {node: i for i, node in enumerate(nodes)}
        last_use = {n: max((position.get(u, -1) for u in n.users), default=-1) for n in nodes}
        segments: list[Segment] = []
        current: list[fx.Node] = []
        alive: set[fx.Node] = set()
        for index, node in enumerate(nodes):
            current.append(node)
            if node in self.varying:
                alive.add(node)
            alive = {n for n in alive if last_use[n] > index}
            tensors = [n for n in alive if isinstance(n.meta.get("val"), Tensor)]
            here = [(n, self.products[n]) for n in current if n in self.products]
            if (len(tensors) <= 1 and here) or index == len(nodes) - 1:
                segments.append(Segment(tuple(current), tuple(here)))
                current = []
        return segments

    def observe(self, segment: Segment, observer: Observer) -> None:
        """Run a segment over all samples and show each weight's inputs; states stay unchanged.

        Weights that consume the same values (query, key and value) are shown together, once.
        """
        products = dict(segment.products)
        groups = _same_inputs(segment)

        def show(node: fx.Node, values: Values) -> None:
            weight = products.get(node)
            if weight is not None and groups[weight.name][0] is weight:
                observer(groups[weight.name], product_input(node, values))

        last = max(i for i, n in enumerate(segment.nodes) if n in products)
        for state in self.states:
            self._run(segment.nodes[: last + 1], state, show, keep=False)

    def advance(self, segment: Segment) -> None:
        """Run a segment for good: afterwards the states hold what crosses its end."""
        inside = set(segment.nodes)
        for state in self.states:
            values = self._run(segment.nodes, state, None, keep=True)
            state.clear()
            state.update(
                (node, _move(value, torch.device("cpu")))
                for node, value in values.items()
                if any(u in self.needed and u not in inside and u not in values for u in node.users)
            )

    def _run(
        self,
        nodes: Sequence[fx.Node],
        state: Values,
        show: Callable[[fx.Node, Values], None] | None,
        keep: bool,
    ) -> Values:
        """Evaluate nodes in order; free values after their last use inside, unless kept."""
        values = _View(self.shared, {n: _move(v, self.device) for n, v in state.items()})
        remaining = _remaining_uses(nodes)
        with torch.no_grad():
            for node in nodes:
                if node.op != "placeholder" and node not in values:
                    result = self._evaluate(node, values)
                    if node in self.varying:
                        values.own[node] = result
                    else:
                        self.shared[node] = result
                if show is not None and node.op == "call_function":
                    show(node, values)
                for source in node.all_input_nodes:
                    remaining[source] -= 1
                    outside = keep and any(u not in remaining for u in source.users)
                    if remaining[source] == 0 and not outside:
                        values.own.pop(source, None)
        return values.own

    def _evaluate(self, node: fx.Node, values: "_View") -> Any:
        if node.op == "get_attr":
            value: Any = self.program.graph_module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return _move(value, self.device)
        args = fx.node.map_arg(node.args, lambda n: values[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
        assert callable(node.target)
        return node.target(*args, **kwargs)


class _View(dict[fx.Node, Any]):
    """Sample values over shared values, without copying either."""

    def __init__(self, shared: Values, own: Values) -> None:
        super().__init__()
        self.shared = shared
        self.own = own

    def __getitem__(self, node: fx.Node) -> Any:
        return self.own[node] if node in self.own else self.shared[node]

    def __contains__(self, node: object) -> bool:
        return node in self.own or node in self.shared


def _same_inputs(segment: Segment) -> dict[str, tuple[Weight, ...]]:
    """For each weight all weights that consume exactly the same values, itself included."""
    sources: dict[str, list[fx.Node]] = {}
    weights = {weight.name: weight for weight in segment.weights}
    for node, weight in segment.products:
        # A convolution's rows depend on its own stride and padding: it shares with nobody.
        shared = None if "conv" in str(node.target) else node.args[_activation_index(node)]
        sources.setdefault(weight.name, []).append(shared if isinstance(shared, fx.Node) else node)
    groups: dict[tuple[fx.Node, ...], list[Weight]] = {}
    for name, nodes in sources.items():
        groups.setdefault(tuple(nodes), []).append(weights[name])
    return {w.name: tuple(group) for group in groups.values() for w in group}


def _activation_index(node: fx.Node) -> int:
    """Position of the activations: addmm(bias, x, w), linear(x, w, b), mm / matmul(x, w)."""
    return 1 if "addmm" in str(node.target) else 0


def _remaining_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    counts: dict[fx.Node, int] = dict.fromkeys(nodes, 0)
    for node in nodes:
        for source in node.all_input_nodes:
            counts[source] = counts.get(source, 0) + 1
    return counts


def _ancestors(products: dict[fx.Node, Weight]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    frontier = list(products)
    while frontier:
        node = frontier.pop()
        if node not in found:
            found.add(node)
            frontier.extend(node.all_input_nodes)
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))
    return bool(a == b)


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_move(item, device) for item in value)
    return value


# --- What a product consumes --------------------------------------------------------------


def product_input(node: fx.Node, values: Any) -> Tensor:
    """Rows (M, K) that a product node multiplies with its weight.

    A convolution's input is unfolded to patches; for grouped convolutions the groups' patches are
    stacked, since all output channels share one K in the (N, K) view.
    """
    target = str(node.target)
    if "conv" in target:
        return _patches(node, values)
    activations: Tensor = values[node.args[_activation_index(node)]]
    return activations.reshape(-1, activations.shape[-1])


def _patches(node: fx.Node, values: Any) -> Tensor:
    def value(index: int, default: Any) -> Any:
        if len(node.args) <= index:
            return default
        return fx.node.map_arg(node.args[index], lambda n: values[n])

    x, weight = values[node.args[0]], values[node.args[1]]
    spatial = weight.dim() - 2
    general = "convolution" in str(node.target)
    stride = _spread(value(3, 1), spatial)
    padding, dilation = value(4, 0), _spread(value(5, 1), spatial)
    groups = int(value(8 if general else 6, 1))
    kernel = weight.shape[2:]
    if isinstance(padding, str):
        pairs = zip(dilation, kernel, strict=True)
        total = [d * (k - 1) if padding == "same" else 0 for d, k in pairs]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in _spread(padding, spatial)]
    flat = [amount for pair in reversed(pads) for amount in pair]
    x = torch.nn.functional.pad(x, flat)
    for axis in range(spatial):
        span = dilation[axis] * (kernel[axis] - 1) + 1
        x = x.unfold(2 + axis, span, stride[axis])[..., :: dilation[axis]]
    # x: (B, C, *out, *kernel) -> (B, *out, groups, C / groups, *kernel) -> rows
    batch, channels, out = x.shape[0], x.shape[1], x.shape[2 : 2 + spatial]
    x = x.reshape(batch, groups, channels // groups, *out, *kernel)
    order = [0, *range(3, 3 + spatial), 1, 2, *range(3 + spatial, 3 + 2 * spatial)]
    return x.permute(order).reshape(-1, weight[0].numel())


def _spread(value: Any, count: int) -> list[int]:
    sizes = [value] if isinstance(value, int) else list(value)
    return sizes * count if len(sizes) == 1 else sizes


def iterate(
    program: Program,
    names: Sequence[str],
    samples: Sequence[tuple[Any, ...]],
    device: torch.device,
) -> Iterator[tuple[SegmentedRun, Segment]]:
    """Yield each segment; the caller observes and prunes it before asking for the next."""
    run = SegmentedRun(program, names, samples, device)
    segments = run.segments()
    for index, segment in enumerate(segments):
        yield run, segment
        if index < len(segments) - 1:
            run.advance(segment)
