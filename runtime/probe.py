"""Reference answers recorded at compile time, against which a file is checked anywhere, later.

A probe is a small JSON object, kept under the key "probe" of elsa_report.json beside the model:

    {"version": 1,
     "file": "model.onnx",        the file it belongs to
     "tolerance": 0.001,          largest |difference| allowed, times max(1, largest |reference|)
     "language": [                for language models: one entry a batch of prompts
       {"input_ids": [[5, 17, 3]],          (B, S) tokens of the prompt
        "top_ids": [[9, 2, 40, 7, 1]],      (B, 5) most probable next tokens
        "top_logits": [[3.1, 2.9, ...]],    (B, 5) their logits
        "greedy": [[9, 4, 4, 11]],          (B, G) greedy continuation
        "margins": [[0.2, 1.7, 0.9, 2]]}],  (B, G) best minus second-best logit at each of its steps
     "generic": [                 for any other model: one entry a set of inputs
       {"seed": 0,
        "inputs": {"x": {"dtype": "float32", "shape": [2, 3, 8, 8]}},   remade by `made_up`
        "outputs": {"y": {"shape": [2, 5], "at": [0, 3, 9], "values": [0.1, ...]}}}]}

The compiler makes one from its source model (`language_probe`, `generic_probe`), `compare` checks a
session against it. A greedy token may differ where its margin is within the tolerance: a tie is
decided by rounding. From there on the sequences are different ones and are not compared.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime.decoder import Decoder
from elsa_compile.runtime.errors import UserInputError
from elsa_compile.runtime.onnx_tensors import Malformed, element_count

VERSION = 1
TOP = 5
_SAMPLED = 64  # values of each generic output that are recorded
_MAX_ELEMENTS = 1 << 28  # of a made-up input: 1 GiB of float32

Logits = Callable[[NDArray[np.int64]], NDArray[Any]]
Outputs = Callable[[dict[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]


def prompt_tokens(vocab_size: int, batch: int, length: int, seed: int = 0) -> NDArray[np.int64]:
    """Made-up prompts (batch, length) int64; the same numbers on every machine and numpy."""
    # RandomState: its stream is frozen, that of default_rng is not.
    random = np.random.RandomState(seed)
    return random.randint(0, vocab_size, (batch, length)).astype(np.int64)


def made_up(dtype: str, shape: list[int], seed: int, name: str = "") -> NDArray[Any]:
    """A made-up input of a generic model: normal floats, 0 / 1 integers, masks of ones.

    Token types are zeros: RoBERTa knows only one.

    Raises:
        UserInputError: a type or size that cannot be made.
    """
    try:
        count = element_count(shape, f"the input {name!r}")
    except Malformed as fault:
        raise UserInputError(f"probe: {fault}") from None
    if count > _MAX_ELEMENTS:
        raise UserInputError(f"probe: the input {name!r} has {count} elements, too many to make up")
    random = np.random.RandomState(seed)
    if dtype in ("float16", "float32", "float64"):
        return random.standard_normal(shape).astype(dtype)
    if dtype == "bool" or name.endswith("mask"):
        return np.ones(shape, dtype=dtype)
    if name == "token_type_ids":
        return np.zeros(shape, dtype=dtype)
    if dtype in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"):
        return random.randint(0, 2, shape).astype(dtype)
    raise UserInputError(f"probe: an input of type {dtype} cannot be made up")


def language_probe(
    run: Logits, vocab_size: int, *, tolerance: float, file: str, length: int = 12, new: int = 8
) -> dict[str, Any]:
    """Record a language model.

    Args:
        run: token ids (B, S) int64 -> logits (B, S, V), of the reference; no cache needed.
        vocab_size: V.
        tolerance: see above.
        file: name of the model file it will lie beside.
        length: tokens of the prompts.
        new: greedy tokens after them.
    """
    entries = []
    for batch, seed in ((1, 0), (2, 1)):
        ids = prompt_tokens(vocab_size, batch, length, seed)
        last = np.asarray(run(ids))[:, -1].astype(np.float64)
        entry: dict[str, Any] = {"input_ids": ids.tolist()}
        top = np.argsort(-last, axis=1, kind="stable")[:, :TOP]
        entry["top_ids"] = top.tolist()
        entry["top_logits"] = np.take_along_axis(last, top, axis=1).tolist()
        greedy, margins = [], []
        for _ in range(new):
            best_two = -np.sort(-last, axis=1)[:, :2]
            greedy.append(last.argmax(axis=1))
            margins.append(best_two[:, 0] - best_two[:, -1])
            ids = np.concatenate([ids, greedy[-1][:, None]], axis=1)
            last = np.asarray(run(ids))[:, -1].astype(np.float64)
        entry["greedy"] = np.stack(greedy, axis=1).tolist()
        entry["margins"] = np.stack(margins, axis=1).tolist()
        entries.append(entry)
    return {"version": VERSION, "file": file, "tolerance": tolerance, "language": entries}


def generic_probe(
    run: Outputs,
    inputs: Mapping[str, tuple[str, list[int]]],
    *,
    tolerance: float,
    file: str,
    seed: int = 0,
) -> dict[str, Any]:
    """Record any other model.

    Args:
        run: inputs by name -> outputs by name, of the reference.
        inputs: name -> (dtype, shape).
        tolerance: see above.
        file: name of the model file it will lie beside.
        seed: of the made-up inputs.
    """
    feeds = {name: made_up(*spec, seed, name) for name, spec in inputs.items()}
    outputs = {}
    for name, value in run(feeds).items():
        flat = np.asarray(value).reshape(-1)
        at = np.unique(np.linspace(0, max(flat.size - 1, 0), _SAMPLED).astype(int))[: flat.size]
        values = flat[at].astype(np.float64).tolist()
        outputs[name] = {"shape": list(np.shape(value)), "at": at.tolist(), "values": values}
    specs = {name: {"dtype": dtype, "shape": list(s)} for name, (dtype, s) in inputs.items()}
    entry = {"seed": seed, "inputs": specs, "outputs": outputs}
    return {"version": VERSION, "file": file, "tolerance": tolerance, "generic": [entry]}


def compare(
    probe: Mapping[str, Any], decoder: Decoder | None, run: Outputs
) -> tuple[float, float, list[str]]:
    """Check a model against a probe.

    Args:
        probe: as above.
        decoder: the model when it is a language model.
        run: the model otherwise.

    Returns:
        The largest difference relative to max(1, largest |reference|); the tolerance; one sentence
        for each mismatch.

    Raises:
        UserInputError: the probe is not one, or not for this kind of model.
    """
    if probe.get("version") != VERSION:
        raise UserInputError(
            f"probe: version {probe.get('version')!r}, wanted {VERSION}; update elsa-compile"
        )
    worst, faults = 0.0, []
    try:
        tolerance = float(probe["tolerance"])
        entries = [*probe.get("language", []), *probe.get("generic", [])]
        if not entries or (probe.get("language") and decoder is None):
            raise UserInputError("probe: it holds no entries for this kind of model")
        for number, entry in enumerate(entries):
            if decoder is not None and "input_ids" in entry:
                difference, found = _compare_language(entry, decoder, tolerance)
            else:
                difference, found = _compare_generic(entry, run)
            worst = max(worst, difference)
            faults += [f"prompt {number}: {fault}" for fault in found]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise UserInputError(
            f"probe: it is damaged ({type(error).__name__}: {error}); compile the model again"
        ) from None
    if not worst <= tolerance:
        faults.insert(0, f"largest difference {worst:.2g}, wanted at most {tolerance:.2g}")
    return worst, tolerance, faults


def _relative(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Largest difference over max(1, largest |wanted|); inf when anything is not finite."""
    if not wanted.size:
        return 0.0
    worst = float(np.abs(found.astype(np.float64) - wanted).max())
    return worst / max(1.0, float(np.abs(wanted).max())) if np.isfinite(worst) else float("inf")


def _compare_language(
    entry: Mapping[str, Any], decoder: Decoder, tolerance: float
) -> tuple[float, list[str]]:
    """Last-position logits, then the greedy continuation through the cache."""
    ids = np.array(entry["input_ids"], dtype=np.int64)
    if ids.ndim != 2 or not ids.size:
        raise ValueError(f"input_ids of shape {ids.shape}")
    top, wanted = np.array(entry["top_ids"]), np.array(entry["top_logits"], dtype=np.float64)
    greedy, margins = np.array(entry["greedy"]), np.array(entry["margins"], dtype=np.float64)
    state = decoder.start(len(ids))
    last = decoder.extend(state, ids, keep=1)[:, -1].astype(np.float64)
    difference = _relative(np.take_along_axis(last, top, axis=1), wanted)
    # Both sides of a margin may be off by the tolerance.
    tie = 2 * tolerance * max(1.0, float(np.abs(wanted).max()))
    faults, alike = [], np.ones(len(ids), dtype=bool)
    for step in range(greedy.shape[1]):
        found = last.argmax(axis=1)
        for row in np.flatnonzero(alike & (found != greedy[:, step])):
            alike[row] = False
            if margins[row, step] > tie:
                faults.append(f"greedy token {step} is {found[row]}, wanted {greedy[row, step]}")
        last = decoder.extend(state, greedy[:, step : step + 1])[:, -1].astype(np.float64)
    return difference, faults


def _compare_generic(entry: Mapping[str, Any], run: Outputs) -> tuple[float, list[str]]:
    """The recorded places of every output."""
    seed = int(entry["seed"])
    feeds = {
        name: made_up(str(spec["dtype"]), [int(n) for n in spec["shape"]], seed, name)
        for name, spec in entry["inputs"].items()
    }
    outputs = run(feeds)
    worst, faults = 0.0, []
    for name, wanted in entry["outputs"].items():
        found = outputs.get(name)
        if found is None or list(found.shape) != list(wanted["shape"]):
            shape = None if found is None else list(found.shape)
            faults.append(f"output {name!r} has shape {shape}, wanted {wanted['shape']}")
            continue
        values = np.array(wanted["values"], dtype=np.float64)
        worst = max(worst, _relative(found.reshape(-1)[wanted["at"]], values))
    return worst, faults
