"""The best stock versions of a model: every constant matrix in 8 or 4 bits, as onnxruntime has it.

What sparse kernels have to beat is not float32 but com.microsoft's MatMulNBits with activations
rounded to int8 (accuracy level 4; without it 8 bits are ten times slower). Its input is the model
with all zeros written out; blocks of 32 along K, no zero points, rounded to nearest. The arithmetic
is onnxruntime's own; this file writes what its quantiser would, which loses sparse initializers.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime.errors import UserInputError, VerificationError
from elsa_compile.runtime.onnx_constants import CONTRIB, Constants, attribute
from elsa_compile.runtime.onnx_file import ModelFile, load_checked
from elsa_compile.runtime.onnx_tensors import Malformed, shown
from elsa_compile.runtime.onnx_values import Array, dense_values, sparse_values
from elsa_compile.runtime.rounded_products import worst_of
from elsa_compile.runtime.session import memory_limit_bytes

BLOCK = 32
ACCURACY_LEVEL = 4
_ROWS = 1024  # quantised together: what a cache holds, not what a head of a large model takes
_SUBNORMAL = 1e-37  # steps below have few bits left, or none
_MOST_JUDGED = 1 << 28  # elements of a product that is tried by itself
_EXTERNAL_BYTES = 1 << 30  # protobuf ends at 2 GiB; beyond this, weights go to a file beside it


@dataclass
class StockModel:
    """A model written by `write_stock`.

    Attributes:
        path: the file.
        bits: 8 or 4, or 32 for dense float32.
        quantised: names of the matrices that are now in so many bits.
        left: name of a product and why it stays as it was.
    """

    path: Path
    bits: int
    quantised: list[str] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)


def quantise_blocks(weight: Array, bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Round a matrix to whole numbers, each block of 32 inputs with a scale of its own.

    The entry of largest magnitude becomes the lowest whole number exactly, so zero stays zero.

    Args:
        weight: (N, K) float, finite.
        bits: 8 or 4.

    Returns:
        Whole numbers (N, blocks, 32 * bits / 8) uint8 with 2^(bits - 1) for zero, of 4 bits two to
        a byte, low half first; scales (N, blocks) float32.

    Example: 4 bits, a row [0.5, -1, 0, ...]: scale 0.125, whole numbers [12, 0, 8, ...].
    """
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK)
    whole = np.empty((rows, blocks, BLOCK * bits // 8), dtype=np.uint8)
    scales = np.empty((rows, blocks), dtype=np.float32)
    for start in range(0, rows, _ROWS):
        part = slice(start, start + _ROWS)
        padded = np.zeros((len(weight[part]), blocks * BLOCK), dtype=np.float32)
        padded[:, :columns] = weight[part]
        whole[part], scales[part] = _quantised(padded.reshape(-1, blocks, BLOCK), bits)
    return whole, scales


def widen_blocks(
    whole: NDArray[np.uint8], scales: NDArray[np.float32], bits: int
) -> NDArray[np.float32]:
    """What `quantise_blocks` made as float32 (N, blocks * 32)."""
    codes = np.stack([whole & 15, whole >> 4], axis=-1) if bits == 4 else whole
    values = codes.reshape(len(whole), scales.shape[1], BLOCK).astype(np.float32)
    values -= 1 << (bits - 1)
    values *= scales[:, :, None]
    return values.reshape(len(whole), -1)


def _quantised(
    grouped: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """`quantise_blocks` of some rows (n, blocks, 32)."""
    middle = 1 << (bits - 1)
    high, low = grouped.max(axis=2), grouped.min(axis=2)
    scale = np.where(high > -low, high, low) / np.float32(-middle)
    divisor = np.where(scale == 0, np.float32(1), scale)
    values = grouped / divisor[:, :, None]
    np.rint(values, out=values)
    values += middle
    whole = np.clip(values, 0, 2 * middle - 1, out=values).astype(np.uint8)
    if bits == 4:
        whole = whole[:, :, 0::2] | whole[:, :, 1::2] << 4
    return whole, scale


def write_stock(file: ModelFile, bits: int, folder: Path) -> StockModel:
    """Write the stock version of a model.

    Args:
        file: a checked model, sparse or dense, float or quantised.
        bits: 8 or 4, or 32: every matrix as dense float32.
        folder: an existing one, for model.onnx.

    Raises:
        UserInputError: nothing in it can be quantised, or it does not fit in memory.
        VerificationError: what was written is not the model's weights, rounded.
    """
    limit = memory_limit_bytes()
    if limit is not None and 2 * file.dense_bytes > limit:
        raise UserInputError(
            f"{file.path}: its stock version needs {2 * file.dense_bytes} bytes while it is made, "
            f"but this machine has {limit}; make it on a larger one and give its path"
        )
    made = StockModel(folder / "model.onnx", bits)
    try:
        model = load_checked(file)
        _Writer(model, Constants(model, file.path.parent), made).write()
    except Malformed as fault:
        raise UserInputError(f"{file.path}: {fault}; get it again") from None
    if not made.quantised:
        why = made.left[0][1] if made.left else "it has no MatMul or Gemm with a constant matrix"
        raise UserInputError(f"{file.path}: there is no stock int{bits} version of it: {why}")
    return made


class _Writer:
    """Replaces the products of a model, then stores everything dense."""

    def __init__(self, model: Any, constants: Constants, made: StockModel) -> None:
        self.model, self.graph = model, model.graph
        self.constants, self.made = constants, made
        self.stored: dict[tuple[str, bool], tuple[str, str, int, int, type]] = {}
        self.judged: set[tuple[int, int]] = set()
        self.read: tuple[str, Array] = ("", np.zeros(0))
        self.taken = {name for node in self.graph.node for name in (*node.input, *node.output)}
        self.taken |= {constant.name for constant in constants}

    def write(self) -> None:
        import onnx

        replaced = []
        for node in self.graph.node:
            why = self._why_not(node)
            if why is None:
                replaced += self._replaced(node)
                continue
            if why:
                self.made.left.append((node.name or node.output[0], why))
            replaced.append(node)
        self._keep(replaced)
        self._densify()
        if not any(entry.domain == CONTRIB for entry in self.model.opset_import):
            self.model.opset_import.add(domain=CONTRIB, version=1)
        size = self.model.ByteSize()
        onnx.save_model(
            self.model,
            str(self.made.path),
            save_as_external_data=size > _EXTERNAL_BYTES,
            location="model.onnx.data",
        )

    def _why_not(self, node: Any) -> str | None:
        """None for a product to quantise, why not for others; "" for no product with a weight."""
        if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
            return ""
        if len(node.input) < 2 or self.constants.route(node.input[0]):
            return ""
        if self.constants.route(node.input[1]) is None:
            return ""
        plain = [attribute(node, k, d) for k, d in (("transA", 0), ("alpha", 1.0), ("beta", 1.0))]
        if node.op_type == "Gemm" and plain != [0, 1.0, 1.0]:
            return "a Gemm with transA, alpha or beta"
        values = self._values(node)
        if values.ndim != 2 or not values.size:
            return f"its weight has shape {list(values.shape)}, not that of a matrix"
        if values.dtype not in (np.float32, np.float16):
            return f"its weight is {values.dtype}; MatMulNBits multiplies float32 and float16"
        if self.made.bits == 32 and values.dtype != np.float32:
            return f"its weight is {values.dtype}, and so is what it is multiplied with"
        return None if np.isfinite(values).all() else "its weight is not finite"

    def _values(self, node: Any) -> Array:
        key = (node.input[1], _turned(node))
        # Of one that is stored already only the shape and type matter.
        if key in self.stored:
            _, _, rows, columns, kind = self.stored[key]
            return np.broadcast_to(kind(0), (rows, columns))
        if self.read[0] != node.input[1]:
            self.read = (node.input[1], self.constants.values(node.input[1]))
        return self.read[1]

    def _replaced(self, node: Any) -> list[Any]:
        """MatMulNBits, and an Add where a Gemm had a bias; the node itself for 32 bits."""
        from onnx import helper

        if self.made.bits == 32:
            return [self._widened(node)]
        key = (node.input[1], _turned(node))
        if key not in self.stored:
            self.stored[key] = self._store(*key)
        whole, scales, rows, columns, _ = self.stored[key]
        output = node.output[0]
        bias = node.input[2] if len(node.input) > 2 else ""
        made = helper.make_node(
            "MatMulNBits",
            [node.input[0], whole, scales],
            [self._fresh(f"{output}.product") if bias else output],
            name=node.name,
            domain=CONTRIB,
            K=columns,
            N=rows,
            bits=self.made.bits,
            block_size=BLOCK,
            accuracy_level=ACCURACY_LEVEL,
        )
        self.made.quantised.append(node.input[1])
        return [made, helper.make_node("Add", [made.output[0], bias], [output])] if bias else [made]

    def _widened(self, node: Any) -> Any:
        """The node, reading its weight from a dense float32 initializer."""
        from onnx import numpy_helper

        name = node.input[1]
        self.made.quantised.append(name)
        route = self.constants.route(name)
        if route is not None and route.steps:
            key = (name, False)
            if key not in self.stored:
                values, dense = self._values(node), self._fresh(f"{name}.dense")
                # Behind a DequantizeLinear the values are rounded; others lose nothing either.
                self.graph.initializer.append(
                    numpy_helper.from_array(np.ascontiguousarray(values), dense)
                )
                self.stored[key] = (dense, "", *values.shape, values.dtype.type)
            node.input[1] = self.stored[key][0]
        return node

    def _store(self, name: str, turned: bool) -> tuple[str, str, int, int, type]:
        """Quantise a matrix; names of its numbers and scales, N, K, and its float type."""
        from onnx import numpy_helper

        values = self.read[1]  # by `_why_not`, a moment ago
        weight = values if turned else values.T
        whole, scales = quantise_blocks(weight, self.made.bits)
        stored: Array = scales.astype(values.dtype)
        self._judge(name, weight, whole, stored.astype(np.float32), values.dtype == np.float32)
        names = [self._fresh(f"{name}.{part}") for part in ("whole", "scales")]
        for label, array in ((names[0], whole), (names[1], stored)):
            self.graph.initializer.append(numpy_helper.from_array(array, label))
        return (*names, *weight.shape, values.dtype.type)

    def _judge(
        self,
        name: str,
        weight: Array,
        whole: NDArray[np.uint8],
        scales: NDArray[np.float32],
        try_product: bool,
    ) -> None:
        """Rounding moves no value by over a step, and onnxruntime multiplies with what is stored.

        The second is tried on made-up tokens, once for each shape, of float32 products. How far the
        scores of the whole model move is no measure: 4 bits change most of a hard pruned one's.

        Raises:
            VerificationError: something else was stored, or is multiplied with.
        """
        rows, columns = weight.shape
        for start in range(0, rows, _ROWS):
            part = slice(start, start + _ROWS)
            near = widen_blocks(whole[part], scales[part], self.made.bits)[:, :columns]
            step = np.repeat(np.abs(scales[part]), BLOCK, axis=1)[:, :columns]
            if not (np.abs(near - weight[part]) <= 1.001 * step + _SUBNORMAL).all():
                raise VerificationError(
                    f"{name}: rounding to {self.made.bits} bits moved a value by more than a step, "
                    "so the stock version is no reference"
                )
        if not try_product or (rows, columns) in self.judged or rows * columns > _MOST_JUDGED:
            return
        self.judged.add((rows, columns))
        off = worst_of(
            _product_alone(whole, scales, rows, columns, self.made.bits),
            widen_blocks(whole, scales, self.made.bits)[:, :columns],
            np.abs(scales).max(axis=1),
            None,
            "cpu",
        )
        if not off <= 1.0:
            raise VerificationError(
                f"{name}: onnxruntime's {self.made.bits}-bit product is off by {off:.2g} times "
                "what rounding activations may do, so the stock version is no reference"
            )

    def _fresh(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def _keep(self, nodes: list[Any]) -> None:
        """These nodes, without those whose results nobody reads any more."""
        wanted = {value.name for value in self.graph.output}
        kept = []
        for node in reversed(nodes):
            # Only what a weight passed through can have lost its reader.
            folded = node.output and self.constants.route(node.output[0]) is not None
            if folded and not wanted.intersection(node.output):
                continue
            wanted.update(node.input)
            wanted.update(_outer_reads(node))
            kept.append(node)
        del self.graph.node[:]
        self.graph.node.extend(reversed(kept))
        for held in (self.graph.initializer, self.graph.sparse_initializer):
            for index in reversed(range(len(held))):
                entry = held[index]
                name = entry.name if hasattr(entry, "data_type") else entry.values.name
                if name not in wanted:
                    del held[index]

    def _densify(self) -> None:
        """What is left in sparse form or outside of the file, dense and inside."""
        from onnx import numpy_helper

        folder = self.constants.folder
        for sparse in self.graph.sparse_initializer:
            name, kind = sparse.values.name, sparse.values.data_type
            values = sparse_values(sparse, f"weight {shown(name)}", folder)
            if kind == 16:  # bfloat16, which numpy has not: the upper half of float32
                raw = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
                self.graph.initializer.add(name=name, dims=values.shape, data_type=16, raw_data=raw)
            else:
                self.graph.initializer.append(numpy_helper.from_array(values, name))
        del self.graph.sparse_initializer[:]
        for tensor in self.graph.initializer:
            if tensor.data_location == 1:
                what = f"weight {shown(tensor.name)}"
                raw = _raw(tensor, what, folder)
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")
                tensor.raw_data = raw


def _product_alone(
    whole: NDArray[np.uint8], scales: NDArray[np.float32], rows: int, columns: int, bits: int
) -> Any:
    """A model of one MatMulNBits, x (tokens, K) -> y (tokens, N)."""
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node(
        "MatMulNBits", ["x", "whole", "scales"], ["y"], name="product", domain=CONTRIB, K=columns,
        N=rows, bits=bits, block_size=BLOCK, accuracy_level=ACCURACY_LEVEL,
    )  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", columns])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", rows])
    held = [numpy_helper.from_array(whole, "whole"), numpy_helper.from_array(scales, "scales")]
    graph = helper.make_graph([node], "product", [x], [y], held)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _raw(tensor: Any, what: str, folder: Path) -> bytes:
    """Bytes of external data, checked again."""
    from elsa_compile.runtime.onnx_tensors import check_tensor

    stored = check_tensor(tensor, what, folder)
    if stored.external is None:
        return dense_values(tensor, what, folder).tobytes()
    with stored.external.path.open("rb") as opened:
        opened.seek(stored.external.offset)
        return opened.read(stored.external.length)


def _turned(node: Any) -> bool:
    """A Gemm whose weight lies as (N, K)."""
    return node.op_type == "Gemm" and bool(attribute(node, "transB", 0))


def _outer_reads(node: Any) -> set[str]:
    """Names that subgraphs of a node read, their own included: some too many do no harm."""
    found: set[str] = set()
    for held in node.attribute:
        for graph in (held.g, *held.graphs):
            for inner in graph.node:
                found.update(inner.input)
                found |= _outer_reads(inner)
            found.update(value.name for value in graph.output)
    return found
