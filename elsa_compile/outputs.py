"""The place where a compilation's files go: checked before work starts, filled at its end.

Everything is written into a hidden folder beside the output and renamed into place when it is
complete and verified. A run that fails, or is interrupted, leaves what was there before.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from elsa_compile.errors import UserInputError
from elsa_compile.onnx_save import remove_stale

REPORT = "elsa_report.json"
# What a compilation may replace in the output's folder. A file of these names that no compilation
# put there belongs to somebody else.
_COMPANIONS = ("config.json", "tokenizer.json", "tokenizer_config.json", "genai_config.json")


def check_output(path: Path, source: Path | None = None) -> None:
    """Refuse an output that could not be written at the end, or would destroy other files.

    Args:
        path: the .onnx file to write; missing folders are made later.
        source: the model's own folder; the output may lie in it.

    Raises:
        UserInputError: no .onnx name, no folder that can be written, a foreign file in the way.
    """
    if path.suffix != ".onnx":
        raise UserInputError(f"-o {path}: the output must be named *.onnx, as in build/model.onnx")
    if path.is_dir():
        raise UserInputError(f"-o {path} is a folder; name a file, as in {path / 'model.onnx'}")
    folder = path.parent
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserInputError(f"-o {path}: {existing} is no folder")
    try:
        probe = existing / f".elsa-{secrets.token_hex(4)}"
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise UserInputError(
            f"-o {path}: {existing} cannot be written: {error.strerror or error}"
        ) from None
    if (folder / REPORT).exists() or (source is not None and _same(folder, source)):
        return
    for name in _COMPANIONS:
        if (folder / name).exists():
            raise UserInputError(
                f"-o {path}: {folder} holds a {name} that does not come from a compilation and "
                "would be replaced; choose a folder of its own for the output"
            )


def _same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.resolve() == b.resolve()


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A hidden folder beside the output, gone when the block is left, in whatever way.

    Raises:
        UserInputError: it cannot be made.
    """
    made = _missing(path.parent)
    folder = path.parent / f".{path.stem}-{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserInputError(
            f"-o {path}: {path.parent} cannot be written: {error.strerror or error}"
        ) from None
    try:
        yield folder
    except OSError as error:
        raise UserInputError(
            f"cannot write {path}: {error.strerror or error}; the previous output, if any, is "
            "untouched"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:  # folders that only this run made, when nothing came of it
            with contextlib.suppress(OSError):
                parent.rmdir()


def work_folder(path: Path) -> Path:
    """Where an interrupted run leaves what the same command goes on from; may not exist."""
    return path.with_name(f"{path.name}.resume")


def remove_work(path: Path) -> None:
    """Delete the work folder of a run that is complete."""
    shutil.rmtree(work_folder(path), ignore_errors=True)


def _missing(folder: Path) -> list[Path]:
    """Folders that do not exist yet, innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    return missing


def publish(folder: Path, path: Path) -> list[Path]:
    """Move every staged file to its place; the model file comes last.

    Args:
        folder: the staging folder; its model file has the name of `path`.
        path: the output.

    Returns:
        The files, the model first.
    """
    names = sorted((f.name for f in folder.iterdir()), key=lambda name: (name == path.name, name))
    data = None
    for name in names:
        if name.startswith(f"{path.name}.") and name.endswith(".data"):
            data = path.parent / name
        os.replace(folder / name, path.parent / name)
    remove_stale(path, data)
    return [path.parent / name for name in reversed(names)]
