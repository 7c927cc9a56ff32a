"""Snapshots of a training run: atomic, bounded in number, refused when they are another run's.

A snapshot is one .safetensors file: tensors, and in its metadata the step, the history and the
run's identity as JSON. Nothing in it is code, so an old folder is safe to open.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from elsa_compile.errors import UserInputError

KEPT = 2  # the newest, and one before it in case the newest is the one that went wrong


@dataclass(frozen=True)
class Snapshot:
    """One state of a run.

    Attributes:
        step: steps done.
        tensors: everything needed to go on, by name.
        notes: plain data: history, counters.
    """

    step: int
    tensors: dict[str, Tensor]
    notes: dict[str, Any]


class Snapshots:
    """The snapshots of one run in a folder of their own.

    Attributes:
        folder: made at the first `save`.
        identity: what must be equal for a snapshot to be this run's: options, weights, data.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any]) -> None:
        """Nothing is written yet; without a folder, into a temporary one that `close` deletes."""
        self._temporary = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="elsa-"))
        self.identity: dict[str, Any] = json.loads(json.dumps(identity, default=str))

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot under a temporary name, rename it, then drop old ones.

        Raises:
            UserInputError: the place cannot be written, or is full.
        """
        notes = {"step": snapshot.step, "identity": self.identity, "notes": snapshot.notes}
        final = self.folder / f"step-{snapshot.step:08d}.safetensors"
        part = final.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: t.detach().contiguous() for name, t in snapshot.tensors.items()}
            save_file(tensors, part, metadata={"elsa_snapshot": json.dumps(notes)})
            with part.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(part, final)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise UserInputError(
                f"snapshot {final} cannot be written: {error}; free some space or write the output "
                "elsewhere"
            ) from None
        for old in self._files()[:-KEPT]:
            old.unlink(missing_ok=True)

    def latest(self, device: torch.device) -> Snapshot | None:
        """The newest readable snapshot of this run, or None.

        Raises:
            UserInputError: it belongs to a run with other options, weights or data.
        """
        for path in reversed(self._files()):
            try:
                with safe_open(path, framework="pt", device=str(device)) as file:
                    content = json.loads(file.metadata()["elsa_snapshot"])
                    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError, KeyError, TypeError, ValueError):
                continue  # cut off while it was written by something less careful than `save`
            self._check(path, content["identity"])
            return Snapshot(int(content["step"]), tensors, content["notes"])
        return None

    def _check(self, path: Path, found: dict[str, Any]) -> None:
        differences = _differences(found, self.identity)
        if differences:
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            raise UserInputError(
                f"{path.parent} holds the snapshot of another run: {differences[0]}{more}; undo "
                f"the change to go on with it, or delete the folder to start anew"
            )

    def close(self) -> None:
        """Delete a temporary folder; one that was given stays, for whoever gave it."""
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors")) if self.folder.is_dir() else []


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What two runs do not have in common, in words; of tables the entries, not the whole."""
    told = []
    for key in sorted({*found, *wanted}):
        was, now = found.get(key), wanted.get(key)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            told += [f"{key}: {each}" for each in _differences(was, now)]
        else:
            told.append(f"{key} was {was!r} and is {now!r}")
    return told


def fingerprint(named: list[tuple[str, Tensor]]) -> str:
    """A short text that differs when names, shapes or values differ."""
    digest = hashlib.sha256()
    for name, value in named:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
