"""Runs compiled models: needs onnxruntime and numpy, neither torch nor transformers."""

if __name__ != "elsa_compile.runtime":
    raise ImportError("import it as 'elsa_compile.runtime'; 'runtime' alone is not a package")
