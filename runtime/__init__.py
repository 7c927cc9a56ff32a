"""Runs compiled models: needs onnxruntime and numpy, neither torch nor transformers."""

if __name__ != "elsa_compile.runtime":
    raise ImportError("import it as 'elsa_compile.runtime'; 'runtime' alone is not a package")

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elsa_compile.runtime.provider import get_ep_names, get_library_path
    from elsa_compile.runtime.session import session

__all__ = ["get_ep_names", "get_library_path", "session"]


def __getattr__(name: str) -> Any:
    """The public functions, loaded when they are asked for: --help must not wait for numpy."""
    if name == "session":
        import importlib

        return importlib.import_module("elsa_compile.runtime.session")  # which can be called
    if name in __all__:
        from elsa_compile.runtime import provider

        return getattr(provider, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
