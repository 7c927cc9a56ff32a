"""Writes a changed ModelProto: tensors in the file or beside it, and nothing half done.

Data beside the model are written tensor by tensor, so memory holds one of them; the model file
follows. Both have temporary names until all is there, then the data file, named by its content, and
last the model are renamed: whoever opens the old name finds the old model or the new one.
"""

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime.errors import UserInputError
from elsa_compile.runtime.onnx_file import MAX_FILE_BYTES
from elsa_compile.runtime.onnx_tensors import DTYPES, find_external

# The rest of 2 GiB is left to tools that add shapes or metadata.
IN_FILE_LIMIT_BYTES = 2_000_000_000
_EXTERNAL = 1  # TensorProto.EXTERNAL
_LEAST_BYTES = 1024  # smaller ones stay in the model file: tools read them while loading
_ALIGNMENT = 4096  # lets onnxruntime map a weight from the file
_DIGITS = 16
_CHUNK = 1 << 26


class ModelWriter:
    """Collects tensors of a model and writes it.

    Attributes:
        path: the .onnx file.
        external: whether data go to a file beside it.
    """

    def __init__(self, path: Path, external: bool) -> None:
        """For a model that is to be written to `path`."""
        self.path = path
        self.external = external
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        self._data: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._placed: list[Any] = []
        self._size = 0

    @property
    def _temporary_data(self) -> Path:
        return self._temporary.with_suffix(".data.tmp")

    def place(self, tensor: Any, data: NDArray[Any]) -> None:
        """Give a TensorProto its data, as little-endian bytes row after row."""
        for field in ("raw_data", "external_data", "data_location"):
            tensor.ClearField(field)
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if not self.external or raw.size < _LEAST_BYTES:
            tensor.raw_data = raw.tobytes()
            return
        self._pad()
        tensor.data_location = _EXTERNAL
        for key, value in (("offset", self._size), ("length", raw.size)):
            tensor.external_data.add(key=key, value=str(value))
        for start in range(0, raw.size, _CHUNK):
            self._write(raw[start : start + _CHUNK].tobytes())
        self._placed.append(tensor)

    def carry(self, tensor: Any, folder: Path) -> None:
        """Bring a checked tensor along whose data lie beside another model, in `folder`."""
        # Those that were placed here have no location before the end.
        if not any(entry.key == "location" for entry in tensor.external_data):
            return
        nbytes = _bytes_of(tensor)
        where = find_external(tensor, nbytes, "a tensor", folder)
        data = np.memmap(where.path, np.uint8, "r", where.offset, (nbytes,)) if nbytes else None
        self.place(tensor, np.zeros(0, np.uint8) if data is None else data)

    def _pad(self) -> None:
        self._write(bytes(-self._size % _ALIGNMENT))

    def _write(self, part: bytes) -> None:
        if self._data is None:
            self._data = self._temporary_data.open("xb")
        self._data.write(part)
        self._hash.update(part)
        self._size += len(part)

    def finish(self, model: Any) -> tuple[int, int]:
        """Write the model; bytes of the model file and of the data file (0 without one).

        Raises:
            UserInputError: the model file would pass 2 GiB.
        """
        data_path = None
        if self._data is not None:
            _sync(self._data)
            self._data.close()
            name = f"{self.path.name}.{self._hash.hexdigest()[:_DIGITS]}.data"
            data_path = self.path.with_name(name)
            for tensor in self._placed:
                tensor.external_data.add(key="location", value=data_path.name)
        size = model.ByteSize()
        if size > MAX_FILE_BYTES:
            raise UserInputError(
                f"{self.path} would have {size} bytes, but an ONNX file ends at 2 GiB; write its "
                "data beside it (--external)"
            )
        with self._temporary.open("xb") as file:
            file.write(model.SerializeToString())
            _sync(file)
        if data_path is not None:
            self._temporary_data.replace(data_path)
        self._temporary.replace(self.path)
        self._remove_stale(data_path)
        return size, self._size

    def _remove_stale(self, data_path: Path | None) -> None:
        """Data files of earlier models of this name: nothing refers to them any more."""
        ours = re.compile(rf"{re.escape(self.path.name)}\.[0-9a-f]{{{_DIGITS}}}\.data")
        for other in self.path.parent.iterdir():
            if other != data_path and ours.fullmatch(other.name):
                with contextlib.suppress(OSError):
                    other.unlink()

    def abandon(self) -> None:
        """Remove what was begun."""
        if self._data is not None:
            self._data.close()
        for path in (self._temporary, self._temporary_data):
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def writing(path: Path, external: bool) -> Iterator[ModelWriter]:
    """A writer whose beginnings vanish when something goes wrong.

    Raises:
        UserInputError: the place is not there, cannot be written or is full.
    """
    if path.is_dir() or not path.parent.is_dir():
        found = "is a folder" if path.is_dir() else f"lies in {path.parent}, which is no folder"
        raise UserInputError(f"cannot write {path}: it {found}; name a file in an existing folder")
    writer = ModelWriter(path, external)
    try:
        yield writer
    except OSError as error:
        raise UserInputError(
            f"cannot write {path}: {error.strerror or error}; what lay there before is untouched"
        ) from error
    finally:
        writer.abandon()


def every_tensor(model: Any) -> Iterator[Any]:
    """All TensorProtos of a model, those of sparse tensors, subgraphs and functions included."""
    holders: list[Any] = [model.graph, *model.functions]
    while holders:
        holder = holders.pop()
        yield from getattr(holder, "initializer", ())
        sparse = list(getattr(holder, "sparse_initializer", ()))
        for node in holder.node:
            for found in node.attribute:
                yield from (*([found.t] if found.HasField("t") else []), *found.tensors)
                sparse += [found.sparse_tensor] if found.HasField("sparse_tensor") else []
                sparse += found.sparse_tensors
                holders += [found.g] if found.HasField("g") else []
                holders += found.graphs
        for each in sparse:
            yield from (each.values, each.indices)


def _bytes_of(tensor: Any) -> int:
    count = int(np.prod(tensor.dims, dtype=np.int64))
    return (count * DTYPES[tensor.data_type].bits + 7) // 8


def _sync(file: IO[bytes]) -> None:
    """Before a rename: else a power cut can leave the new name with none of its content."""
    file.flush()
    os.fsync(file.fileno())
