"""The kernel table of this machine: how much faster than dense products the sparse kernels are.

`elsa-run calibrate` measures it in a few minutes; allocate-budget solves for a latency with it. It
lies in the user's cache folder, under a name that holds what it depends on: processor, instruction
set, threads, onnxruntime, and the library of the kernels itself. A table of another machine or of
other kernels is thus never used by mistake.
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elsa_compile.runtime import kernel_timing as timing
from elsa_compile.runtime import kernels, packed, provider
from elsa_compile.runtime.bandwidth import read_gb_per_s
from elsa_compile.runtime.bench import spread
from elsa_compile.runtime.circumstances import machine, versions
from elsa_compile.runtime.errors import UserInputError, VerificationError
from elsa_compile.runtime.reference import DTYPES
from elsa_compile.runtime.session import usable_cores

VERSION = 1
SHAPES = ((192, 576), (1024, 768), (2048, 2048))  # (N, K): 0.1, 0.8 and 4 million weights
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
TOKENS = (1, 128)
TYPES = ("float32", "bfloat16", "int8")  # what elsa-compile writes
_SWEEP_BYTES = 128 << 20  # of dense float32 weights: they come from memory, ours too, in turns
_MANY = 16  # a product of 128 tokens is bound by arithmetic: a part of the weights will do
_DISTINCT = 4


@dataclass(frozen=True)
class Machine:
    """What a table depends on.

    Attributes:
        cpu: model name.
        isa: instruction set of the kernels.
        threads: of one product.
        onnxruntime: its version.
        library: of the kernels, the beginning of its SHA-256.
    """

    cpu: str
    isa: str
    threads: int
    onnxruntime: str
    library: str

    @property
    def file(self) -> Path:
        """Where its table lies."""
        text = f"{self.cpu}-{self.isa}-{self.threads}t-ort{self.onnxruntime}-{self.library}"
        name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
        return cache_folder() / f"kernels-v{VERSION}-{name}.json"


def cache_folder() -> Path:
    """elsa-compile in XDG_CACHE_HOME, or in ~/.cache where that is not set."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if Path(named).is_absolute() else Path.home() / ".cache") / "elsa-compile"


def this_machine(threads: int | None = None) -> Machine:
    """What a table measured now would depend on.

    Args:
        threads: None for every core this process may use, as sessions take by default.

    Raises:
        UserInputError: the library of the kernels was not built.
    """
    if threads is not None and threads < 1:
        raise UserInputError(f"--threads is {threads}, wanted at least 1")
    digest = hashlib.sha256(Path(provider.get_library_path()).read_bytes()).hexdigest()[:12]
    about = machine()
    return Machine(
        about["cpu"],
        kernels.isa(),
        threads or usable_cores(),
        versions()["onnxruntime"],
        digest,
    )


@dataclass(frozen=True)
class KernelTable:
    """Measured times, and what follows from them.

    Attributes:
        machine: they are of.
        rows: plain values, one for each case; see `calibrate`.
        read_gb_per_s: of memory, by as many threads.
        created: date and time.
        seconds: the measuring took.
    """

    machine: Machine
    rows: tuple[Mapping[str, Any], ...]
    read_gb_per_s: float
    created: str
    seconds: float

    def dense_seconds(self, rows: int, columns: int, dtype: str = "float32") -> float:
        """Seconds of one token through a dense matrix (N, K) in onnxruntime, without our kernels.

        Args:
            rows: N.
            columns: K.
            dtype: float32, or int8 with a scale for each row.
        """
        key = "stock_s" if dtype == "int8" else "dense_s"
        kind = "int8" if dtype == "int8" else "float32"
        sizes: dict[int, list[float]] = {}
        for row in self._rows(kind, 1):
            elements = row["shape"][0] * row["shape"][1]
            sizes.setdefault(elements, []).append(row[key]["median"] / elements)
        points = {size: float(np.median(values)) for size, values in sizes.items()}
        return _by_size(points, rows * columns) * rows * columns

    def gain(self, rows: int, columns: int, density: float, dtype: str, tokens: int = 1) -> float:
        """Speed of a sparse matrix on our kernels over the dense float32 one in onnxruntime.

        Between the measured densities times are taken as linear; beyond the sparsest one the time
        stays, above a density of 0.5 it grows as the density does.

        Args:
            rows: N.
            columns: K.
            density: fraction that is not zero.
            dtype: of the values.
            tokens: 1 or 128.
        """
        curves: dict[int, dict[float, float]] = {}
        for row in self._rows(dtype, tokens):
            elements = row["shape"][0] * row["shape"][1]
            cost = 1 / row["speedup"]["median"]
            curves.setdefault(elements, {})[1 - row["sparsity"]] = cost
        costs = {}
        for elements, curve in curves.items():
            densities = sorted(curve)
            cost = float(np.interp(density, densities, [curve[d] for d in densities]))
            costs[elements] = cost * max(1.0, density / densities[-1])
        return 1 / _by_size(costs, rows * columns)

    def seconds_of(self, rows: int, columns: int, nonzeros: int, dtype: str) -> float:
        """Seconds of one token through a weight, on our kernels where the provider takes it.

        Args:
            rows: N.
            columns: K.
            nonzeros: of its entries.
            dtype: float32, bfloat16 or int8.
        """
        if not packed.taken(rows, columns, nonzeros, dtype):
            return self.dense_seconds(rows, columns, dtype)
        form, gain = packed.choose(rows, columns, nonzeros, dtype)
        if form != "rows":  # which is not calibrated: the library's own figure
            gain = self.gain(rows, columns, nonzeros / (rows * columns), dtype)
        return self.dense_seconds(rows, columns) / gain

    def _rows(self, dtype: str, tokens: int) -> list[Mapping[str, Any]]:
        found = [r for r in self.rows if r["type"] == dtype and r["tokens"] == tokens]
        if not found:
            raise UserInputError(
                f"the kernel table of this machine has nothing about {dtype} weights; measure them "
                f"too: elsa-run calibrate --threads {self.machine.threads} --types "
                f"{' '.join(dict.fromkeys((*TYPES, dtype)))}"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values, as the file holds them."""
        return {"version": VERSION, **asdict(self), "rows": list(self.rows)}


def _by_size(points: Mapping[int, float], elements: int) -> float:
    """Interpolated over the logarithm of the size; that of the nearest one beyond the ends."""
    sizes = sorted(points)
    logs = [math.log(size) for size in sizes]
    return float(np.interp(math.log(max(elements, 1)), logs, [points[size] for size in sizes]))


def load(threads: int | None = None) -> KernelTable:
    """The table of this machine.

    Raises:
        UserInputError: there is none, or it is damaged; says how to make it.
    """
    about = this_machine(threads)
    path = about.file
    again = f"run: elsa-run calibrate --threads {about.threads}"
    try:
        data = path.read_bytes()
    except OSError:
        raise UserInputError(
            f"there is no kernel table for {about.threads} thread(s) of this machine, its "
            f"onnxruntime {about.onnxruntime} and its kernels ({path}); {again}"
        ) from None
    try:
        return _read(json.loads(data), about)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise UserInputError(
            f"the kernel table {path} is damaged ({type(error).__name__}: {error}); {again}"
        ) from None


def _read(content: Any, about: Machine) -> KernelTable:
    """A table from JSON, all that is used of it checked."""
    if content["version"] != VERSION or Machine(**content["machine"]) != about:
        raise ValueError("it is of another version or machine")
    read = content["read_gb_per_s"]
    if not isinstance(read, (int, float)) or not 0 < read < float("inf"):
        raise ValueError("the speed of memory is not a positive number")
    for row in content["rows"]:
        speed, shape = row["speedup"]["median"], row["shape"]
        numbers = [speed, *shape, 1 - row["sparsity"], row["tokens"], row["dense_s"]["median"]]
        numbers += [row["stock_s"]["median"]] if row["type"] == "int8" else []
        if len(shape) != 2 or row["type"] not in DTYPES:
            raise ValueError("a row has an unknown type or shape")
        if not all(isinstance(n, (int, float)) and 0 < n < float("inf") for n in numbers):
            raise ValueError("a row has a number that is not positive")
    return KernelTable(
        about,
        tuple(content["rows"]),
        float(read),
        str(content["created"]),
        float(content["seconds"]),
    )


def save(table: KernelTable) -> Path:
    """Write a table to its place, whole or not at all.

    Raises:
        UserInputError: the folder cannot be written.
    """
    path = table.machine.file
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(table.to_json(), indent=1), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserInputError(
            f"the kernel table cannot be written to {path}: {error.strerror}; set XDG_CACHE_HOME "
            "to a folder that can be written"
        ) from None
    return path


def calibrate(
    threads: int | None = None,
    *,
    types: Sequence[str] = TYPES,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    sparsities: Sequence[float] = SPARSITIES,
    repetitions: int = 7,
    sweep_bytes: int = _SWEEP_BYTES,
    progress: Callable[[str], None] | None = None,
) -> KernelTable:
    """Measure the table of this machine; checked against float64 first.

    Each case is a sweep of many matrices of one shape with zeros at random places. A row holds:
    shape (N, K), sparsity, type, tokens, format (that the cost model chose), dense_s (onnxruntime's
    float32 product), stock_s (int8: onnxruntime's own int8 product), sparse_s (ours), all seconds
    of one product, and speedup (dense_s / sparse_s, paired); each with min, median, max, spread.

    Args:
        threads: of one product; None for every core this process may use.
        types: of values to measure.
        shapes: of matrices, (N, K).
        sparsities: to measure at.
        repetitions: timed runs of a case.
        sweep_bytes: dense bytes of a sweep.
        progress: told of every case.

    Raises:
        UserInputError: the library of the kernels is not there.
        VerificationError: a kernel computes something else.
    """
    about, types = this_machine(threads), tuple(dict.fromkeys(types))
    say = progress or (lambda _: None)
    started = time.perf_counter()
    say(f"reading memory by {about.threads} threads")
    speed = read_gb_per_s(about.threads)
    total = len(shapes) * len(sparsities) * len(types) * len(TOKENS)
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        for tokens in TOKENS:
            size = sweep_bytes // (1 if tokens == 1 else _MANY)
            for row in _measured(
                shape, tokens, about.threads, types, sparsities, size, repetitions
            ):
                rows.append(row)
                spent = time.perf_counter() - started
                left = spent / len(rows) * (total - len(rows))
                say(f"{len(rows)} of {total}, {left:.0f} s left: {describe(row)}")
    created = time.strftime("%Y-%m-%d %H:%M:%S")
    return KernelTable(about, tuple(rows), speed, created, time.perf_counter() - started)


def describe(row: Mapping[str, Any]) -> str:
    """A row in words."""
    n, k = row["shape"]
    tokens = "1 token" if row["tokens"] == 1 else f"{row['tokens']} tokens"
    gain = row["speedup"]
    return (
        f"{n} x {k}, {row['sparsity']:.0%} zeros, {row['type']}, {tokens}: "
        f"{gain['median']:.2f}x ({gain['min']:.2f} .. {gain['max']:.2f}) {row['format']}"
    )


def _measured(
    shape: tuple[int, int],
    tokens: int,
    threads: int,
    types: Sequence[str],
    sparsities: Sequence[float],
    size: int,
    repetitions: int,
) -> Any:
    """Rows of one shape and number of tokens, one after the other."""
    n, k = shape
    copies = max(2, size // (n * k * 4))
    random = np.random.default_rng(0)
    x = random.standard_normal((tokens, k), dtype=np.float32)
    whole = timing.sparse_matrices((k, n), 0.0, min(copies, _DISTINCT), random)
    dense = timing.open_sweep(timing.sweep_model(whole, copies), threads, None)
    stock = None
    if "int8" in types:
        stock = timing.open_sweep(timing.sweep_model(whole, copies, int8=True), threads, None)
    _, clock = timing.pick_clock(threads)
    for sparsity in sparsities:
        matrices = timing.sparse_matrices((k, n), sparsity, len(whole), random)
        data = timing.sweep_model(matrices, copies)
        for dtype in types:
            ours = timing.open_sweep(data, threads, {"values": dtype, "least_gain": "0"})
            claims = provider.claims()
            if not claims:
                raise VerificationError(
                    f"the provider took no product of {dtype} weights {n} x {k} with "
                    f"{sparsity:.0%} zeros, so there is nothing to measure; report it"
                )
            form = claims[0]["format"]
            timing.check_sweep(ours, x, matrices[0], dtype)
            turns = [dense, ours] + ([stock] if dtype == "int8" else [])
            seconds = timing.time_in_turns(turns, x, repetitions, clock)
            each = [spread([s / copies for s in found]) for found in seconds]
            row = {
                "shape": [n, k],
                "sparsity": sparsity,
                "type": dtype,
                "tokens": tokens,
                "format": form,
                "dense_s": each[0],
                "sparse_s": each[1],
                "speedup": spread(timing.paired_ratios(seconds[0], seconds[1])),
            }
            if dtype == "int8":
                row["stock_s"] = each[2]
            yield row
