"""Products that read the same input, merged into one in the exported graph.

    before  q = x Wq, k = x Wk, v = x Wv        after  q, k, v = Split(x [Wq Wk Wv])

One larger matrix instead of several: fewer operators, and one sparse product where three were. This
is done here and not in the program, whose module and traced graph hold the same Parameters: there
they stay apart, and so do the plans, masks and grids.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from onnx import NodeProto, helper

from elsa_compile.quantised_weights import QuantisedWeight, without_gemm
from elsa_compile.weight_store import (
    Array,
    StorageRecord,
    StoredWeight,
    WeightStore,
    find_uses,
    forget_values,
    fresh_name,
    pinned,
    value_names,
)


@dataclass(frozen=True)
class Branch:
    """One product: MatMul(x, weight), perhaps followed by nothing but the addition of a bias.

    Attributes:
        weight: initializer (K, N).
        product: the MatMul.
        bias: (N,) float32, or None.
        add: the Add, where there is a bias.
    """

    weight: str
    product: NodeProto
    bias: Array | None = None
    add: NodeProto | None = None

    @property
    def output(self) -> str:
        """The value that the rest of the graph reads."""
        return str((self.add or self.product).output[0])


def merge_parallel(
    store: WeightStore, groups: Iterable[tuple[str, ...]], quantised: dict[str, QuantisedWeight]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Merge the products of each group of weights.

    Call it after `store_transposed` and before the weights become whole numbers.

    Args:
        store: changed.
        groups: names of initializers whose products read one input, in the order of the columns.
        quantised: whole numbers and scales; those of merged weights are replaced by one entry.

    Returns:
        Merged name -> its parts in order, and a sentence for each group that stays apart.
    """
    merged: dict[str, tuple[str, ...]] = {}
    notes = []
    for group in groups:
        problem = _form_problem(group, quantised)
        branches = problem or _branches(store, group)
        if isinstance(branches, str):
            notes.append(f"{merged_name(group)}: not merged, {branches}")
            continue
        name = _merge(store, branches)
        merged[name] = group
        parts = [quantised.pop(part) for part in group if part in quantised]
        if parts:
            quantised[name] = QuantisedWeight(
                np.concatenate([part.integers for part in parts]),
                np.concatenate([part.scale for part in parts]),
                parts[0].bits,
                parts[0].half,
            )
    return merged, notes


def merged_name(parts: tuple[str, ...]) -> str:
    """One name for several weights.

    >>> merged_name(("a.0.q_proj.weight", "a.0.k_proj.weight"))
    'a.0.q_proj+k_proj.weight'
    """
    split = [part.split(".") for part in parts]
    shortest = min(len(words) for words in split)
    start = 0
    while start < shortest and len({words[start] for words in split}) == 1:
        start += 1
    end = 0
    while end < shortest - start and len({words[-1 - end] for words in split}) == 1:
        end += 1
    middle = "+".join(".".join(words[start : len(words) - end]) for words in split)
    tail = split[0][len(split[0]) - end :]
    differs = [middle] if middle.strip("+") else []
    return ".".join([*split[0][:start], *differs, *tail])


def form_of(weight: QuantisedWeight | None) -> str:
    """How a weight is quantised, as text."""
    if weight is None:
        return "float"
    kind = "float16" if weight.half else "float32"
    return f"int{weight.bits} with {weight.scale.shape[1]} {kind} scales a row"


def _form_problem(group: tuple[str, ...], quantised: dict[str, QuantisedWeight]) -> str | None:
    forms = {form_of(quantised.get(name)) for name in group}
    if len(forms) == 1:
        return None
    return f"its parts are quantised differently: {', '.join(sorted(forms))}"


def _branches(store: WeightStore, group: tuple[str, ...]) -> list[Branch] | str:
    """What the graph does with the weights of a group, or why they cannot be merged."""
    for name in group:
        if name in store.weights:
            without_gemm(store, name, find_uses(store.graph).get(name, []))
    uses = find_uses(store.graph)
    branches = []
    for name in group:
        found = uses.get(name, [])
        if name not in store.weights or store.weights[name].array.ndim != 2:
            return f"{name} is no matrix of the exported graph"
        if len(found) != 1 or found[0].nested or pinned(store.graph, name):
            return f"{name} is read elsewhere too"
        node = found[0].node
        if node.op_type != "MatMul" or found[0].slot != 1:
            return f"{name} is read by {node.op_type}, not as the matrix of a MatMul"
        branches.append(_with_bias(store, name, node))
    if len({branch.product.input[0] for branch in branches}) > 1:
        return "its parts read different values of the exported graph"
    if len({store.weights[name].dtype for name in group}) > 1:
        return "its parts have different types"
    return branches


def _with_bias(store: WeightStore, name: str, product: NodeProto) -> Branch:
    """The branch, its bias found where the product goes to one Add with a vector and nowhere else.

    onnxruntime makes one Gemm of a MatMul and the Add behind it; a Split between would undo that.
    """
    value, width = product.output[0], store.weights[name].shape[1]
    readers = find_uses(store.graph).get(value, [])
    if len(readers) != 1 or readers[0].nested or pinned(store.graph, value):
        return Branch(name, product)
    add = readers[0].node
    if add.op_type != "Add" or len(set(add.input)) != 2:
        return Branch(name, product)
    other = store.weights.get(add.input[1 - readers[0].slot])
    if other is None or other.shape != (width,):
        return Branch(name, product)
    return Branch(name, product, other.array, add)


def _merge(store: WeightStore, branches: list[Branch]) -> str:
    """One MatMul, one Add where there is a bias, and a Split; returns the weight's name."""
    graph = store.graph
    taken = value_names(graph) | store.weights.keys()
    parts = tuple(branch.weight for branch in branches)
    name = fresh_name(taken, merged_name(parts))
    weights = [store.weights[part] for part in parts]
    widths = [weight.shape[1] for weight in weights]
    _put(store, name, parts, np.concatenate([weight.array for weight in weights], axis=1))
    value = fresh_name(taken, f"{name}.product")
    new = [helper.make_node("MatMul", [branches[0].product.input[0], name], [value])]
    if any(branch.bias is not None for branch in branches):
        bias, added = fresh_name(taken, f"{name}.bias"), fresh_name(taken, f"{name}.sum")
        store.weights[bias] = _joined_bias(branches, widths)
        new.append(helper.make_node("Add", [value, bias], [added]))
        value = added
    sizes = fresh_name(taken, f"{name}.widths")
    store.weights[sizes] = StoredWeight(np.array(widths), np.dtype(np.int64))
    outputs = [branch.output for branch in branches]
    new.append(helper.make_node("Split", [value, sizes], outputs, axis=-1))
    for node in new:
        node.name = f"{node.output[0]}.node"
    gone = {id(b.product) for b in branches} | {id(b.add) for b in branches if b.add is not None}
    nodes = [node for node in graph.node if id(node) not in gone]
    place = next(i for i, node in enumerate(graph.node) if id(node) in gone)
    before = sum(id(node) not in gone for node in graph.node[:place])
    del graph.node[:]
    graph.node.extend([*nodes[:before], *new, *nodes[before:]])
    _drop_unread(store, [b.add.input[i] for b in branches if b.add is not None for i in (0, 1)])
    forget_values(graph, {*parts, *(b.product.output[0] for b in branches)})
    return name


def _put(store: WeightStore, name: str, parts: tuple[str, ...], array: Array) -> None:
    """The merged weight, in the place of its first part."""
    dtype = store.weights[parts[0]].dtype
    store.weights = {
        (name if key == parts[0] else key): (
            StoredWeight(array, dtype) if key == parts[0] else weight
        )
        for key, weight in store.weights.items()
        if key == parts[0] or key not in parts
    }


def _joined_bias(branches: list[Branch], widths: list[int]) -> StoredWeight:
    vectors = [
        np.zeros(width, np.float32) if branch.bias is None else branch.bias
        for branch, width in zip(branches, widths, strict=True)
    ]
    return StoredWeight(np.concatenate(vectors), np.dtype(np.float32))


def _drop_unread(store: WeightStore, names: list[str]) -> None:
    """Biases that nobody reads any more."""
    read = find_uses(store.graph)
    for name in set(names):
        if name in store.weights and name not in read and not pinned(store.graph, name):
            del store.weights[name]


def split_records(
    records: Iterable[StorageRecord],
    merged: Mapping[str, tuple[str, ...]],
    sizes: Mapping[str, int],
) -> dict[str, StorageRecord]:
    """Records by name; those of merged weights also for each part, with its share of the bytes.

    Args:
        records: of the file.
        merged: as `merge_parallel` returned it.
        sizes: elements of each weight.
    """
    found = {record.name: record for record in records}
    for name, parts in merged.items():
        total = sum(sizes[part] for part in parts)
        for own in [own for own in (name, f"{name}.scale") if own in found]:
            for part in parts:
                record = _share(found[own], part + own[len(name) :], sizes[part] / total)
                found[record.name] = record
    return found


def _share(record: StorageRecord, name: str, share: float) -> StorageRecord:
    def cut(count: int) -> int:
        return round(share * count)

    return replace(
        record,
        name=name,
        nonzeros=cut(record.nonzeros),
        stored_bytes=cut(record.stored_bytes),
        dense_bytes=cut(record.dense_bytes),
        coo_varint_bytes=cut(record.coo_varint_bytes),
        coo_raw_bytes=cut(record.coo_raw_bytes),
        bitmap_bytes=cut(record.bitmap_bytes),
        varint_bytes=cut(record.varint_bytes),
        float_bytes=None if record.float_bytes is None else cut(record.float_bytes),
    )
