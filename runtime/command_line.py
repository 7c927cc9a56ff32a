"""What `elsa-compile` and `elsa-run` have in common: complaints, exit codes, JSON, options.

Every failure is one sentence on standard error. With --json there is exactly one object on standard
output, of the result or of the failure; an interrupted command prints none.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from elsa_compile.runtime.errors import ElsaError, UserInputError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one sentence, like all others."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Options are written out: what a prefix means changes when an option is added."""
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UserInputError(f"{message}; see {self.prog} --help")


def run_command(
    name: str,
    run: Callable[[list[str]], int],
    argv: Sequence[str] | None,
    *,
    interrupted: str = "interrupted",
    out_of_memory: str = "out of memory; use a smaller window, batch or model",
) -> int:
    """Run a command and turn what it raises into a sentence and an exit code.

    Args:
        name: of the program, in front of each sentence.
        run: arguments -> exit code.
        argv: arguments; those of the process when None.
        interrupted: the sentence after Ctrl-C.
        out_of_memory: the sentence when memory ran out.

    Returns:
        0 done, 2 input, 3 verification failed, 4 not supported, 130 interrupted, 141 when nobody
        reads the output any more, 1 for an error of our own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    def fail(message: str, code: int) -> int:
        line = " ".join(message.split())
        print(f"{name}: {line}", file=sys.stderr)
        if "--json" in arguments and code != 130:
            print_json({"error": line, "exit_code": code})
        return code

    try:
        code = run(arguments)
        sys.stdout.flush()
        return code
    except ElsaError as error:
        return fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return fail(interrupted, 130)
    except BrokenPipeError:
        # Whoever read us has gone, `| head` for one; the final flush must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError:
        return fail(out_of_memory, 2)
    except Exception as error:
        if os.environ.get("ELSA_DEBUG"):
            raise
        if "can't allocate memory" in str(error) or "out of memory" in str(error):
            return fail(out_of_memory, 2)
        reason = f"{type(error).__name__}: {error}"
        said = f"internal error ({reason}); set ELSA_DEBUG=1 for the traceback and report it"
        return fail(said, 1)


def add_windows(parser: Any, default: str) -> None:
    """The options of the perplexity protocol."""
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="tokens a window; default 512, or the model's longest input",
    )
    parser.add_argument(
        "--max-windows", type=int, metavar="N", help=f"windows to measure on, {default}"
    )
    parser.add_argument(
        "--bos",
        default="auto",
        choices=("auto", "yes", "no"),
        help="start each window with BOS; auto: as the tokenizer does",
    )


def print_json(value: dict[str, Any]) -> None:
    """One object; NaN and infinity, which are no JSON, become null."""
    print(json.dumps(_finite(value), ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
