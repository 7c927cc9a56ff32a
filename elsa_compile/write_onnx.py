"""The last stage of an export: a dense model from torch.onnx -> the files on disk.

    store -> names -> layout -> merged products -> whole numbers -> half precision -> forms -> files

Each step has its module; nothing after this may touch the model, since most tools drop sparse
initializers without a word.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import onnx_ir as ir

from elsa_compile.errors import UserInputError
from elsa_compile.onnx_layout import HALVES, store_transposed, weights_to_half
from elsa_compile.onnx_merge import merge_parallel
from elsa_compile.onnx_metadata import set_metadata, strip_traces
from elsa_compile.onnx_names import merge_tied, resolve_weights, weight_names
from elsa_compile.onnx_save import save
from elsa_compile.packed_encoding import encode_packed
from elsa_compile.quantised_weights import QuantisedWeight, quantise
from elsa_compile.sparse_encoding import IN_FILE_LIMIT_BYTES, Mode, encode
from elsa_compile.weight_store import StorageRecord, WeightStore

log = logging.getLogger(__name__)

Dtype = Literal["fp32", "fp16", "bf16"]
Format = Literal["plain", "packed"]


@dataclass(frozen=True)
class WriteResult:
    """What was written.

    Attributes:
        records: one for every initializer, in the order of the file.
        model_bytes: size of the .onnx file.
        data_bytes: size of the data file beside it; 0 when there is none.
        paths: the .onnx file and, if there is one, its data file.
        notes: sentences for people about weights that could not be stored as wished.
        merged: initializers that hold several weights, side by side along their outputs.
    """

    records: tuple[StorageRecord, ...]
    model_bytes: int
    data_bytes: int
    paths: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    merged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def write_onnx(
    model: ir.Model,
    path: Path,
    *,
    dtype: Dtype = "fp32",
    mode: Mode = "auto",
    format: Format = "plain",
    metadata: Mapping[str, str] | None = None,
    expected_weights: Collection[str] | Mapping[str, Collection[str]] | None = None,
    quantised: Mapping[str, QuantisedWeight] | None = None,
    parallel: Iterable[tuple[str, ...]] = (),
    in_file_limit_bytes: int = IN_FILE_LIMIT_BYTES,
) -> WriteResult:
    """Write a model with its weights laid out as they are used, cast and sparse-encoded.

    The graph of `model` is not changed and its tensors are only read; change none meanwhile.
    Memory: views of the tensors and blocks of a few dozen MiB. A tensor that is not in host memory
    is copied there.

    Args:
        model: what `torch.onnx.export(...).model` gives, dense. Export with optimize=False and
            let `onnxscript.optimizer.optimize_ir` keep the Transposes of weights (should_fold):
            else small weights lose their names, and a tied one is stored twice.
        path: the .onnx file, in an existing folder.
        dtype: "fp16" and "bf16" store the weights in two bytes with a Cast to fp32 behind;
            inputs, outputs and arithmetic stay fp32. "fp32" stores what the model holds.
        mode: "auto" takes the smallest legal form of each weight, "always" COO wherever it is
            legal, "never" none.
        format: "packed" also packs weights, where that is smallest (docs/packed-format.md).
        metadata: entries of metadata_props.
        expected_weights: the names of all weights of the model. A mapping gives for each the other
            names it may have in the graph; it is stored under its key. Default: what matrix
            products, convolutions and lookups read. Nothing else is cast or sparse.
        quantised: weights to store as whole numbers and scales, by their expected names.
        parallel: groups of expected weights that read one input, to be stored as one matrix each.
        in_file_limit_bytes: data go to a file beside a model that would be larger.

    Raises:
        UserInputError: an unknown dtype, mode or format; a place that cannot be written or is
            full; a value that the dtype cannot hold.
        UnsupportedModelError: an expected weight is not in the graph, or the graph is too large.
    """
    _check_options(dtype, mode, format)
    store = WeightStore.from_ir(model)
    strip_traces(store.model)
    set_metadata(store.model, metadata or {})
    tied = merge_tied(store)
    names = None if expected_weights is None else resolve_weights(store, expected_weights, tied)
    notes = store_transposed(store)
    if names is None:
        names = weight_names(store)
    notes += [f"{name}: left out, nothing in the graph reads it" for name in _absent(names, store)]
    names = [name for name in names if name in store.weights]
    whole = dict(quantised or {})
    merged, apart = merge_parallel(store, parallel, whole)
    gone = {part for parts in merged.values() for part in parts}
    names = [*(name for name in names if name not in gone), *merged]
    notes += apart + quantise(store, whole, 2 if dtype in HALVES else 4)
    if dtype in HALVES:
        notes += weights_to_half(store, names, dtype)
    choose = encode_packed if format == "packed" else encode
    records = choose(store, mode, names, in_file_limit_bytes)
    for note in notes:
        log.debug("%s", note)
    saved = save(store, path)
    return WriteResult(
        records=tuple(records),
        model_bytes=saved.model_bytes,
        data_bytes=saved.data_bytes,
        paths=(saved.model,) if saved.data is None else (saved.model, saved.data),
        notes=tuple(notes),
        merged=merged,
    )


def _check_options(dtype: str, mode: str, format: str) -> None:
    options = (("dtype", dtype, Dtype), ("mode", mode, Mode), ("format", format, Format))
    for option, given, known in options:
        if given not in get_args(known):
            raise UserInputError(
                f"write_onnx: {option} is {given!r}, wanted one of {', '.join(get_args(known))}"
            )


def _absent(names: Collection[str], store: WeightStore) -> list[str]:
    return [name for name in names if name not in store.weights]
