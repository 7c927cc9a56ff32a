"""WeightStore -> files, complete or not at all.

Everything is written under temporary names in the target folder, synced, and renamed at the end:
a run that fails leaves the previous output as it was. Two files cannot be renamed together, so
the data file carries a hash of its content in its name, `model.onnx.<hash>.data`, and never
replaces one of other content that the previous model refers to: first the new data file appears,
then the model file takes its place in one step, then data files of earlier runs go.
"""

import contextlib
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
from onnx import ModelProto

from elsa_compile.errors import UnsupportedModelError, UserInputError, VerificationError
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
from elsa_compile.weight_store import StorageRecord, StoredWeight, WeightStore

log = logging.getLogger(__name__)

MAX_MODEL_BYTES = (1 << 31) - 1  # protobuf reads no larger message

# onnx.proto: offsets on page boundaries (4 KiB; Windows maps in steps of 64 KiB) let a reader map
# the data instead of copying it. 64 KiB of padding is nothing only beside a large tensor.
_SMALL_ALIGNMENT = 4096
_LARGE_ALIGNMENT = 65536
_LARGE_BYTES = 1 << 20
_HASH_DIGITS = 16
_MIN_PLACED_BYTES = 256  # about what naming a place takes in the model file


@dataclass(frozen=True)
class SavedFiles:
    """model: the .onnx file; data: the file beside it, None when everything fits in one."""

    model: Path
    data: Path | None
    model_bytes: int
    data_bytes: int


@dataclass(frozen=True)
class _Places:
    """Where the data of one weight lie outside the model file; None where they lie inside."""

    values: External | None = None
    indices: External | None = None


def save(store: WeightStore, path: Path) -> SavedFiles:
    """Write the model in the forms that `encode` chose.

    Raises:
        UserInputError: the folder is missing or cannot be written, or the disk is full.
        UnsupportedModelError: the model file would pass 2 GiB.
        VerificationError: a weight changed while it was written.
    """
    if path.is_dir() or not path.parent.is_dir():
        found = "is a folder" if path.is_dir() else f"lies in {path.parent}, which is no folder"
        raise UserInputError(f"cannot write {path}: it {found}; name a file in an existing folder")
    try:
        return _save(store, path)
    except OSError as error:
        raise UserInputError(
            f"cannot write {path}: {error.strerror or error}; the previous output, if any, is "
            "untouched: free space or choose another place"
        ) from error


def _save(store: WeightStore, path: Path) -> SavedFiles:
    with contextlib.ExitStack() as undo:
        written = _DataFile(path, undo)
        places = {name: _place(store, name, written) for name in store.weights}
        data_path = written.finish()
        parts = _model_parts(store, places, data_path)
        temporary = _temporary(path, undo)
        with temporary.open("xb") as file:
            for part in parts:
                _write_part(part, file.write)
            _sync(file)
        if data_path is not None:
            written.publish(data_path)
        temporary.replace(path)
        undo.pop_all()
    _sync_folder(path.parent)
    remove_stale(path, data_path)
    return SavedFiles(path, data_path, length_of(parts), written.size if data_path else 0)


class _DataFile:
    """The file beside the model while it is written; it exists only once something goes there."""

    def __init__(self, model_path: Path, undo: contextlib.ExitStack) -> None:
        self.size = 0
        self._model_path = model_path
        self._undo = undo
        self._hash = hashlib.sha256()
        self._file: IO[bytes] | None = None
        self._temporary = model_path

    def add(self, payload: Payload) -> External:
        """Append data; the file's name is not known yet, so the location is empty."""
        if self._file is None:
            self._temporary = _temporary(self._model_path, self._undo)
            self._file = self._undo.enter_context(self._temporary.open("xb"))
        alignment = _LARGE_ALIGNMENT if payload.length >= _LARGE_BYTES else _SMALL_ALIGNMENT
        self._write(bytes(-self.size % alignment))
        offset = self.size
        _write_part(payload, self._write)
        return External("", offset, payload.length)

    def _write(self, chunk: bytes | memoryview) -> None:
        assert self._file is not None
        self._file.write(chunk)
        self._hash.update(chunk)
        self.size += len(chunk)

    def finish(self) -> Path | None:
        """Close the file; returns the name it will get, None if nothing was added."""
        if self._file is None:
            return None
        _sync(self._file)
        self._file.close()
        digits = self._hash.hexdigest()[:_HASH_DIGITS]
        return self._model_path.with_name(f"{self._model_path.name}.{digits}.data")

    def publish(self, data_path: Path) -> None:
        """Give the file its name. One of the same content may be there; it is replaced by itself.

        If the model cannot follow, the file goes again, unless the previous model had the same.
        """
        if not data_path.exists():
            self._undo.callback(data_path.unlink, missing_ok=True)
        self._temporary.replace(data_path)
        _sync_folder(data_path.parent)


def _place(store: WeightStore, name: str, file: _DataFile) -> _Places:
    """Write what goes outside for one weight."""
    weight = store.weights[name]
    record = store.storage[name]
    if not record.external:
        return _Places()
    if record.form == "dense":
        return _Places(values=file.add(dense_payload(weight)))
    values = _placed(values_payload(weight, record.nonzeros), file)
    if record.index_encoding == "varint":
        return _Places(values=values)
    return _Places(values, _placed(raw_index_payload(weight, record.nonzeros), file))


def _placed(payload: Payload, file: _DataFile) -> External | None:
    """A few nonzeros are not worth a page of their own, and nothing at all has no place."""
    return file.add(payload) if payload.length >= _MIN_PLACED_BYTES else None


def _model_parts(
    store: WeightStore, places: dict[str, _Places], data_path: Path | None
) -> list[Part]:
    """The whole model file, not yet produced."""
    frame = ModelProto()
    frame.CopyFrom(store.model)
    frame.ClearField("graph")
    graph: list[Part] = [store.graph.SerializeToString()]
    location = data_path.name if data_path else ""
    for name, weight in store.weights.items():
        graph += _weight_parts(name, weight, store.storage[name], places[name], location)
    parts: list[Part] = [frame.SerializeToString(), *message(MODEL_GRAPH, graph)]
    if length_of(parts) > MAX_MODEL_BYTES:
        raise UnsupportedModelError(
            f"export: the model file would have {length_of(parts)} bytes, but an ONNX file ends at "
            f"{MAX_MODEL_BYTES}; lower the in-file limit so that weights go beside it"
        )
    return parts


def _weight_parts(
    name: str, weight: StoredWeight, record: StorageRecord, places: _Places, location: str
) -> list[Part]:
    """The initializer of one weight, with its data or with where they lie."""
    outside = places.values and replace(places.values, location=location)
    if record.form == "dense":
        return dense_field(name, weight, outside or dense_payload(weight))
    packed = record.index_encoding == "varint"
    indices: Payload | External
    if places.indices is not None:
        indices = replace(places.indices, location=location)
    elif packed:
        indices = varint_index_payload(weight, record.varint_bytes)
    else:
        indices = raw_index_payload(weight, record.nonzeros)
    values = outside or values_payload(weight, record.nonzeros)
    return sparse_field(name, weight, record.nonzeros, values, indices, packed)


def _write_part(part: Part, write: Callable[[bytes | memoryview], object]) -> None:
    """Produce a part; its length stands in the file already, so it must come out as counted."""
    if isinstance(part, bytes):
        write(part)
        return
    length = 0
    for chunk in part.chunks():
        # bfloat16 has no buffer format of its own; its bytes have.
        data = np.ascontiguousarray(chunk).view(np.uint8).data
        write(data)
        length += len(data)
    if length != part.length:
        raise VerificationError(
            f"export: a weight came out with {length} bytes where {part.length} were counted; "
            "change no weight while the model is written"
        )


def _temporary(path: Path, undo: contextlib.ExitStack) -> Path:
    """A name in the same folder, since a rename is one step only within a file system."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    undo.callback(temporary.unlink, missing_ok=True)
    return temporary


def _sync(file: IO[bytes]) -> None:
    """Before a rename: else a power cut can leave the new name with none of its content."""
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames durable where the system can sync a folder; the files are whole either way."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_stale(path: Path, data_path: Path | None) -> None:
    """Data files of earlier saves of this model: nothing refers to them any more."""
    ours = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{{_HASH_DIGITS}}}\.data")
    for other in path.parent.iterdir():
        if other == data_path or not ours.fullmatch(other.name):
            continue
        try:
            other.unlink()
        except OSError as error:  # the new model is complete without this
            log.warning("%s: data of an earlier save stays: %s", other, error.strerror)
