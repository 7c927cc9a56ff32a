"""What can go wrong, by exit code. Shared by the compiler and the runtime."""


class ElsaError(Exception):
    """A failure the user can act on. Its text is one sentence: where, found, wanted, what to do."""

    exit_code = 2


class UserInputError(ElsaError):
    """The input, an option or a file is not what it must be (exit code 2)."""


class VerificationError(ElsaError):
    """The result was produced but does not compute what the source computes (exit code 3)."""

    exit_code = 3


class UnsupportedModelError(ElsaError):
    """The model is sound, but this release cannot compile or run it (exit code 4)."""

    exit_code = 4
