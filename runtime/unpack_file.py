"""`elsa-run unpack`: packed weights -> dense ones or sparse initializers, every bit as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elsa_compile.runtime import bitmask
from elsa_compile.runtime.bitmask import Array
from elsa_compile.runtime.errors import UserInputError
from elsa_compile.runtime.model_writer import IN_FILE_LIMIT_BYTES, every_tensor, writing
from elsa_compile.runtime.onnx_file import inspect, load_checked
from elsa_compile.runtime.pack_file import copy_beside
from elsa_compile.runtime.packed_form import PackedTensor, find_packed, to_nibbles, unpacked
from elsa_compile.runtime.unpack_function import DOMAIN

Form = Literal["dense", "coo"]
_TYPES = {
    "float32": 1, "uint8": 2, "int8": 3, "float16": 10, "float64": 11, "bfloat16": 16, "int4": 22,
}  # fmt: skip
_INT64 = 7
_MASK = ".mask"


def unpack_file(
    source: str | Path,
    output: str | Path,
    *,
    form: Form = "dense",
    external: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a model without the packed form.

    Args:
        source: an .onnx file with packed weights, or its folder.
        output: the .onnx file to write.
        form: "dense", or "coo": sparse initializers wherever those are smaller than dense.
        external: data beside the model; None when it would hold more than 2 GB.
        progress: called with weights done and their number.

    Returns:
        For JSON: source, output, bytes before and after, weights by form, copied.

    Raises:
        UserInputError: a malformed source, one without packed weights, a place that cannot be
            written.
    """
    file = inspect(source)
    target = Path(output)
    model = load_checked(file)
    folder = file.path.parent
    found = find_packed(model, folder)
    if not found:
        raise UserInputError(f"{file.path}: it has no packed weights")
    before = file.file_bytes + file.external_bytes
    size = before + sum(weight.dense_bytes for weight in file.weights if weight.form == "packed")
    outside = size > IN_FILE_LIMIT_BYTES if external is None else external
    groups: dict[tuple[str, str], list[PackedTensor]] = {}
    for each in found:
        groups.setdefault((each.mask, each.values), []).append(each)
    counts = {"dense": 0, "coo": 0}
    with writing(target, outside) as writer:
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        replaced: dict[str, list[Any]] = {}
        for number, members in enumerate(groups.values()):
            name, turned = _name_of(members)
            weight = unpacked(members[0], tensors, folder)
            weight = weight.T if turned else weight
            counts[_store(model.graph, writer, name, weight, members[0].dtype, form)] += 1
            for member in members:
                replaced[member.name] = _reading(member, name, turned)
            if progress is not None:
                progress(number + 1, len(groups))
        _rewire(model, replaced, {name for pair in groups for name in pair})
        for tensor in every_tensor(model):
            writer.carry(tensor, folder)
        model_bytes, data_bytes = writer.finish(model)
    return {
        "source": str(file.path),
        "output": str(target),
        "before_bytes": before,
        "after_bytes": model_bytes + data_bytes,
        "model_bytes": model_bytes,
        "data_bytes": data_bytes,
        "weights": counts,
        "copied": copy_beside(folder, target.parent),
    }


def _name_of(members: list[PackedTensor]) -> tuple[str, bool]:
    """What the weight was called, by the name of its mask, and whether it lay transposed."""
    name = members[0].mask.removesuffix(_MASK)
    for member in members:
        if member.name == name:
            return name, member.variant.transposed
    if name == members[0].mask:  # packed by another tool
        return members[0].name, members[0].variant.transposed
    return name, False  # read through Transposes alone


def _reading(member: PackedTensor, name: str, turned: bool) -> list[Any]:
    """The nodes that stand for a node of the packed form."""
    from onnx import helper

    if member.name == name:
        return []
    if member.variant.transposed != turned:
        return [helper.make_node("Transpose", [name], [member.name], perm=[1, 0])]
    return [helper.make_node("Identity", [name], [member.name])]


def _store(graph: Any, writer: Any, name: str, weight: Array, dtype: str, form: Form) -> str:
    """Add the initializer of a weight; the form it took."""
    dense_bytes = weight.size * weight.dtype.itemsize
    if form == "coo" and dtype != "int4":
        flat = np.ascontiguousarray(weight).reshape(-1)
        kept = bitmask.as_bits(flat) != 0
        count = int(np.count_nonzero(kept))
        # Raw indices take 8 bytes each; as varints in the file, 4 and the odd one of 5 at most.
        index_bytes = 8 if writer.external else 4
        if count * (weight.dtype.itemsize + index_bytes) < dense_bytes:
            indices = np.flatnonzero(kept)
            sparse = graph.sparse_initializer.add(dims=weight.shape)
            sparse.values.name = name
            sparse.values.data_type = _TYPES[dtype]
            sparse.values.dims.append(count)
            sparse.indices.data_type = _INT64
            sparse.indices.dims.append(count)
            writer.place(sparse.values, flat[kept])
            if writer.external:
                writer.place(sparse.indices, indices.astype("<i8"))
            else:
                sparse.indices.int64_data.extend(indices)
            return "coo"
    tensor = graph.initializer.add(name=name, data_type=_TYPES[dtype], dims=weight.shape)
    data = to_nibbles(np.ascontiguousarray(weight).reshape(-1)) if dtype == "int4" else weight
    writer.place(tensor, data)
    return "dense"


def _rewire(model: Any, replaced: dict[str, list[Any]], parts: set[str]) -> None:
    """Take the nodes, functions, masks and values out of a model."""
    graph = model.graph
    kept = []
    for node in graph.node:
        kept += replaced[node.output[0]] if node.domain == DOMAIN else [node]
    copies = [type(node).FromString(node.SerializeToString()) for node in kept]
    del graph.node[:]
    graph.node.extend(copies)
    for held, drop in (
        (graph.initializer, lambda each: each.name in parts),
        (model.functions, lambda each: each.domain == DOMAIN),
        (model.opset_import, lambda each: each.domain == DOMAIN),
    ):
        for index in range(len(held) - 1, -1, -1):
            if drop(held[index]):
                del held[index]
