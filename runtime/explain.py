"""Pruned, but not faster: why? Where the zeros of an ONNX file are, and who makes use of them.

Works on any file, whoever made it, without running it. Every weight that a node of the main graph
reads is followed from its initializer to its reader; its zeros are counted as they arrive there,
its form is named, and what it could gain is looked up in a table of measured kernels.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime import forms
from elsa_compile.runtime.errors import UserInputError
from elsa_compile.runtime.expected_gain import expected_gain, matrices_gain
from elsa_compile.runtime.explain_summary import reasons
from elsa_compile.runtime.measured_gain import measure_gain
from elsa_compile.runtime.onnx_constants import CONTRIB, Constant, Constants, attribute
from elsa_compile.runtime.onnx_file import ModelFile, inspect, load_checked
from elsa_compile.runtime.onnx_tensors import DTYPES, Malformed, shown
from elsa_compile.runtime.session import memory_limit_bytes

_LARGEST = 1 << 30  # entries; the heads of large models have half of it
_PRODUCTS = ("MatMul", "Gemm")
_WIDENED = {"int8": "int8", "uint8": "int8", "int4": "int4", "uint4": "int4"}


@dataclass(frozen=True)
class Weight:
    """One weight.

    Attributes:
        name: of its initializer.
        shape: as stored.
        dtype: of its stored values.
        role: "product" (MatMul, Gemm: a matrix that activations are multiplied with), "lookup",
            "convolution" or "other" (norms, biases, attention's own products).
        form: "dense", "coo" or "packed" for float values; of quantised ones "int8" or "int4", with
            "coo " or "packed " before it when so stored.
        readers: operators that read it, the nodes before them included: "Transpose > MatMul".
        rows, columns: of a product's matrix, outputs and inputs; 0 for other roles.
        elements: number of elements, zeros included.
        zeros: how many of them are zero where they are read; None when that cannot be told.
        stored_bytes, dense_bytes: in the file, and of all elements in memory.
        dead_rows, dead_columns: outputs and inputs whose weights are all zero.
        two_of_four: at least half of every four along the inputs is zero.
        used_by: runtimes that make use of the zeros.
        kernel: format our provider would pack it in, "bitmap", "sliced", or "rows" with its zeros;
            "dense" when it leaves it to onnxruntime; None when it does not take it, or is not on
            this machine.
        why: it does not take it; empty otherwise.
        expected_gain: decode speed of this matrix over the same values stored dense, by the table
            of `expected_gain`; 1 where no kernel takes it.
        node: the first product that reads it; "" for other roles.
        measured_gain: speed of that node with our kernels over stock onnxruntime; None where it was
            not measured.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    form: str
    readers: tuple[str, ...]
    rows: int
    columns: int
    elements: int
    zeros: int | None
    stored_bytes: int
    dense_bytes: int
    dead_rows: int
    dead_columns: int
    two_of_four: bool
    used_by: tuple[str, ...]
    kernel: str | None
    why: str
    expected_gain: float
    node: str = ""
    measured_gain: float | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros; 0 where they cannot be counted."""
        return (self.zeros or 0) / max(self.elements, 1)


def explain(path: str | Path, measure: bool = False, threads: int | None = None) -> dict[str, Any]:
    """Where the zeros of a model are and what they are good for.

    Args:
        path: the .onnx file or its folder.
        measure: run it, with our kernels and without, for the gain of each matrix.
        threads: of that.

    Returns:
        Plain values for JSON: weights (see `Weight`, largest first), products (all matrices
        together), kernels (whether ours are there), measured (workload, gain over all nodes; None
        unless asked for), reasons (code, sentence), answer, forms (see `forms.forms_table`),
        decode_bytes (stock onnxruntime's need for packed weights; or 0).

    Raises:
        UserInputError: missing, unreadable or malformed; the sentence names the tensor.
    """
    if threads is not None and not measure:
        raise UserInputError("--threads is of --measure; give both, or neither")
    file = inspect(path, count_zero=True)
    try:
        weights = weights_of(file)
    except Malformed as fault:
        raise UserInputError(f"{file.path}: {fault}; the file is damaged, get it again") from None
    except OSError as error:
        raise UserInputError(f"{file.path}: its data cannot be read: {error}") from None
    kernels = native_kernels()
    measured = None
    if measure:
        gains = measure_gain(file, threads)
        measured = {"workload": gains.workload, "gain": gains.all_nodes, "threads": threads}
        weights = [replace(w, measured_gain=gains.by_node.get(w.node)) for w in weights]
    products = _products(weights)
    found = reasons(weights, products, kernels)
    return {
        "model": str(file.path),
        "kind": file.kind,
        "file_bytes": file.file_bytes + file.external_bytes,
        "products": products,
        "kernels": kernels,
        "measured": measured,
        "reasons": [{"code": code, "sentence": sentence} for code, sentence in found],
        "answer": found[0][1],
        **forms.of_model(file, weights),
        "weights": [{**asdict(weight), "sparsity": weight.sparsity} for weight in weights],
    }


def native_kernels() -> dict[str, Any]:
    """Whether the sparse kernels are on this machine; if not, why."""
    from elsa_compile.runtime import kernels

    there, why = kernels.available()
    return {"available": there, "why": why}


def weights_of(file: ModelFile) -> list[Weight]:
    """Every weight of a checked file, largest first; scalars, shapes and constants left out."""
    model = load_checked(file)
    constants = Constants(model, file.path.parent)
    stored = {weight.name: weight.stored_bytes for weight in file.weights}
    zeros = {weight.name: weight.zeros for weight in file.weights}
    uses = _uses(constants)
    weights = []
    for constant in constants:
        reads = uses.get(constant.name, [])
        if len(constant.shape) < 2 and not any(use.packed for use in reads):
            continue
        size = stored.get(constant.name, 0)
        if not size and constant.form != "packed":
            size = constant.proto.ByteSize()
        weights.append(_weight(constants, constant, reads, size, zeros.get(constant.name)))
    return sorted(weights, key=lambda weight: -weight.elements)


@dataclass(frozen=True)
class _Use:
    """One reader of a constant. `read`: the name it reads, which the constant may be far from."""

    node: Any
    slot: int
    read: str
    steps: tuple[str, ...]

    @property
    def packed(self) -> bool:
        """The reader takes compressed non-zeros."""
        return bool(self.node.domain.split(".")[0] == "elsa")

    @property
    def role(self) -> str:
        op, standard = self.node.op_type, self.node.domain in ("", "ai.onnx")
        if self.packed or (op == "MatMulNBits" and self.node.domain == CONTRIB and self.slot == 1):
            return "product"
        if standard and op in _PRODUCTS and self.slot == 1:
            return "product"
        if self.slot == 0 and op in ("Gather", "GatherBlockQuantized"):
            return "lookup"
        return "convolution" if op in ("Conv", "ConvTranspose") and self.slot == 1 else "other"


def _uses(constants: Constants) -> dict[str, list[_Use]]:
    """Readers of every constant, past the nodes that loading folds away."""
    uses: dict[str, list[_Use]] = {}
    for node in constants.graph.node:
        if node.output and all(constants.route(name) for name in node.output if name):
            continue  # folded itself: its own readers count
        for slot, name in enumerate(node.input):
            route = constants.route(name) if name else None
            if route is not None:
                uses.setdefault(route.weight.name, []).append(_Use(node, slot, name, route.steps))
    return uses


def _weight(
    constants: Constants, constant: Constant, uses: list[_Use], size: int, zeros: int | None
) -> Weight:
    use = next((u for u in uses if u.role == "product"), None) or next(iter(uses), None)
    role = use.role if use is not None else "other"
    mask, dtype = None, constant.dtype
    kept, narrow = dtype, "float32"  # kept: in memory, by our kernels
    elements = constant.elements
    if use is not None and role == "product" and not use.packed:
        if use.node.op_type == "MatMulNBits":
            mask, dtype = _nbits_mask(constants, use.node), _bits_name(use.node)
            kept = dtype
            elements = mask.size
        elif elements <= _room():
            mask, narrow = _kept(constants, use)
    zeros = zeros if mask is None else int(mask.size - np.count_nonzero(mask))
    rows, columns = mask.shape if mask is not None else (0, 0)
    form = _form(constant, use, dtype)
    kernel, why, gain = None, "", 1.0
    if use is not None and role == "product":
        why = not_taken(constants, use.node, use.steps, mask)
        if not why and mask is not None:
            if dtype in ("float32", "float16", "bfloat16"):  # half of which loading folds away
                kept = _kept_type(mask, narrow, constant.form != "packed")
            kernel = _chosen(mask, kept, constant.form != "packed")
            # "rows" is faster than onnxruntime as well, but not because of zeros.
            whole = kernel in ("dense", "rows")
            gain = 1.0 if whole else expected_gain(kept, float(mask.mean()))
    halves = mask is not None and columns % 4 == 0 and _two_of_four(mask)
    return Weight(
        name=constant.name,
        shape=constant.shape,
        dtype=dtype,
        role=role,
        form=form,
        readers=tuple(sorted({" > ".join((*u.steps, u.node.op_type)) for u in uses})),
        rows=rows,
        columns=columns,
        elements=elements,
        zeros=zeros,
        stored_bytes=size,
        dense_bytes=-(-elements * _bits(constant) // 8) if elements == constant.elements else size,
        dead_rows=0 if mask is None else int(rows - np.count_nonzero(mask.any(axis=1))),
        dead_columns=0 if mask is None else int(columns - np.count_nonzero(mask.any(axis=0))),
        two_of_four=halves,
        used_by=_used_by(gain, halves, form),
        kernel=kernel,
        why=why,
        expected_gain=gain,
        node=use.node.name if use is not None and role == "product" else "",
    )


def _room() -> int:
    """Entries of a matrix that may be made dense: float32, a mask and a copy must fit in memory.

    Of a larger one only the zeros are counted; a sparse weight of few bytes can claim terabytes.
    """
    limit = memory_limit_bytes()
    return _LARGEST if limit is None else min(_LARGEST, limit // 16)


def _chosen(mask: NDArray[np.bool_], dtype: str, whole: bool) -> str | None:
    """What the provider's cost model says; None where the library is not there."""
    from elsa_compile.runtime import kernels, packed

    if not kernels.available()[0]:
        return None
    rows, columns = mask.shape
    return packed.choose(rows, columns, int(np.count_nonzero(mask)), dtype, whole)[0]


def _kept_type(mask: NDArray[np.bool_], narrow: str, whole: bool) -> str:
    """The type the provider would keep; without the library that of its best kernels."""
    from elsa_compile.runtime import kernels, packed

    if not kernels.available()[0]:
        return narrow
    rows, columns = mask.shape
    return packed.kept_type(rows, columns, int(np.count_nonzero(mask)), narrow, whole)


def _bits(constant: Constant) -> int:
    return next(d.bits for d in DTYPES.values() if d.name == constant.dtype)


def _kept(constants: Constants, use: _Use) -> tuple[NDArray[np.bool_] | None, str]:
    """A matrix as its product reads it: (N, K) bool, True = not zero; None when not 2-D.

    And the smallest type that holds all its float32 values, in which the provider keeps them.
    """
    values = constants.values(use.read)
    if values.ndim != 2:
        return None, "float32"
    turned = use.node.op_type == "Gemm" and attribute(use.node, "transB", 0) == 1
    return np.ascontiguousarray((values if turned else values.T) != 0), narrowest_type(values)


def narrowest_type(values: NDArray[Any]) -> str:
    """bfloat16, float16 or float32: the first that holds every value unchanged."""
    exact = np.ascontiguousarray(values, np.float32)
    if not np.any(exact.view(np.uint32) & 0xFFFF):
        return "bfloat16"
    with np.errstate(over="ignore"):
        half = np.array_equal(exact.astype(np.float16).astype(np.float32), exact)
    return "float16" if half else "float32"


def not_taken(
    constants: Constants, node: Any, steps: tuple[str, ...], mask: NDArray[np.bool_] | None
) -> str:
    """Why the execution provider leaves a product alone, whatever its zeros; "" when it does not.

    Args:
        constants: of its graph.
        node: the product.
        steps: operators between the weight and the product.
        mask: (N, K) of the matrix, or None when it has not two axes.
    """
    if node.op_type not in _PRODUCTS:
        return f"a {node.op_type}, whose weight no sparse kernel reads"
    if mask is None:
        return "its weight is not a matrix, or too large to look at"
    plain = (
        attribute(node, "transA", 0),
        attribute(node, "alpha", 1.0),
        attribute(node, "beta", 1.0),
    )
    if node.op_type == "Gemm" and plain != (0, 1.0, 1.0):
        return "a Gemm with transA, alpha or beta"
    if "DequantizeLinear" not in steps:
        route = constants.route(node.input[1])
        widened = route is not None and (route.weight.dtype == "float32" or "Cast" in steps)
        return "" if widened else "its values are not float32 or int8"
    if steps[-1] != "DequantizeLinear":
        return "something stands between its DequantizeLinear and the product"
    return _not_by_rows(constants, constants.makers[node.input[1]], mask.shape[0])


def _not_by_rows(constants: Constants, widening: Any, rows: int) -> str:
    """Empty when a DequantizeLinear has int8 values, a scale for each output and no zero point."""
    whole, scale = (constants.values(name) for name in widening.input[:2])
    if whole.dtype != np.int8 or _stored_dtype(constants, widening.input[0]) != "int8":
        return "its values are quantised, but not to int8"
    blocked = attribute(widening, "block_size", 0) != 0
    if blocked or scale.ndim > 1 or scale.size not in (1, rows):
        return "its int8 values have other scales than one for each output"
    named = widening.input[2] if len(widening.input) > 2 else ""
    zero = bool(named) and constants.values(named).any()
    return "its int8 values have a zero point" if zero else ""


def _stored_dtype(constants: Constants, name: str) -> str:
    route = constants.route(name)
    assert route is not None  # the caller has computed its values
    return route.weight.dtype


def _bits_name(node: Any) -> str:
    return f"int{attribute(node, 'bits', 4)}"


def _nbits_mask(constants: Constants, node: Any) -> NDArray[np.bool_]:
    """(N, K) bool of a MatMulNBits: where a whole number is not its zero point."""
    what = f"node {shown(node.name or node.op_type)}: "
    rows, columns = attribute(node, "N", 0), attribute(node, "K", 0)
    bits, block = attribute(node, "bits", 4), attribute(node, "block_size", 0)
    whole = constants.values(node.input[1])
    blocks = -(-columns // block) if block > 0 else 0
    wanted = rows * blocks * (block * bits // 8)
    if bits not in (4, 8) or rows < 1 or blocks < 1 or whole.size != wanted:
        raise Malformed(f"{what}its {whole.size} bytes are not N={rows}, K={columns}, {bits} bits")
    flat = whole.reshape(rows, -1).view(np.uint8)
    if bits == 4:
        flat = np.stack([flat & 0xF, flat >> 4], axis=-1).reshape(rows, -1)
    zero: Any = 1 << (bits - 1)
    if len(node.input) > 3 and node.input[3]:
        if constants.route(node.input[3]) is None:
            raise Malformed(f"{what}its zero points are not constant")
        points = constants.values(node.input[3])
        if points.dtype.kind == "f" or points.size != rows * -(-blocks * bits // 8):
            raise Malformed(f"{what}has {points.size} zero points, which do not fit its shape")
        points = points.reshape(rows, -1).view(np.uint8)
        if bits == 4:
            points = np.stack([points & 0xF, points >> 4], axis=-1).reshape(rows, -1)
        zero = np.repeat(points[:, :blocks], block, axis=1)
    return np.asarray((flat != zero)[:, :columns])


def _two_of_four(mask: NDArray[np.bool_]) -> bool:
    """At least two zeros in every four neighbours of a row."""
    return bool((mask.reshape(len(mask), -1, 4).sum(axis=2, dtype=np.int8) <= 2).all())


def _form(constant: Constant, use: _Use | None, dtype: str) -> str:
    if use is not None and use.packed:
        return "packed"
    # int8 counts as quantised only where something widens it; dtype differs for MatMulNBits.
    widened = use is not None and ("DequantizeLinear" in use.steps or dtype != constant.dtype)
    whole = _WIDENED.get(dtype) if widened else None
    if use is not None and use.node.op_type == "GatherBlockQuantized":
        whole = _WIDENED.get(constant.dtype)
    if whole is not None:
        return whole if constant.form == "dense" else f"{constant.form} {whole}"
    return constant.form


def _used_by(gain: float, halves: bool, form: str) -> tuple[str, ...]:
    """Who executes fewer operations because of the zeros. Nobody, most often."""
    used = []
    if gain > 1.0:
        used.append("elsa-compile's kernels (CPU)")
    if halves and form in ("dense", "coo"):
        used.append("TensorRT with trt_sparsity_enable (2:4, NVIDIA)")
    return tuple(used)


def _products(weights: list[Weight]) -> dict[str, Any]:
    """All matrices together: sizes, zeros, and Amdahl's law over them."""
    matrices = [weight for weight in weights if weight.role == "product"]
    elements = sum(weight.elements for weight in matrices)
    zeros = sum(weight.zeros or 0 for weight in matrices)
    gain = matrices_gain([(w.elements, w.dtype, w.expected_gain) for w in matrices])
    forms: dict[str, int] = {}
    for weight in matrices:
        forms[weight.form] = forms.get(weight.form, 0) + 1
    return {
        "matrices": len(matrices),
        "elements": elements,
        "zeros": zeros,
        "sparsity": zeros / max(elements, 1),
        "forms": forms,
        "expected_gain": gain,
    }
