"""Training batches from Python: token batches of any iterable, and rows of named inputs."""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from elsa_compile.data import Samples
from elsa_compile.errors import UserInputError
from elsa_compile.row_order import first_row, held_out_count, permuted, places

_END = object()
_HELD_OUT_KEY = 0  # which rows are held out does not depend on the seed


class PythonStream:
    """Token batches from a Python iterable, cut into batches of the size that is asked for.

    An iterable can only be read forwards: a later step skips rows, an earlier one starts again,
    and so does the end of an epoch. The order is the iterable's own; a DataLoader that shuffles
    repeats itself after a restart only as far as its generator does. An iterator that cannot start
    again (a generator) serves one epoch of steps that do not go back.
    """

    def __init__(self, batches: Iterable[Any], vocab_size: int | None = None) -> None:
        """Look at nothing yet.

        Args:
            batches: of tensors (B, S) or (S,) of any integer type, of dicts with such `input_ids`,
                or of tuples that start with one; all of one length S.
            vocab_size: ids must be smaller.
        """
        self._batches = batches
        self._vocab_size = vocab_size
        self._rows: deque[Tensor] = deque()
        self._fetched = 0  # rows since the iterable last began
        self._iterator: Iterator[Any] | None = None
        self._drawn = 0  # rows given out since the first epoch began
        self._width: int | None = None

    def batch(self, step: int, batch_size: int) -> Tensor:
        """Token ids (batch_size, S) int64 of a step, counted from 0.

        Raises:
            UserInputError: data of a wrong kind; a generator that is exhausted or asked to go back.
        """
        start = first_row(step, batch_size)
        if start < self._drawn:
            self._restart("an earlier step is asked for")
            self._drawn = 0
        while self._drawn < start:
            self._row()
        return torch.stack([self._row() for _ in range(batch_size)])

    def held_out(self) -> None:
        """None: what is trained on is the caller's choice, row by row."""

    def _row(self) -> Tensor:
        while not self._rows:
            if self._iterator is None:
                self._iterator = iter(self._batches)
            item = next(self._iterator, _END)
            if item is not _END:
                self._rows.extend(self._checked(item))
                self._fetched += len(self._rows)
            elif self._fetched:
                self._restart("it is exhausted")
            else:
                raise UserInputError("data is empty, wanted at least one batch of tokens")
        self._drawn += 1
        return self._rows.popleft()

    def _restart(self, why: str) -> None:
        iterator = iter(self._batches)
        if iterator is self._batches:
            raise UserInputError(
                f"data is an iterator that cannot start again, and {why} after {self._drawn} rows; "
                "give a list or a DataLoader, or fewer steps"
            )
        self._iterator = iterator
        self._rows.clear()
        self._fetched = 0

    def _checked(self, item: Any) -> Tensor:
        """Rows (B, S) int64 of one batch of the caller's."""
        ids = item["input_ids"] if hasattr(item, "items") and "input_ids" in item else item
        if isinstance(ids, (tuple, list)) and ids and isinstance(ids[0], Tensor):
            ids = ids[0]
        if not isinstance(ids, Tensor):
            raise UserInputError(
                f"data holds a {type(item).__name__}, wanted tensors of token ids, or dicts with "
                "input_ids"
            )
        mask = item.get("attention_mask") if hasattr(item, "items") else None
        if isinstance(mask, Tensor) and not bool(mask.all()):
            raise UserInputError("data is padded (attention_mask holds zeros); pack it instead")
        rows = ids[None] if ids.dim() == 1 else ids
        integer = not (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool)
        if rows.dim() != 2 or not integer or rows.shape[1] < 2:
            raise UserInputError(
                f"data holds a tensor {tuple(ids.shape)} of {ids.dtype}, wanted token ids (B, S) "
                "or (S,) with S of at least 2"
            )
        if self._width is None:
            self._width = rows.shape[1]
        if rows.shape[1] != self._width:
            raise UserInputError(
                f"data holds rows of {self._width} and of {rows.shape[1]} tokens, wanted one length"
            )
        self._check_range(rows)
        return rows.to(device="cpu", dtype=torch.int64)

    def _check_range(self, rows: Tensor) -> None:
        if not len(rows):
            return
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or (self._vocab_size is not None and high >= self._vocab_size):
            raise UserInputError(
                f"data holds token {low if low < 0 else high}, but the model knows 0 to "
                f"{'its vocabulary' if self._vocab_size is None else self._vocab_size - 1}"
            )


def python_stream(batches: Iterable[Any], vocab_size: int | None = None) -> PythonStream:
    """Token batches from a Python iterable; see `PythonStream`."""
    return PythonStream(batches, vocab_size)


class SampleStream:
    """Rows of named inputs, drawn without replacement and put together along dimension 0."""

    def __init__(self, samples: Samples, seed: int = 0) -> None:
        """Count the rows.

        Args:
            samples: their tensors (B, ...), B of one sample's tensors equal.
            seed: of the order.

        Raises:
            UserInputError: no rows, or tensors that cannot be put together.
        """
        shapes: dict[str, Any] = {}
        sizes = []
        for sample in samples.inputs:
            lengths = {len(value) if value.dim() else 0 for value in sample.values()}
            if len(lengths) != 1:
                raise UserInputError(
                    f"{samples.source}: the inputs of a sample hold {sorted(lengths)} rows, wanted "
                    "one number"
                )
            sizes.append(lengths.pop())
            found = {name: (tuple(v.shape[1:]), v.dtype) for name, v in sample.items()}
            if (shapes := shapes or found) != found:
                raise UserInputError(
                    f"{samples.source}: samples differ in name, shape or type ({shapes} and "
                    f"{found}), so they make no batch; bring them to one shape"
                )
        if not sum(sizes):
            raise UserInputError(f"{samples.source}: data is empty, wanted at least one row")
        self._samples = samples
        self._seed = seed
        self._ends = list(accumulate(sizes))
        self._held_out = held_out_count(self._ends[-1])

    @property
    def rows(self) -> int:
        """Number of training rows, which is what an epoch draws."""
        return self._ends[-1] - self._held_out

    def batch(self, step: int, batch_size: int) -> dict[str, Tensor]:
        """Inputs by name, each (batch_size, ...), of a step, counted from 0."""
        return self._gathered([i for _, i in places(step, batch_size, self.rows, self._seed)])

    def held_out(self) -> dict[str, Tensor] | None:
        """Inputs by name of the rows that are never drawn; None when there is only one row."""
        if not self._held_out:
            return None
        return self._gathered(list(range(self.rows, self._ends[-1])))

    def _gathered(self, places: list[int]) -> dict[str, Tensor]:
        """Rows by their place in an order that is mixed once: data often comes sorted by class."""
        total = self._ends[-1]
        parts: list[dict[str, Tensor]] = []
        for row in (permuted(place, total, _HELD_OUT_KEY) for place in places):
            which = bisect_right(self._ends, row)
            sample = self._samples.inputs[which]
            offset = row - (self._ends[which - 1] if which else 0)
            parts.append({name: value[offset : offset + 1] for name, value in sample.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def sample_stream(samples: Samples, seed: int = 0) -> SampleStream:
    """Rows of named inputs; see `SampleStream`."""
    return SampleStream(samples, seed)
