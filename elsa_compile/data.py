"""Samples for calibration and evaluation, and perplexity on the torch side.

Text becomes token windows by the one protocol of `elsa_compile.runtime.text`, which the onnxruntime
side uses too, so that figures are comparable to the last digit.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from elsa_compile.documents import head, is_dataset_name, is_plain_text
from elsa_compile.errors import UserInputError
from elsa_compile.program import Program
from elsa_compile.runtime import text


@dataclass(frozen=True)
class Samples:
    """Inputs to calibrate or train on.

    Attributes:
        inputs: per sample a mapping from input name to tensor with a batch dimension.
        source: where they came from, for the report.
    """

    inputs: tuple[dict[str, Tensor], ...]
    source: str

    def take(self, count: int, seed: int) -> "Samples":
        """At most `count` samples, spread evenly over the source from a seeded offset."""
        total = len(self.inputs)
        if count >= total:
            return self
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(total, generator=generator)[:count].sort().values
        return Samples(tuple(self.inputs[int(i)] for i in chosen), self.source)


CALIBRATION_CHARACTERS = 4 << 20  # read of a corpus that is no plain text, for calibration


def text_samples(
    program: Program, path: Path, window: int | None = None, bos: str = "auto"
) -> Samples:
    """Windows of a text, tokenised with the model's own tokenizer.

    Plain text is read whole; of JSON lines, gzip and datasets the first documents, about 4 Mi
    characters, a million tokens.
    """
    if is_plain_text(path):
        windows = text_windows(program, path, window, bos=bos)
    else:
        content = head(path, CALIBRATION_CHARACTERS)
        windows = _windows(program, path, content, window, None, bos)
    rows = tuple({"input_ids": torch.from_numpy(row)[None]} for row in windows)
    return Samples(rows, path.name)


def text_windows(
    program: Program,
    path: Path,
    window: int | None = None,
    max_windows: int | None = None,
    bos: str = "auto",
) -> Any:
    """Token windows (W, window) int64 of a text file as numpy, by the protocol of runtime.text."""
    return _windows(program, path, evaluation_text(path), window, max_windows, bos)


def evaluation_text(path: Path) -> str:
    """A plain text file, whole; perplexity is of plain text, here and in onnxruntime.

    Raises:
        UserInputError: it cannot be read, or is no plain text.
    """
    if not is_plain_text(path):
        raise UserInputError(
            f"{path}: perplexity is measured on plain text, so that elsa-run can measure it too; "
            "write the text of its documents to a .txt file"
        )
    return text.read_text(path)


def _windows(
    program: Program, path: Path, content: str, window: int | None, most: int | None, bos: str
) -> Any:
    if program.folder is None:
        raise UserInputError(
            f"{path}: text needs the model's tokenizer, but {program.source} comes without one; "
            "give the folder that holds tokenizer.json with --tokenizer"
        )
    tokenizer = text.Tokenizer(program.folder)
    start = text.bos_token(tokenizer, bos)
    length = window or text.default_window(program.config or {})
    ids = tokenizer.encode(content)
    try:
        windows = text.windows(ids, length, most, start)
    except UserInputError as error:
        raise UserInputError(f"{path}: {error}") from None
    size = (program.config or {}).get("vocab_size")
    if size and int(windows.max()) >= int(size):
        raise UserInputError(
            f"{path}: the tokenizer gives token {int(windows.max())}, but the model knows {size}; "
            "is this the model's own tokenizer?"
        )
    return windows


def array_samples(program: Program, path: Path) -> Samples:
    """Samples from an .npz or .safetensors file: one array an input name, first axis = samples."""
    import numpy

    try:
        if path.suffix == ".npz":
            with numpy.load(path, allow_pickle=False) as archive:
                arrays = {name: torch.from_numpy(archive[name]) for name in archive.files}
        else:
            from safetensors.torch import load_file

            arrays = load_file(path)
    except FileNotFoundError:
        raise UserInputError(f"data file {path} does not exist") from None
    except Exception as error:
        raise UserInputError(f"data file {path} cannot be read: {error}") from None
    wanted = program.signature.input_names
    if set(arrays) != set(wanted):
        raise UserInputError(
            f"{path} holds inputs {sorted(arrays)}, but the model takes {sorted(wanted)}"
        )
    counts = {len(value) for value in arrays.values()}
    if len(counts) != 1 or 0 in counts:
        raise UserInputError(f"{path}: its arrays hold {sorted(counts)} samples, wanted one number")
    rows = range(counts.pop())
    return Samples(tuple({n: arrays[n][i : i + 1] for n in wanted} for i in rows), path.name)


def load_samples(
    program: Program, path: Path, window: int | None = None, bos: str = "auto"
) -> Samples:
    """Samples from a file, by what it is: text for language models, arrays for any model."""
    if holds_arrays(path):
        return array_samples(program, path)
    if program.kind == "generic":
        raise UserInputError(
            f"{path}: this model takes {', '.join(program.signature.input_names)}, not text; give "
            "an .npz or .safetensors file with one array for each input"
        )
    return text_samples(program, path, window, bos)


def holds_arrays(path: Path) -> bool:
    """True for a file that holds arrays by input name, by its suffix."""
    return path.suffix in (".npz", ".safetensors") and not is_dataset_name(path)


def python_samples(program: Program, batches: Iterable[Any]) -> Samples:
    """Samples from Python: tensors (first input), tuples (all inputs) or dicts by input name."""
    names = program.signature.input_names
    rows: list[dict[str, Tensor]] = []
    for batch in batches:
        if isinstance(batch, Tensor):
            row = {names[0]: batch}
        elif isinstance(batch, (tuple, list)):
            row = dict(zip(names, batch, strict=False))
        elif hasattr(batch, "items"):
            row = {key: value for key, value in batch.items() if key in names}
        else:
            raise UserInputError(
                f"data holds a {type(batch).__name__}, wanted tensors, tuples or dicts of tensors"
            )
        rows.append(
            {k: v[None] if k == "input_ids" and v.dim() == 1 else v for k, v in row.items()}
        )
    if not rows:
        raise UserInputError("data is empty, wanted at least one batch")
    return Samples(tuple(rows), "python")


def graph_inputs(program: Program, row: dict[str, Tensor]) -> tuple[Any, ...]:
    """All flat inputs of the traced graph for one sample; absent ones are filled in.

    Masks are all ones, positions count up, type ids and the past are empty (0 tokens).
    """
    flat_examples = pytree.tree_leaves(program.signature.args)
    first = row[program.signature.input_names[0]] if program.signature.input_names else None
    filled: list[Any] = []
    for name, example in zip(program.signature.input_names, flat_examples, strict=True):
        if name in row:
            filled.append(row[name].to(example.dtype))
        elif name == "attention_mask" and first is not None:
            filled.append(torch.ones_like(first))
        elif name == "token_type_ids" and first is not None:
            filled.append(torch.zeros_like(first))
        elif name == "position_ids" and first is not None:
            filled.append(torch.arange(first.shape[1]).expand(first.shape).contiguous())
        elif name.startswith("past_key_values") and first is not None:
            shape = (first.shape[0], example.shape[1], 0, example.shape[3])
            filled.append(torch.zeros(shape, dtype=example.dtype))
        else:
            raise UserInputError(f"data gives no value for the input {name!r}")
    return tuple(filled)


def run_row(program: Program, row: dict[str, Tensor]) -> list[Tensor]:
    """Flat outputs of the traced graph for one sample."""
    flat = graph_inputs(program, row)
    _, spec = pytree.tree_flatten(program.signature.args)
    args = pytree.tree_unflatten(list(flat), spec)
    return list(pytree.tree_leaves(program.run(*args)))


def logits(program: Program, input_ids: Tensor) -> Tensor:
    """Logits (B, S, V) of a language model for input_ids (B, S), from its module if it has one."""
    if program.module is not None and program.kind == "decoder":
        with torch.inference_mode():
            out: Tensor = program.module(input_ids=input_ids, use_cache=False).logits
            return out
    return run_row(program, {"input_ids": input_ids})[0]


def sequence_nll(scores: Tensor, ids: Tensor) -> float:
    """Summed negative log-likelihood of ids[1:] under scores (S, V); ids: (S,).

    In slices of 64 rows: a vocabulary of 262 k makes 512 rows of float32 logits 537 MB.
    """
    total = 0.0
    for start in range(0, len(ids) - 1, 64):
        stop = min(start + 64, len(ids) - 1)
        rows = scores[start:stop].float()
        total += float(
            torch.nn.functional.cross_entropy(rows, ids[start + 1 : stop + 1], reduction="sum")
        )
    return total


def perplexity(program: Program, windows: Any, progress: Any = None) -> dict[str, Any]:
    """Perplexity of the torch program over token windows (W, window) int64 numpy."""
    started = time.perf_counter()
    ids = torch.from_numpy(windows)
    total = 0.0
    for row in ids:
        total += sequence_nll(logits(program, row[None])[0], row)
        if progress is not None:
            progress.advance()
    count = int(ids.shape[0] * (ids.shape[1] - 1))
    mean = total / count
    return {
        "perplexity": math.exp(min(mean, 700.0)),
        "nll": mean,
        "windows": int(ids.shape[0]),
        "window": int(ids.shape[1]),
        "tokens": count,
        "seconds": time.perf_counter() - started,
    }


def is_language_model(program: Program) -> bool:
    """True when perplexity makes sense: token ids in, (B, S, V) scores first out."""
    if program.kind == "decoder":
        return True
    names: Sequence[str] = program.signature.input_names
    return program.kind == "generic" and "input_ids" in names and program.folder is not None


def require_language_model(program: Program, what: str) -> None:
    """Raise UserInputError, starting with `what`, for a model that has no perplexity."""
    if is_language_model(program):
        return
    if program.kind == "generic" and "input_ids" in program.signature.input_names:
        raise UserInputError(
            f"{what} measures perplexity on text, but {program.source} comes without a tokenizer; "
            "give the folder that holds tokenizer.json with --tokenizer"
        )
    raise UserInputError(
        f"{what} measures perplexity, but {program.source} is no causal language model; leave it "
        "out"
    )
