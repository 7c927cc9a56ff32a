"""elsa-compile: a compiler for sparsity. PyTorch model in, small and fast ONNX model out."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Everything else is imported on first use: `elsa-compile --help` must not wait for torch,
# and `elsa_compile.runtime` must work where torch is not installed.
_HOMES = {
    "apply": "elsa_compile.single_pass",
    "compile": "elsa_compile.compiler",
    "CompileResult": "elsa_compile.compiler",
    "load": "elsa_compile.frontend",
    "Program": "elsa_compile.program",
    "Recipe": "elsa_compile.recipe",
    "ElsaError": "elsa_compile.errors",
}
__all__ = [
    "CompileResult",
    "ElsaError",
    "Program",
    "Recipe",
    "__version__",
    "apply",
    "compile",
    "load",
]

if TYPE_CHECKING:
    from elsa_compile.compiler import CompileResult, compile
    from elsa_compile.errors import ElsaError
    from elsa_compile.frontend import load
    from elsa_compile.program import Program
    from elsa_compile.recipe import Recipe
    from elsa_compile.single_pass import apply


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'elsa_compile' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
