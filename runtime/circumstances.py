"""What figures were measured on, and with which versions: beside every measurement."""

import platform
from pathlib import Path
from typing import Any

import numpy as np

from elsa_compile.runtime.session import usable_cores


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {"cpu": model, "cores": usable_cores(), "system": platform.platform()}


def versions() -> dict[str, str]:
    """Versions of everything that computes."""
    import onnxruntime

    from elsa_compile import __version__

    return {
        "elsa-compile": __version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
