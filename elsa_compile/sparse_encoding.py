"""Which form each weight takes in the ONNX file: dense or COO `sparse_initializer`.

This is the last decision before the file is written: onnx_ir, onnxscript and most other tools
drop sparse initializers silently. COO saves bytes on disk only; onnxruntime turns it dense while
loading. Indices are linear, sorted and unique (onnxruntime silently loses a value for a duplicate);
in the file they are int64, 8 bytes each, or varints of 1 to 9.

Negative zero: -0.0, which multiplying by a mask leaves behind, counts as zero and comes back as
+0.0 from COO. That is invisible to every sum of products (MatMul, Gemm, Conv): the result can
change only in the sign of a result that is itself zero. It would be visible to a division by the
weight, so a weight with a reader that divides stays dense.
"""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Literal

import ml_dtypes
import numpy as np

from elsa_compile.errors import UnsupportedModelError
from elsa_compile.onnx_wire import (
    External,
    dense_field,
    dense_payload,
    length_of,
    nonzero_indices,
    raw_index_payload,
    sparse_field,
    values_payload,
    varint_index_payload,
    varint_lengths,
)
from elsa_compile.weight_store import (
    StorageRecord,
    StoredWeight,
    Use,
    WeightStore,
    find_uses,
    pinned,
)

Mode = Literal["auto", "always", "never"]

# A message ends at 2^31 - 1 bytes; the rest is left to tools that add shapes or metadata.
IN_FILE_LIMIT_BYTES = 2_000_000_000
MIN_EXTERNAL_BYTES = 1024  # smaller tensors stay in the model file: tools read them while loading
MIN_SPARSE_BYTES = 1024  # below, COO saves tens of bytes and costs other tools a special case

# Measured in onnxruntime 1.31. It accepts other integers too, but those are indices and shapes.
_SPARSE_TYPES = frozenset(
    np.dtype(t) for t in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int8, np.uint8)
)
_SIGN_OF_ZERO_MATTERS = frozenset({"Div", "Reciprocal", "Pow", "Mod", "Atan2"})
_EXTERNAL_ENTRY = External("0" * 255, 1 << 40, 1 << 40)  # as long as an entry gets


def encode(
    store: WeightStore,
    mode: Mode,
    names: Collection[str],
    in_file_limit_bytes: int = IN_FILE_LIMIT_BYTES,
) -> list[StorageRecord]:
    """Choose the form of every weight and record it in `store.storage`; returns the records.

    mode: "auto" takes the smallest legal form by computed bytes, "always" COO wherever it is
    legal, "never" none. names: the weights; nothing else becomes sparse, and none of them under
    MIN_SPARSE_BYTES. in_file_limit_bytes: when the model file would be larger, the data go to a
    file beside it; indices stay varints in the model file as far as they fit (largest saving
    first), and are raw int64 beside it otherwise.

    Raises:
        UnsupportedModelError: the graph is too large even without its weights.
    """
    names = frozenset(names)
    uses = find_uses(store.graph)
    frame_bytes = store.model.ByteSize()
    if frame_bytes > in_file_limit_bytes:
        raise UnsupportedModelError(
            f"export: the graph takes {frame_bytes} bytes without its weights, more than the "
            f"{in_file_limit_bytes} a model file may have; constants inside nested graphs or of "
            "types below 8 bits count as graph"
        )
    records = []
    for name, weight in store.weights.items():
        refused = _refusal(store, name, weight, uses.get(name, []), mode, names)
        record = _choose(name, weight, mode, refused)
        records.append(replace(record, float_bytes=store.float_bytes.get(name)))
    if frame_bytes + sum(r.stored_bytes for r in records) > in_file_limit_bytes:
        records = _place_outside(store, records, mode, in_file_limit_bytes - frame_bytes)
    store.storage = {record.name: record for record in records}
    return records


def _refusal(
    store: WeightStore,
    name: str,
    weight: StoredWeight,
    uses: list[Use],
    mode: Mode,
    names: Collection[str],
) -> str | None:
    """Why this weight must be dense; None if it may be sparse."""
    if mode == "never":
        return "sparse initializers are off"
    if name not in names:
        return "not one of the model's weights"
    if weight.dtype not in _SPARSE_TYPES:
        return f"{weight.dtype} has no sparse form"
    if weight.array.ndim == 0:
        return "a scalar"
    if pinned(store.graph, name):
        return "an input or output of the graph, which others rely on"
    if weight.dtype.kind not in "iu" and sees_sign_of_zero(uses):
        return "read by an operation that sees the sign of a zero"
    if weight.nbytes < MIN_SPARSE_BYTES:
        return f"smaller than {MIN_SPARSE_BYTES} bytes"
    return None


def sees_sign_of_zero(uses: list[Use]) -> bool:
    """Whether a reader of a weight tells -0.0 from 0.0."""
    return any(use.node.op_type in _SIGN_OF_ZERO_MATTERS for use in uses)


def _choose(name: str, weight: StoredWeight, mode: Mode, refused: str | None) -> StorageRecord:
    """Count the nonzeros and compare the forms, all data in the model file."""
    if weight.packed is not None:
        return _packed(name, weight, refused or "int4 has no sparse form")
    nonzeros = 0
    index_bytes = 0
    for indices in nonzero_indices(weight):
        nonzeros += len(indices)
        index_bytes += varint_lengths(indices)
    values = values_payload(weight, nonzeros)
    dense = length_of(dense_field(name, weight, dense_payload(weight)))
    varints = varint_index_payload(weight, index_bytes)
    varint = length_of(sparse_field(name, weight, nonzeros, values, varints, True))
    ints = raw_index_payload(weight, nonzeros)
    raw = length_of(sparse_field(name, weight, nonzeros, values, ints, False))
    record = StorageRecord(
        name=name,
        shape=weight.shape,
        dtype=weight.dtype.name,
        nonzeros=nonzeros,
        form="dense",
        index_encoding=None,
        stored_bytes=dense,
        dense_bytes=dense,
        coo_varint_bytes=varint,
        coo_raw_bytes=raw,
        bitmap_bytes=math.ceil(weight.size / 8) + values.length,
        varint_bytes=index_bytes,
        reason=refused or "",
    )
    return record if refused else _smallest(record, mode)


def _packed(name: str, weight: StoredWeight, refused: str) -> StorageRecord:
    """int4: dense only. Without a sparse form, the COO sizes are those of the dense one."""
    nonzeros = sum(
        int(np.count_nonzero(block & np.uint8(0xF)) + np.count_nonzero(block >> np.uint8(4)))
        for block in weight.blocks()
    )
    dense = length_of(dense_field(name, weight, dense_payload(weight)))
    return StorageRecord(
        name=name,
        shape=weight.shape,
        dtype=weight.dtype.name,
        nonzeros=nonzeros,
        form="dense",
        index_encoding=None,
        stored_bytes=dense,
        dense_bytes=dense,
        coo_varint_bytes=dense,
        coo_raw_bytes=dense,
        bitmap_bytes=math.ceil(weight.size / 8) + math.ceil(nonzeros / 2),
        varint_bytes=0,
        reason=refused,
    )


def _smallest(record: StorageRecord, mode: Mode) -> StorageRecord:
    """The smallest form of a weight that may be sparse."""
    encoding, coo = min(
        (("varint", record.coo_varint_bytes), ("raw", record.coo_raw_bytes)), key=lambda e: e[1]
    )
    if mode == "always":
        reason = "sparse wherever possible was asked for"
    elif coo < record.dense_bytes:
        reason = "COO is smaller"
    else:
        return replace(record, reason="COO would be larger")
    return replace(record, form="coo", index_encoding=encoding, stored_bytes=coo, reason=reason)


def _place_outside(
    store: WeightStore, records: list[StorageRecord], mode: Mode, budget: int
) -> list[StorageRecord]:
    """Move data out of the model file, keeping varint indices inside while they fit.

    budget: bytes left in the model file beside the graph.
    """
    placed = {}
    candidates = []
    for record in records:
        if store.weights[record.name].nbytes < MIN_EXTERNAL_BYTES:
            placed[record.name] = record
            budget -= record.stored_bytes
        else:
            candidates.append(record)
    fallbacks = {r.name: _without_varints(r, mode) for r in candidates}
    budget -= sum(in_file_bytes(store.weights[r.name], r) for r in fallbacks.values())
    order = sorted(candidates, key=lambda r: r.stored_bytes - fallbacks[r.name].stored_bytes)
    for record in order:
        weight = store.weights[record.name]
        outside = replace(record, external=True)
        fallback = fallbacks[record.name]
        extra = in_file_bytes(weight, outside) - in_file_bytes(weight, fallback)
        if record.index_encoding == "varint" and extra <= budget:
            budget -= extra
            placed[record.name] = outside
        else:
            placed[record.name] = fallback
    if budget < 0:
        raise UnsupportedModelError(
            f"export: the names and shapes of {len(records)} weights alone exceed the size a model "
            f"file may have by {-budget} bytes"
        )
    return [placed[record.name] for record in records]


def _without_varints(record: StorageRecord, mode: Mode) -> StorageRecord:
    """The best form with everything beside the model file, where varints are not possible."""
    outside = replace(record, external=True)
    if record.form == "dense":
        return outside
    if mode == "always" or record.coo_raw_bytes < record.dense_bytes:
        return replace(outside, index_encoding="raw", stored_bytes=record.coo_raw_bytes)
    return replace(
        outside,
        form="dense",
        index_encoding=None,
        stored_bytes=record.dense_bytes,
        reason="COO with indices beside the model file would be larger",
    )


def in_file_bytes(weight: StoredWeight, record: StorageRecord) -> int:
    """An upper bound of what a weight with external data takes in the model file."""
    if record.form == "dense":
        return length_of(dense_field(record.name, weight, _EXTERNAL_ENTRY))
    values = length_of(
        sparse_field(record.name, weight, record.nonzeros, _EXTERNAL_ENTRY, _EXTERNAL_ENTRY, False)
    )
    if record.index_encoding == "raw":
        return values
    return values + record.coo_varint_bytes - record.nonzeros * weight.dtype.itemsize
