"""WeightStore -> files, complete or not at all.

Everything is written under temporary names in the target folder, synced, and renamed at the end:
a run that fails leaves the previous output as it was. Two files cannot be renamed together, so
the data file carries a hash of its content in its name, `model.onnx.<hash>.data`, and never
replaces the one that the previous model refers to: first the new data file appears, then the model
file takes its place in one step, then data files of earlier runs go.
"""

import contextlib
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import numpy as np
import onnx_ir as ir

from elsa_compile.errors import UserInputError
from elsa_compile.onnx_layout import store_transposed, weights_to_float16
from elsa_compile.onnx_wire import (
    MODEL_GRAPH,
    External,
    Part,
    Payload,
    dense_field,
    dense_payload,
    length_of,
    message,
    raw_index_payload,
    sparse_field,
    values_payload,
    varint_index_payload,
)
from elsa_compile.sparse_encoding import IN_FILE_LIMIT_BYTES, Mode, encode, sparse_overhead_bytes
from elsa_compile.weight_store import StorageRecord, StoredWeight, WeightStore

log = logging.getLogger(__name__)

# onnx.proto: offsets on page boundaries (4 KiB; Windows maps in steps of 64 KiB) let a reader map
# the data instead of copying it. 64 KiB of padding is nothing only beside a large tensor.
_SMALL_ALIGNMENT = 4096
_LARGE_ALIGNMENT = 65536
_LARGE_BYTES = 1 << 20
_HASH_DIGITS = 16


@dataclass(frozen=True)
class WriteResult:
    """paths: the model file and, if there is one, its data file. left_alone: notes for people."""

    paths: list[Path]
    records: list[StorageRecord]
    left_alone: list[str] = field(default_factory=list)


def write_onnx(
    ir_model: ir.Model,
    path: Path,
    *,
    dtype: Literal["float32", "float16"] = "float32",
    mode: Mode = "auto",
    metadata: Mapping[str, str] | None = None,
    names: Collection[str] | None = None,
    in_file_limit_bytes: int = IN_FILE_LIMIT_BYTES,
) -> WriteResult:
    """Write a model from torch.onnx with its weights laid out, cast and sparse-encoded.

    dtype: of the stored weights; inputs, outputs and arithmetic stay as exported. mode, names,
    in_file_limit_bytes: see `sparse_encoding.encode`. metadata: entries of metadata_props. The
    tensors of `ir_model` are only read, its graph is not changed.

    Raises:
        UserInputError: the place cannot be written, or a value does not fit float16.
    """
    store = WeightStore.from_ir(ir_model)
    left_alone = store_transposed(store)
    if dtype == "float16":
        left_alone += weights_to_float16(store)
    records = encode(store, mode, names, in_file_limit_bytes)
    return WriteResult(save(store, path, metadata), records, left_alone)


def save(
    store: WeightStore, path: Path, metadata: Mapping[str, str] | None = None
) -> list[Path]:
    """Write the model in the forms that `encode` chose; returns the files, the model first.

    Raises:
        UserInputError: the folder is missing or cannot be written, or the disk is full.
    """
    if path.is_dir() or not path.parent.is_dir():
        found = "is a folder" if path.is_dir() else f"lies in {path.parent}, which is no folder"
        raise UserInputError(f"cannot write {path}: it {found}; name a file in an existing folder")
    try:
        return _save(store, path, dict(metadata or {}))
    except OSError as error:
        raise UserInputError(
            f"cannot write {path}: {error.strerror or error}; the previous output, if any, is "
            "untouched: free space or choose another place"
        ) from error


def _save(store: WeightStore, path: Path, metadata: dict[str, str]) -> list[Path]:
    with contextlib.ExitStack() as undo:
        data_path, places = _write_data(store, path, undo)
        temporary = _temporary(path, undo)
        with temporary.open("xb") as file:
            for part in _model_parts(store, metadata, data_path, places):
                _write_part(file, part)
            _sync(file)
        if data_path is not None and not data_path[1].exists():
            data_path[0].rename(data_path[1])
            undo.callback(data_path[1].unlink, missing_ok=True)
            _sync_folder(path.parent)
        temporary.replace(path)
        undo.pop_all()
    _sync_folder(path.parent)
    return [path]
