"""What a token costs in onnxruntime as it is, and how much of that no weight's product takes.

Sparse weights make their own products faster and nothing else, so a speed-up is predicted from the
two apart: products by the kernel table, the rest (attention, norms, activations, the cache, the
call itself) as measured, without our kernels and with them. It is measured on a copy of the model
in which every product with a constant matrix is replaced by a Slice or Pad to the width of its
result: the same nodes around, the same shapes, no weights. What that computes is of no meaning and
is not looked at.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elsa_compile.runtime.errors import UnsupportedModelError
from elsa_compile.runtime.kernel_timing import pick_clock
from elsa_compile.runtime.onnx_constants import Constants, attribute
from elsa_compile.runtime.onnx_file import ModelFile, inspect, load_checked
from elsa_compile.runtime.session import decoding_session, usable_cores
from elsa_compile.runtime.workloads import Workload, workloads

_STEPS = 8
_REPETITIONS = 9
_WARMUP = 2
_IN_FILE_BYTES = 1 << 30
_CONFIG = {"session.force_spinning_stop": "1"}


@dataclass(frozen=True)
class DecodeCost:
    """Seconds of one token.

    Attributes:
        context: tokens before it.
        threads: of the session; None for all cores.
        seconds: of the whole model.
        other_s: of everything that multiplies with no constant matrix, in stock onnxruntime.
        sparse_other_s: of the same with our kernels, which compute attention and share caches.
        products: name of the weight of each product, once for each.
        measured: False for an estimate.
    """

    context: int
    threads: int | None
    seconds: float
    other_s: float
    sparse_other_s: float
    products: tuple[str, ...]
    measured: bool = True

    @property
    def products_s(self) -> float:
        """Of all products with constant matrices."""
        return max(self.seconds - self.other_s, 0.0)


@dataclass(frozen=True)
class _Product:
    """A node, its weight's name, and the number of its inputs K and outputs N."""

    node: Any
    weight: str
    columns: int
    rows: int


def measure_decode_cost(path: Path, context: int, threads: int | None) -> DecodeCost:
    """Time single tokens after a context, of a model and of what is left without its products.

    All in turns; with one thread by that thread's processor time.

    Args:
        path: a decoder with a KV cache.
        context: tokens before.
        threads: as in `session`.

    Raises:
        UnsupportedModelError: it is not one, or it has no product with a constant matrix.
        UserInputError: as `session`.
    """
    file = inspect(path)
    if file.kind != "decoder-with-cache":
        raise UnsupportedModelError(f"{path} is a {file.kind}, wanted a decoder with a KV cache")
    model = load_checked(file)
    found = products(model, file)
    if not found:
        raise UnsupportedModelError(f"{path} has no product with a constant matrix to be planned")
    whole = _decoding(file.path, file, context, threads, False)
    with tempfile.TemporaryDirectory(prefix="elsa-without-products-") as folder:
        rest = Path(folder) / "model.onnx"
        without_products(model, found, rest, file.path.parent)
        turns = [whole, *(_decoding(rest, None, context, threads, k) for k in (False, None))]
        seconds: list[list[float]] = [[] for _ in turns]
        for repetition in range(_WARMUP + _REPETITIONS):
            for index, work in enumerate(turns):
                spent = work.run() / _STEPS
                if repetition >= _WARMUP:
                    seconds[index].append(spent)
    taken, other, ours = (statistics.median(each) for each in seconds)
    names = tuple(product.weight for product in found)
    return DecodeCost(context, threads, taken, min(other, taken), min(ours, taken), names)


def _decoding(
    path: Path, checked: ModelFile | None, context: int, threads: int | None, kernels: bool | None
) -> Workload:
    opened = decoding_session(path, threads, "cpu", checked, _CONFIG, kernels)
    _, clock = pick_clock(threads or usable_cores())
    (work,) = workloads(opened, path, [], [context], _STEPS, clock)
    return work


def products(model: Any, file: ModelFile) -> list[_Product]:
    """The products of an activation and a constant matrix of a checked model."""
    constants = Constants(model, file.path.parent)
    found = []
    for node in constants.graph.node:
        if node.op_type not in ("MatMul", "Gemm") or len(node.input) < 2:
            continue
        route: Any = constants.route(node.input[1])
        if route is None or constants.route(node.input[0]) is not None:
            continue
        shape = route.weight.shape
        if len(shape) == 2:
            if (route.steps.count("Transpose") + attribute(node, "transB", 0)) % 2:
                shape = shape[::-1]
            found.append(_Product(node, route.weight.name, int(shape[0]), int(shape[1])))
    return found


def without_products(model: Any, found: list[_Product], path: Path, folder: Path) -> None:
    """Write a model whose products are replaced; changes `model`.

    Args:
        model: from `load_checked`.
        found: its products.
        path: where to.
        folder: of its external data.
    """
    import onnx
    from onnx import helper, numpy_helper

    graph = model.graph
    for index, product in enumerate(found):
        node, n, k = product.node, product.rows, product.columns
        names = [f"elsa.{index}.{part}" for part in "abc"]
        if n <= k:
            values: list[list[int]] = [[0], [n], [-1]]
            op = "Slice"
        else:
            values, op = [[0, n - k], [], [-1]], "Pad"
            names[1] = ""
        for name, value in zip(names, values, strict=True):
            if name:
                graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
        output, label = node.output[0], node.name
        made = helper.make_node(op, [node.input[0], *names], [output], name=label)
        node.CopyFrom(made)
    read = {name for node in graph.node for name in node.input}
    # Transposes and DequantizeLinears of weights have lost their readers: with them the weights.
    kept = [n for n in graph.node if read.intersection(n.output) or _is_result(graph, n)]
    del graph.node[:]
    graph.node.extend(kept)
    read = {name for node in graph.node for name in node.input}
    for held in (graph.initializer, graph.sparse_initializer):
        for index in reversed(range(len(held))):
            entry = held[index]
            if (entry.name if hasattr(entry, "data_type") else entry.values.name) not in read:
                del held[index]
    onnx.external_data_helper.load_external_data_for_model(model, str(folder))
    # An embedding of a large vocabulary is over protobuf's 2 GiB by itself.
    large = sum(len(t.raw_data) for t in graph.initializer) > _IN_FILE_BYTES
    onnx.save(model, str(path), save_as_external_data=large, location=f"{path.name}.data")


def _is_result(graph: Any, node: Any) -> bool:
    return bool({value.name for value in graph.output}.intersection(node.output))
