"""The forms a model can have on disk, side by side: bytes, what runs them, how to deploy them.

Sizes of forms that a file does not have are by formula: of COO with indices as varints as a writer
would choose them, of packed ones by docs/packed-format.md, int8 with a float32 scale a row.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elsa_compile.runtime.onnx_file import ModelFile
from elsa_compile.runtime.onnx_tensors import DTYPES

if TYPE_CHECKING:
    from elsa_compile.runtime.explain import Weight

# Parts of a file that are compressed to tell how far all of it would be.
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
# At the peak, measured with onnxruntime 1.31: positions of entries, and copies of the dense weight
# (docs/packed-format.md).
_DECODE_BYTES, _DECODE_COPIES = 17, 3

DEPLOY: dict[str, dict[str, str]] = {
    "dense": {
        "runs": "any onnxruntime, on CPU and GPU; onnxruntime-genai; every other ONNX tool",
        "speed": "dense",
        "how": "elsa-run unpack MODEL -o OUT.onnx (of a packed file)",
    },
    "coo": {
        "runs": "any onnxruntime and onnxruntime-genai; made dense while loading",
        "speed": "dense; with elsa-compile's provider that of packed weights",
        "how": "elsa-compile's default, or elsa-run unpack --form coo",
    },
    "packed": {
        "runs": "any onnxruntime, CPU and GPU; onnxruntime-genai; decoded to dense while loading",
        "speed": "dense; with elsa-compile's provider (CPU) packed in memory too",
        "how": "elsa-compile --format packed, or elsa-run pack MODEL -o OUT.onnx",
    },
    "packed int8": {
        "runs": "as packed",
        "speed": "onnxruntime's int8; with elsa-compile's provider sparse int8",
        "how": "elsa-compile --quantize int8 --format packed",
    },
}


@dataclass(frozen=True)
class Entry:
    """One weight: entries, those that are not zero, rows, and bits of a value."""

    elements: int
    nonzeros: int
    rows: int
    bits: int


def form_bytes(entries: Iterable[Entry]) -> dict[str, int]:
    """Bytes of weights in each form, every weight in the smaller of that form and dense.

    Example: 64 x 64 float32 with 410 non-zeros: dense 16384, coo 2460, packed 2156, packed int8
    1179.
    """
    total = dict.fromkeys(DEPLOY, 0)
    for entry in entries:
        dense = -(-entry.elements * entry.bits // 8)
        values = -(-entry.nonzeros * entry.bits // 8)
        mask = -(-entry.elements // 8)
        index = 1 if entry.elements <= 1 << 7 else -(-(entry.elements - 1).bit_length() // 7)
        total["dense"] += dense
        # Varints of a linear index; int4 has no sparse form.
        total["coo"] += dense if entry.bits < 8 else min(dense, values + entry.nonzeros * index)
        total["packed"] += min(dense, mask + values + -(-entry.bits // 8))
        whole = min(entry.elements, mask + entry.nonzeros + 1) + 4 * entry.rows
        total["packed int8"] += min(dense, whole) if entry.bits >= 8 else dense
    return total


def archive_bytes(paths: Iterable[Path]) -> int:
    """About what a zip of these files takes, from 64 samples of each of them."""
    total = 0.0
    for path in paths:
        size = path.stat().st_size
        if not size:
            continue
        step = max(_SAMPLE_BYTES, size // _SAMPLES)
        read = compressed = 0
        with path.open("rb") as file:
            for start in range(0, size, step):
                file.seek(start)
                part = file.read(_SAMPLE_BYTES)
                read += len(part)
                compressed += len(zlib.compress(part, 6))
        total += size * compressed / read
    return round(total)


def decode_bytes(packed: Iterable[tuple[int, int]]) -> int:
    """Memory that stock onnxruntime needs at the peak to decode packed weights while loading.

    Args:
        packed: entries and bits of a value of each.
    """
    return sum(
        elements * _DECODE_BYTES + elements * bits * _DECODE_COPIES // 8
        for elements, bits in packed
    )


def dtype_bits(dtype: str) -> int:
    """Bits of a value: 32 of "float32", 4 of "int4"."""
    return next((each.bits for each in DTYPES.values() if each.name == dtype), 32)


def forms_table(weights: Mapping[str, int], now: str, archive: int) -> list[dict[str, Any]]:
    """One row a form: form, bytes, now (whether the file has it), runs, speed, how.

    Args:
        weights: of `form_bytes`.
        now: form most of the file has.
        archive: of `archive_bytes`.
    """
    rows: list[dict[str, Any]] = [
        {"form": form, "bytes": size, "now": form == now, **DEPLOY[form]}
        for form, size in weights.items()
    ]
    rows.append(
        {
            "form": "this file, zipped",
            "bytes": archive,
            "now": False,
            "runs": "nothing: for the way there",
            "speed": "-",
            "how": "zip",
        }
    )
    return rows


def of_model(file: ModelFile, weights: Sequence["Weight"]) -> dict[str, Any]:
    """For JSON: forms (`forms_table`) of a checked file, and decode_bytes of its packed weights."""
    entries = []
    packed = []
    held: dict[str, int] = {}
    for each in weights:
        bits = dtype_bits(each.dtype)
        nonzeros = each.elements - (each.zeros or 0)
        entries.append(Entry(each.elements, nonzeros, each.rows or each.shape[0], bits))
        held[each.form] = held.get(each.form, 0) + each.elements
        if each.form.startswith("packed"):
            packed.append((each.elements, bits))
    most = max(held, key=lambda form: held[form], default="dense")
    archive = archive_bytes([file.path, *file.external_paths])
    return {
        "forms": forms_table(form_bytes(entries), most, archive),
        "decode_bytes": decode_bytes(packed),
    }
