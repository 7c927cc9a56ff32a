"""How weights lie in the exported graph: stored as they are used, and in half precision on demand.

A weight behind a Transpose is folded by onnxruntime and other tools into a second, dense tensor.
So what the graph does to a weight before its first real use is done here, once.
"""

from collections.abc import Collection

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper

from elsa_compile.errors import UserInputError
from elsa_compile.weight_store import (
    Array,
    StoredWeight,
    Use,
    WeightStore,
    find_uses,
    forget_values,
    fresh_name,
    pinned,
    tensor_type,
    value_names,
)

HALF_MIN_BYTES = 1024  # below, a Cast costs more than it saves: norms and biases stay fp32
HALVES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}

# The largest values; what rounds beyond them to nearest would be infinite.
_LARGEST = {kind: float(ml_dtypes.finfo(dtype).max) for kind, dtype in HALVES.items()}
_LAYOUT_OPS = frozenset({"Transpose", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Cast"})


def store_transposed(store: WeightStore) -> list[str]:
    """Store every weight the way its consumers read it; returns what was left alone, and why.

    Transpose, Identity, Reshape, Squeeze, Unsqueeze with constant arguments and narrowing float
    Casts on an initializer disappear, chains of them too; the initializer keeps its name and takes
    the final shape (views where numpy can, so no memory). A weight with other uses as well, a tied
    embedding for instance, keeps its one copy and its Transpose: two would make the file larger.
    """
    graph = store.graph
    while True:
        uses = find_uses(graph)
        removed: dict[int, NodeProto] = {}
        changed: set[str] = set()
        for name in list(store.weights):
            _absorb(store, name, uses.get(name, []), uses, removed, changed)
        if not removed:
            break
        kept = [node for node in graph.node if id(node) not in removed]
        del graph.node[:]
        graph.node.extend(kept)
        forget_values(graph, changed)
    _drop_unused(store)
    return _left_alone(store)


def _absorb(
    store: WeightStore,
    name: str,
    group: list[Use],
    uses: dict[str, list[Use]],
    removed: dict[int, NodeProto],
    changed: set[str],
) -> None:
    """Apply the one layout operation that is all the graph does with this weight.

    An Identity goes even when others read the weight too: it changes nothing for them.
    """
    identities = [use for use in group if _same_operation(use, use.node, frozenset({"Identity"}))]
    group = identities or group
    nodes = {id(use.node): use.node for use in group}
    outputs = [node.output[0] for node in nodes.values()]
    if not group or any(pinned(store.graph, value) for value in (name, *outputs)):
        return
    first = group[0].node
    if not identities and any(not _same_operation(use, first, _LAYOUT_OPS) for use in group):
        return
    result = _apply(store, first)
    if result is None:
        return
    store.weights[name] = result
    removed.update(nodes)
    changed.update((name, *outputs))
    readers = [use for output in outputs for use in uses.get(output, [])]
    for use in readers:
        use.redirect(name)


def _same_operation(use: Use, first: NodeProto, operations: frozenset[str]) -> bool:
    node = use.node
    return (
        not use.nested
        and use.slot == 0
        and node.op_type in operations
        and node.domain in ("", "ai.onnx")
        and node.op_type == first.op_type
        and list(node.input) == list(first.input)
        and _attributes(node) == _attributes(first)
    )


def _attributes(node: NodeProto) -> dict[str, bytes]:
    return {a.name: a.SerializeToString(deterministic=True) for a in node.attribute}


def _apply(store: WeightStore, node: NodeProto) -> StoredWeight | None:
    """The weight after the operation; None where it is not constant or would grow the file."""
    weight = store.weights[node.input[0]]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    array = weight.array
    if node.op_type == "Identity":
        return weight
    if node.op_type == "Transpose":
        return StoredWeight(array.transpose(attributes.get("perm")), weight.dtype)
    if node.op_type == "Cast":
        return _cast(weight, int(attributes["to"]))
    argument = _constant(store, node)
    if argument is None:
        return None
    if node.op_type == "Reshape":
        shape = [int(n) for n in argument]
        if not attributes.get("allowzero", 0):
            shape = [array.shape[i] if n == 0 else n for i, n in enumerate(shape)]
        return StoredWeight(array.reshape(shape), weight.dtype)
    axes = tuple(int(n) for n in argument)
    if node.op_type == "Squeeze":
        return StoredWeight(array.squeeze(axes), weight.dtype)
    return StoredWeight(np.expand_dims(array, axes), weight.dtype)


def _cast(weight: StoredWeight, to: int) -> StoredWeight | None:
    """A float cast that does not widen: widening would trade a Cast for a larger file."""
    if to not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE):
        return None
    target = helper.tensor_dtype_to_np_dtype(to)
    if weight.dtype.kind != "f" or target.itemsize > weight.dtype.itemsize:
        return None
    array: Array = weight.array.astype(weight.dtype, copy=False)
    with np.errstate(over="ignore"):  # onnxruntime's Cast gives infinity there too
        return StoredWeight(array.astype(target, copy=False), target)


def _constant(store: WeightStore, node: NodeProto) -> NDArray[np.int64] | None:
    """The second input as numbers, if it is an initializer that nobody can override."""
    if len(node.input) != 2 or pinned(store.graph, node.input[1]):
        return None
    found = store.weights.get(node.input[1])
    if found is None or found.dtype != np.int64:
        return None
    return np.asarray(found.array, dtype=np.int64).reshape(-1)


def _drop_unused(store: WeightStore) -> None:
    """Shape constants of removed Reshapes have no reader left."""
    read = find_uses(store.graph)
    unused = [n for n in store.weights if n not in read and not pinned(store.graph, n)]
    for name in unused:
        del store.weights[name]
    forget_values(store.graph, set(unused))


def _left_alone(store: WeightStore) -> list[str]:
    """One sentence for each weight that still goes through a Transpose."""
    notes = []
    uses = find_uses(store.graph)
    for name in store.weights:
        group = uses.get(name, [])
        if not any(use.node.op_type == "Transpose" for use in group):
            continue
        others = sorted({use.node.op_type for use in group} - {"Transpose"})
        if pinned(store.graph, name):
            reason = "it is an input or output of the graph"
        elif others:
            reason = f"it is also read by {', '.join(others)}; one copy serves both"
        else:
            reason = "its readers want it in different layouts or hand it out of the graph"
        notes.append(f"{name}: stays behind a Transpose, {reason}")
    return notes


def weights_to_half(store: WeightStore, names: Collection[str], kind: str) -> list[str]:
    """Store fp32 weights in two bytes, a Cast to fp32 behind; returns what stayed fp32, and why.

    The file is half as large; inputs, outputs and arithmetic stay fp32, since onnxruntime folds the
    Cast while loading (up to 1 GiB a weight by its default limit; a larger one is cast at every
    run). Behind a Gather the Cast follows the Gather: only the rows that are read are cast, and the
    table stays as it is in memory.

    Args:
        store: changed in place.
        names: the weights; those of one dimension or under HALF_MIN_BYTES stay fp32.
        kind: fp16 or bf16.

    Raises:
        UserInputError: a value that the type cannot hold; names the weight and the value.
    """
    notes = []
    uses = find_uses(store.graph)
    taken = value_names(store.graph)
    for name in names:
        weight = store.weights[name]
        if weight.dtype != np.float32 or weight.array.ndim < 2 or weight.nbytes < HALF_MIN_BYTES:
            continue
        if pinned(store.graph, name):
            notes.append(f"{name}: stays float32, it is an input or output of the graph")
            continue
        _check_range(name, weight, kind)
        store.weights[name] = StoredWeight(weight.array, HALVES[kind])
        _cast_back(store.graph, name, uses.get(name, []), taken)
    forget_values(store.graph, set(names))
    return notes


def _check_range(name: str, weight: StoredWeight, kind: str) -> None:
    for block in weight.blocks():
        with np.errstate(over="ignore"):
            bad = np.flatnonzero(~np.isfinite(block.astype(HALVES[kind]).astype(np.float32)))
        if len(bad):
            raise UserInputError(
                f"--dtype {kind}: the weight {name} holds the value {block[bad[0]]:g}, outside the "
                f"{kind} range of +-{_LARGEST[kind]:g}; export with --dtype fp32"
            )


def _cast_back(graph: GraphProto, name: str, uses: list[Use], taken: set[str]) -> None:
    """Insert the Casts: after each plain Gather, else one directly behind the weight."""
    wide = None
    for use in uses:
        if use.node.op_type == "Gather" and use.slot == 0 and not use.nested:
            rows = use.node.output[0]
            use.node.output[0] = fresh_name(taken, f"{rows}.half")
            place = next(i for i, node in enumerate(graph.node) if node is use.node)
            graph.node.insert(place + 1, _cast_node(use.node.output[0], rows))
            continue
        if wide is None:
            wide = fresh_name(taken, f"{name}.float32")
            graph.node.insert(0, _cast_node(name, wide))
        use.redirect(wide)


def _cast_node(source: str, target: str) -> NodeProto:
    to = tensor_type(np.dtype(np.float32))
    node: NodeProto = helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=to)
    return node
