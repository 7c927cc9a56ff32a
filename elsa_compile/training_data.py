"""The user's data as the stream that training passes read (`pass_base.TrainingStream`)."""

import hashlib
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elsa_compile import data as data_module
from elsa_compile.pass_base import OpenStream, TrainingStream
from elsa_compile.program import Program
from elsa_compile.progress import ProgressSink
from elsa_compile.runtime import text as text_module
from elsa_compile.token_stream import (
    PythonStream,
    SampleStream,
    TokenStream,
    python_stream,
    sample_stream,
    text_stream,
)

_AT_ONCE = 4096  # tokens of a validation batch
_ROWS = 32  # samples of a validation batch


@dataclass(frozen=True)
class _Stream:
    """One of the three streams behind the one interface."""

    inner: TokenStream | PythonStream | SampleStream
    count: int
    seq_len: int | None
    key: str

    def batch(self, step: int, batch_size: int) -> dict[str, Tensor]:
        """Inputs by name."""
        found = self.inner.batch(step, batch_size)
        return {"input_ids": found} if isinstance(found, Tensor) else found

    def validation(self) -> list[dict[str, Tensor]]:
        """The held-out rows in batches."""
        held = self.inner.held_out()
        if held is None:
            return []
        rows = {"input_ids": held} if isinstance(held, Tensor) else held
        count = len(next(iter(rows.values())))
        step = max(1, _AT_ONCE // self.seq_len) if self.seq_len else _ROWS
        return [{k: v[i : i + step] for k, v in rows.items()} for i in range(0, count, step)]


def open_text(
    program: Program,
    source: Path,
    window: int | None,
    bos: str,
    cache: Path | None,
    progress: ProgressSink,
) -> OpenStream:
    """A corpus for a language model; see `token_stream.text_stream`."""

    def open_stream(seq_len: int | None, seed: int) -> TrainingStream:
        found = text_stream(
            program, source, seq_len or window, seed=seed, bos=bos, cache=cache, progress=progress
        )
        digest = hashlib.sha256(np.ascontiguousarray(found.tokens).data).hexdigest()[:16]
        key = f"{len(found.tokens)} tokens {digest} in windows of {found.seq_len}, bos {bos}"
        return _Stream(found, found.windows, found.seq_len, key)

    return open_stream


def open_samples(samples: data_module.Samples) -> OpenStream:
    """Rows of named inputs, for any model."""

    def open_stream(seq_len: int | None, seed: int) -> TrainingStream:
        found = sample_stream(samples, seed)
        ids = samples.inputs[0].get("input_ids")
        length = None if ids is None else int(ids.shape[-1])
        return _Stream(found, found.rows, length, f"{samples.source}, {found.rows} rows")

    return open_stream


def open_batches(program: Program, batches: Iterable[Any]) -> OpenStream:
    """Token batches from Python, in their own order."""
    vocabulary = (program.config or {}).get("vocab_size")

    def open_stream(seq_len: int | None, seed: int) -> TrainingStream:
        found = python_stream(batches, vocabulary)
        if not isinstance(batches, (list, tuple)) or not batches:
            count = len(batches) if isinstance(batches, Sized) else 0
            return _Stream(found, count, _width(program, seq_len), "python")
        shapes = [_ids(batch).shape for batch in batches]
        count = sum(shape[0] if len(shape) == 2 else 1 for shape in shapes)
        return _Stream(found, count, int(shapes[0][-1]), "python")

    return open_stream


def _ids(batch: Any) -> Tensor:
    """Token ids of one batch, as `PythonStream` takes them; it says what is wrong with others."""
    found = batch["input_ids"] if hasattr(batch, "items") and "input_ids" in batch else batch
    found = found[0] if isinstance(found, (list, tuple)) and found else found
    return found if isinstance(found, Tensor) and found.dim() else torch.zeros(1, 2)


def _width(program: Program, seq_len: int | None) -> int:
    """Tokens of a window when the iterable cannot be asked: the default."""
    return seq_len or text_module.default_window(program.config or {})


def training_data(
    program: Program,
    source: Path | Iterable[Any] | None,
    samples: data_module.Samples | None = None,
    *,
    window: int | None = None,
    bos: str = "auto",
    cache: Path | None = None,
    progress: ProgressSink | None = None,
) -> OpenStream | None:
    """How training passes open the user's data; None when there is none.

    Args:
        program: the model.
        source: a corpus as `documents.documents` takes it, a file of arrays, or batches.
        samples: `source` as samples, when it is not text.
        window: tokens a window by default.
        bos: whether windows start with BOS.
        cache: folder for the tokens of a corpus.
        progress: who is told while it is tokenised.
    """
    if source is None:
        return None
    if isinstance(source, Path) and not data_module.holds_arrays(source):
        return open_text(program, source, window, bos, cache, progress or ProgressSink())
    if not isinstance(source, Path) and program.kind == "decoder":
        return open_batches(program, source)
    assert samples is not None
    return open_samples(samples)
