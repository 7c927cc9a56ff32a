"""Products of quantised weights as onnxruntime computes them by default, against float64.

By default onnxruntime rounds the activations of such products to int8. What that does to a whole
model is no measure of the file: where the scores mean little, as after too much pruning, rounding
changes half of them. What it may do to one product is known, so products are tried by themselves,
on made-up tokens; one of each kind, as onnxruntime's choice of a kernel looks at types and sizes
only. With values x of at most 1 the step of rounding is at most 1 / 127, each value is
off by at most half of it, either way alike, and by Hoeffding's inequality (1963) a sum over a row w
of a weight is off by more than

    c / 127 * ||w||       with probability 2 exp(-2 c^2): with c = 5, 4e-22

whatever the row. Beside that stands the order of float32 sums. onnxruntime makes signed whole
numbers unsigned and subtracts what that adds, so its summands are of the size of 256 scales; sums
of a block, of 16 entries at least, are integers and exact. A lost sign, or a wrong scale or zero
point, is off by much more: the sum itself is about 0.58 ||w||.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime.errors import UserInputError
from elsa_compile.runtime.onnx_constants import Constants, attribute, dequantised
from elsa_compile.runtime.onnx_file import ModelFile, load_checked
from elsa_compile.runtime.onnx_tensors import Malformed
from elsa_compile.runtime.session import run_failure, session

Array = NDArray[np.float32]
_STEP = 1 / 127
_SURE = 5.0  # c above
_SHIFT = 256  # scales: the most by which whole numbers are moved, and the largest of them then
_BLOCK = 16
# Single tokens and several: onnxruntime has kernels for either. Every other token has no negative
# values, so that a wrong zero point adds up.
_TOKENS = (slice(0, 1), slice(1, 2), slice(0, 4))
_ROWS = 4096  # of a weight, compared together
_MOST = 1 << 30  # elements of a weight: beyond, a model in memory comes near protobuf's 2 GiB


@dataclass(frozen=True)
class RoundedProducts:
    """How far the products of a file are off.

    Attributes:
        products: with quantised weights, in the file.
        tried: of them, the first of each kind.
        worst: largest difference over what rounding may do; at most 1 is right.
        where: name of that product.
        left: of a kind that cannot be tried: the DequantizeLinear is not the last step, or what it
            makes is no float32 matrix or has over 2^30 elements.
    """

    products: int
    tried: int
    worst: float
    where: str
    left: int


def try_products(file: ModelFile, threads: int | None, provider: str) -> RoundedProducts:
    """Multiply made-up tokens with quantised matrices of a file, in plain onnxruntime.

    Args:
        file: a checked model.
        threads: as in `session`.
        provider: as in `session`.

    Raises:
        UserInputError: its constants cannot be computed.
        ElsaError: onnxruntime refuses a product that it takes in the whole model.
    """
    kinds: dict[Any, bool] = {}  # whether it could be tried
    count, left, worst, where = 0, 0, 0.0, ""
    try:
        model = load_checked(file)
        constants = Constants(model, file.path.parent)
        for node in _products(constants):
            count += 1
            kind = _kind(constants, node)
            if kind not in kinds:
                weight = _weight(constants, node)
                kinds[kind] = weight is not None
                if weight is not None:
                    found = worst_of(_alone(model, constants, node), *weight, threads, provider)
                    if not found <= worst:  # NaN too
                        worst, where = found, node.name or node.output[0]
            left += not kinds[kind]
    except Malformed as fault:
        raise UserInputError(f"{file.path}: {fault}; get it again") from None
    return RoundedProducts(count, sum(kinds.values()), worst, where, left)


def _products(constants: Constants) -> Iterator[Any]:
    """Nodes that multiply an activation with what a DequantizeLinear made of constants."""
    for node in constants.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.domain in ("", "ai.onnx"):
            route = constants.route(node.input[1])
            if route is not None and "DequantizeLinear" in route.steps:
                yield node


def _kind(constants: Constants, node: Any) -> tuple[Any, ...]:
    """All that tells one product from another but values: equal ones run on the same kernel."""
    kind: list[Any] = [node.op_type, attribute(node, "transB", 0)]
    names = [node.input[1]]
    while names:
        name = names.pop()
        held, maker = constants.held(name), constants.makers.get(name)
        if held is not None:
            kind.append((held.shape, held.dtype, held.form))
        elif maker is not None:
            options = (a.SerializeToString(deterministic=True) for a in maker.attribute)
            kind.append((maker.domain, maker.op_type, *options))
            names += maker.input
    return tuple(kind)


def _weight(constants: Constants, node: Any) -> tuple[Array, Array] | None:
    """Values (N, K) and the largest scale of each row (N,), or None where it is not tried."""
    name, turned = node.input[1], bool(attribute(node, "transB", 0))
    maker = constants.makers[name]
    while maker.op_type == "Transpose":
        name, turned = maker.input[0], not turned
        maker = constants.makers.get(name)
    route = constants.route(name)
    if maker is None or maker.op_type != "DequantizeLinear" or route is None:
        return None
    if len(route.weight.shape) != 2 or route.weight.elements > _MOST:
        return None
    values, scale = constants.values(name), constants.values(maker.input[1])
    if values.dtype != np.float32 or scale.dtype != np.float32:
        return None
    ones = np.ones(values.shape, np.int8)
    axis, block = attribute(maker, "axis", 1), attribute(maker, "block_size", 0)
    scales = np.abs(dequantised(ones, scale, None, axis, block))
    if not turned:
        values, scales = values.T, scales.T
    return values, scales.max(axis=1)


def _alone(model: Any, constants: Constants, node: Any) -> Any:
    """A model of nothing but x (tokens, K) -> y, the product, and the nodes before its weight."""
    import onnx
    from onnx import helper

    names, made, held = [node.input[1]], set(), set()
    while names:
        name = names.pop()
        maker = constants.makers.get(name)
        if maker is None:
            held.add(name)
        elif name not in made:
            made.update(maker.output)
            names += [read for read in maker.input if read]
    product = helper.make_node(node.op_type, ["x", node.input[1]], ["y"])
    product.attribute.extend(a for a in node.attribute if a.name == "transB")
    alone = onnx.ModelProto()
    alone.CopyFrom(_frame(model))
    nodes = [each for each in constants.graph.node if made.intersection(each.output)]
    alone.graph.node.extend([*nodes, product])
    kinds = [("x", ["tokens", None]), ("y", None)]
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n, shape in kinds)
    alone.graph.input.append(x)
    alone.graph.output.append(y)
    alone.graph.initializer.extend(t for t in constants.graph.initializer if t.name in held)
    sparse = [s for s in constants.graph.sparse_initializer if s.values.name in held]
    alone.graph.sparse_initializer.extend(sparse)
    tensors = [*alone.graph.initializer]
    tensors += [part for s in alone.graph.sparse_initializer for part in (s.values, s.indices)]
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(constants.folder))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    return alone


def _frame(model: Any) -> Any:
    """A model's versions and functions, with an empty graph."""
    import onnx

    frame = onnx.ModelProto(ir_version=model.ir_version)
    frame.opset_import.extend(model.opset_import)
    frame.functions.extend(model.functions)
    frame.graph.name = "product"
    return frame


def worst_of(alone: Any, weight: Array, scales: Array, threads: int | None, provider: str) -> float:
    """Largest difference of a product over what rounding may do; inf where it is not finite.

    Args:
        alone: a model of x (tokens, K) -> y (tokens, N) and nothing else.
        weight: (N, K), what it is to multiply with.
        scales: (N,), the largest scale of each row.
        threads: as in `session`.
        provider: as in `session`.
    """
    random = np.random.RandomState(0)
    columns = weight.shape[1]
    x = random.uniform(-1, 1, (_TOKENS[-1].stop, columns)).astype(np.float32)
    x[1::2] = np.abs(x[1::2])
    with TemporaryDirectory(prefix="elsa-product-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(alone.SerializeToString())
        opened = session(path, threads, provider, kernels=False)
    sums = (columns / _BLOCK + 4) * 2.0**-24  # roundings of a float32 sum: Higham, section 3.1
    sizes = np.abs(x.astype(np.float64)).sum(axis=1, keepdims=True)
    worst = 0.0
    for tokens in _TOKENS:
        try:
            found = opened.run(["y"], {"x": x[tokens]})[0]
        except Exception as error:
            raise run_failure(error, alone.graph.node[-1].name) from None
        for start in range(0, len(weight), _ROWS):
            rows = slice(start, start + _ROWS)
            part = weight[rows].astype(np.float64)
            allowed = _SURE * _STEP * np.linalg.norm(part, axis=1)
            allowed = allowed + sums * _SHIFT * sizes[tokens] * scales[rows]
            gap = np.abs(found[:, rows] - x[tokens] @ part.T)
            off = float((gap / np.maximum(allowed, 1e-37)).max())
            worst = max(worst, off if np.isfinite(off) else float("inf"))
    return worst
