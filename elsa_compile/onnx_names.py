"""Which initializers of the exported graph are the model's weights, and under which names.

The exporter names a tied weight by whichever of its names it met, prefixes all names with the
module that was exported, and folding renames a weight beyond recognition. What the rest of the
compiler calls a weight is restored here, once; a weight that cannot be found is an error, since it
would silently be stored dense.
"""

from collections.abc import Collection, Mapping

from onnx import TensorProto

from elsa_compile.errors import UnsupportedModelError
from elsa_compile.weight_store import (
    Use,
    WeightStore,
    find_uses,
    forget_values,
    pinned,
    rename_reads,
    tensor_type,
    value_names,
)

_WEIGHT_TYPES = frozenset(
    {
        *(TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE),
        *(TensorProto.INT8, TensorProto.UINT8),
    }
)
_WEIGHT_SLOTS: dict[str, frozenset[int]] = {
    "MatMul": frozenset({0, 1}),
    "Gemm": frozenset({0, 1}),
    "Conv": frozenset({1}),
    "ConvTranspose": frozenset({1}),
    "Gather": frozenset({0}),
    "LSTM": frozenset({1, 2}),
    "GRU": frozenset({1, 2}),
    "RNN": frozenset({1, 2}),
    "MatMulInteger": frozenset({0, 1}),
    "ConvInteger": frozenset({1}),
    "QLinearMatMul": frozenset({0, 3}),
    "QLinearConv": frozenset({3}),
}
_PASSED_THROUGH = frozenset(
    {"Transpose", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Cast", "DequantizeLinear"}
)


def weight_names(store: WeightStore) -> list[str]:
    """The initializers, at least 2-D, that a matrix product, convolution or lookup reads.

    Layout operations, casts and dequantisation may stand between. Shape constants, masks, rotary
    tables, norms and biases are not among them.
    """
    uses = find_uses(store.graph)
    return [
        name
        for name, weight in store.weights.items()
        if weight.array.ndim > 1
        and tensor_type(weight.dtype) in _WEIGHT_TYPES
        and _read_as_weight(name, uses)
    ]


def _read_as_weight(name: str, uses: dict[str, list[Use]]) -> bool:
    for use in uses.get(name, []):
        node = use.node
        if use.slot in _WEIGHT_SLOTS.get(node.op_type, ()):
            return True
        passed = use.slot == 0 and node.op_type in _PASSED_THROUGH
        if passed and _read_as_weight(node.output[0], uses):
            return True
    return False


def merge_tied(store: WeightStore) -> dict[str, str]:
    """Keep one initializer of those that view the same memory; returns dropped name -> kept name.

    Equal memory, shape, strides and type; graph inputs and outputs stay apart.
    """
    kept: dict[tuple[object, ...], str] = {}
    merged: dict[str, str] = {}
    for name, weight in store.weights.items():
        if weight.size == 0 or pinned(store.graph, name):
            continue
        address = weight.array.__array_interface__["data"][0]
        key = (address, weight.shape, weight.array.strides, weight.array.dtype, weight.dtype)
        first = kept.setdefault(key, name)
        if first != name:
            merged[name] = first
    for name in merged:
        del store.weights[name]
    rename_reads(store.graph, merged)
    forget_values(store.graph, merged)
    return merged


def resolve_weights(
    store: WeightStore,
    expected: Collection[str] | Mapping[str, Collection[str]],
    merged: Mapping[str, str],
) -> list[str]:
    """The initializers that hold the expected weights, renamed to what the compiler calls them.

    expected: names, or name -> the names it may go by in the graph, where the initializer then gets
    the name that is the key. merged: what `merge_tied` returned. Two names of one tied weight give
    one initializer, under the first.

    Raises:
        UnsupportedModelError: a weight is not there, or its name is taken by another value.
    """
    found: dict[str, str] = {}
    missing = []
    for name in expected:
        other_names = expected[name] if isinstance(expected, Mapping) else ()
        candidates = [merged.get(alias, alias) for alias in (name, *other_names)]
        present = next((alias for alias in candidates if alias in store.weights), None)
        if present is None:
            missing.append(name)
        else:
            found.setdefault(present, name if isinstance(expected, Mapping) else present)
    if missing:
        raise UnsupportedModelError(
            f"export: the weight {min(missing)} ({len(missing)} of {len(expected)} in all) is not "
            "an initializer of the exported graph, since an optimiser has renamed or folded it; "
            "nothing was written, and a report of the model's architecture would help"
        )
    _rename(store, {old: new for old, new in found.items() if old != new})
    return list(found.values())


def _rename(store: WeightStore, names: Mapping[str, str]) -> None:
    """Rename initializers (old -> new) in place, keeping their order in the file."""
    if not names:
        return
    taken = value_names(store.graph) | store.weights.keys()
    for old, new in names.items():
        if new in taken:
            raise UnsupportedModelError(
                f"export: the weight {old} cannot be stored as {new}, which is the name of another "
                "value of the exported graph; rename that input, output or module"
            )
    rename_reads(store.graph, names)
    for value in store.graph.value_info:
        value.name = names.get(value.name, value.name)
    store.weights = {names.get(name, name): weight for name, weight in store.weights.items()}
