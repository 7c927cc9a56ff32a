"""What sparse weights gain in decoding (one token), by density: a table of measured kernels.

Measured in November 2026 on one thread of an Emerald Rapids machine with weights streamed from
memory, over dense float32 values: a bitmap format up to 80 or 90 % zeros, a sliced one above. Real
gains differ with processor, cache and shape: `elsa-run bench` measures them.
"""

from collections.abc import Sequence

import numpy as np

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
# Speed of one matrix over dense float32.
OVER_FP32: dict[str, tuple[float, ...]] = {
    "float32": (1.6, 2.5, 3.3, 6.0, 11.0),
    "float16": (2.0, 3.0, 4.1, 8.6, 16.0),
    "bfloat16": (2.9, 4.3, 5.2, 9.3, 17.7),
    "int8": (5.4, 7.7, 9.5, 11.6, 20.0),
    # Bound by decoding: no gain past 70 %; 80 and 95 % were not measured, the neighbours stand in.
    "int4": (7.9, 9.2, 9.2, 9.3, 9.3),
}
# Speed of dense values in onnxruntime over its float32: MatMulNBits for int8 and int4. fp16 is
# widened to float32 on the CPU.
DENSE_OVER_FP32 = {"float32": 1.0, "float16": 1.0, "bfloat16": 1.0, "int8": 4.0, "int4": 4.0}
LEAST_SPARSITY = 0.5  # below, dense is as fast or faster


def expected_gain(dtype: str, density: float) -> float:
    """Decode speed of a sparse matrix over the same values stored dense; 1 for no gain.

    Args:
        dtype: of the values.
        density: fraction that is not zero.

    Example: expected_gain("float32", 0.3) -> 2.5; of int8 7.7 / 4.0, since dense int8 is four times
    as fast as float32 itself.
    """
    name = {"uint8": "int8", "uint4": "int4"}.get(dtype, dtype)
    if name not in OVER_FP32 or 1 - density < LEAST_SPARSITY - 1e-9:
        return 1.0
    # Above 95 % nothing was measured, so nothing more is promised.
    over = float(np.interp(1 - density, SPARSITIES, OVER_FP32[name]))
    return max(1.0, over / DENSE_OVER_FP32[name])


def matrices_gain(matrices: Sequence[tuple[int, str, float]]) -> float:
    """Gain of several matrices one after the other, each of (elements, dtype, own gain).

    Example: half of all elements three times as fast, the rest as before: 1.5 = 1 / (1/6 + 1/2).
    """
    before = after = 0.0
    for elements, dtype, gain in matrices:
        seconds = elements / DENSE_OVER_FP32.get(dtype, 1.0)
        before += seconds
        after += seconds / gain
    return before / after if after else 1.0
