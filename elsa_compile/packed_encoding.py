"""`--format packed`: a bit an entry and the values, decoded by functions that the file brings.

After the forms were chosen (`sparse_encoding`), a weight whose packed form is smaller yet becomes
two initializers and a node for each of its readers (docs/packed-format.md). They are ordinary dense
initializers, so writing them needs nothing new; memory holds the packed weights.
"""

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from elsa_compile.onnx_wire import dense_field, dense_payload, length_of
from elsa_compile.runtime import bitmask
from elsa_compile.runtime.pack_plan import Plan, frame_bytes, packable, plan_weights
from elsa_compile.runtime.packed_form import from_nibbles, to_nibbles
from elsa_compile.runtime.unpack_nodes import Unpacking
from elsa_compile.sparse_encoding import Mode, encode, sees_sign_of_zero
from elsa_compile.weight_store import (
    Array,
    StorageRecord,
    StoredWeight,
    WeightStore,
    find_uses,
    forget_values,
    tensor_type,
)


def encode_packed(
    store: WeightStore, mode: Mode, names: Collection[str], in_file_limit_bytes: int
) -> list[StorageRecord]:
    """As `sparse_encoding.encode`, with packed weights where those are smallest.

    Returns:
        A record for every weight; of a packed one, form "packed", and stored_bytes of all its
        parts. `store` holds the parts.

    Raises:
        UnsupportedModelError: as `encode`.
    """
    names = frozenset(names)
    records = encode(store, mode, names, in_file_limit_bytes)
    shapes = {record.name: record.shape for record in records if record.name in names}
    plans = plan_weights(store.graph, shapes)
    opset = next(e.version for e in store.model.opset_import if e.domain in ("", "ai.onnx"))
    uses = find_uses(store.graph)
    unpacking = Unpacking(store.model)
    packed: dict[str, tuple[StorageRecord, tuple[str, str]]] = {}
    for record in records:
        plan = plans.get(record.name)
        if plan is None or not _smaller(store, record, plan, opset):
            continue
        keep_signs = sees_sign_of_zero(uses.get(record.name, []))
        packed[record.name] = _pack(store, record, plan, unpacking, not keep_signs)
    if not packed:
        return records
    unpacking.finish()
    forget_values(store.graph, set(packed))
    rest = names - packed.keys()
    placed = {each.name: each for each in encode(store, mode, rest, in_file_limit_bytes)}
    return [_final(record, packed, placed) for record in records]


def _smaller(store: WeightStore, record: StorageRecord, plan: Plan, opset: int) -> bool:
    """Whether the packed form takes fewer bytes than the one that was chosen."""
    if plan.why_not or packable(tensor_type(store.weights[record.name].dtype), opset):
        return False
    return record.bitmap_bytes + frame_bytes(plan) < record.stored_bytes


def _pack(
    store: WeightStore, record: StorageRecord, plan: Plan, unpacking: Unpacking, drop_signs: bool
) -> tuple[StorageRecord, tuple[str, str]]:
    """Replace a weight by its parts; its record, and their names."""
    weight = store.weights.pop(record.name)
    int4 = weight.packed is not None
    dense: Array
    if weight.packed is not None:
        dense = from_nibbles(weight.array.view(np.uint8), weight.size).reshape(weight.packed)
    else:
        dense = weight.array.astype(weight.dtype, copy=False)
    mask, values = bitmask.encode(
        dense.T if plan.rows_last else dense, drop_negative_zeros=drop_signs
    )
    parts = (unpacking.fresh(f"{record.name}.mask"), unpacking.fresh(f"{record.name}.values"))
    bits = StoredWeight(mask, np.dtype(np.uint8))
    kept = StoredWeight(
        to_nibbles(values) if int4 else values, np.dtype(np.uint8) if int4 else weight.dtype
    )
    store.weights |= {parts[0]: bits, parts[1]: kept}
    nodes = unpacking.add(plan, parts, weight.shape, int4)
    size = sum(node.ByteSize() for node in nodes) + sum(
        length_of(dense_field(name, part, dense_payload(part)))
        for name, part in zip(parts, (bits, kept), strict=True)
    )
    made = replace(
        record, form="packed", index_encoding=None, stored_bytes=size, reason="packed is smaller"
    )
    return made, parts


def _final(
    record: StorageRecord,
    packed: dict[str, tuple[StorageRecord, tuple[str, str]]],
    placed: dict[str, StorageRecord],
) -> StorageRecord:
    if record.name not in packed:
        return placed[record.name]
    made, parts = packed[record.name]
    return replace(made, external=any(placed[part].external for part in parts))
