"""The passes that ship with elsa-compile; importing this package registers them."""

if __name__ != "elsa_compile.passes":
    raise ImportError("import it as 'elsa_compile.passes'; 'passes' alone is not a package")
