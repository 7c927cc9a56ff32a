"""What a token of the dense model costs, measured where it will run: for passes that plan by it."""

import tempfile
from pathlib import Path

from elsa_compile import export as export_module
from elsa_compile.program import Program
from elsa_compile.runtime.decode_cost import DecodeCost, measure_decode_cost


def measure(program: Program, context: int, threads: int | None) -> DecodeCost:
    """Export a program as it is now to a temporary file and time it in onnxruntime.

    Args:
        program: a decoder, dense so far; not changed.
        context: tokens before the one that is timed.
        threads: of onnxruntime; None for all cores.

    Raises:
        UnsupportedModelError: it cannot be exported.
    """
    with tempfile.TemporaryDirectory(prefix="elsa-latency-") as folder:
        path = Path(folder) / "model.onnx"
        export_module.export(program, path, mode="never")
        return measure_decode_cost(path, context, threads)
