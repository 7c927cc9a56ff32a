"""The errors of the compiler; their exit codes are the command line's."""

from elsa_compile.runtime.errors import (
    ElsaError,
    UnsupportedModelError,
    UserInputError,
    VerificationError,
)

__all__ = ["ElsaError", "UnsupportedModelError", "UserInputError", "VerificationError"]
