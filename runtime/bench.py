"""Speed, load time and memory of a model file, and its ratio to a dense reference file.

Both files are timed in one process, in turns, so that a machine that warms up or is disturbed does
so for both; each ratio is of two runs that followed each other. Memory and load time come from a
process of their own for each file (`footprint`). Scores must be finite before anything is timed.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elsa_compile.runtime.decoder import Decoder, State
from elsa_compile.runtime.errors import UserInputError, VerificationError
from elsa_compile.runtime.onnx_file import ModelFile, inspect, model_kind
from elsa_compile.runtime.probe import made_up, prompt_tokens
from elsa_compile.runtime.session import provider_of, run_failure, session
from elsa_compile.runtime.text import max_length, read_json

# Idle threads of one session would spin on the cores that the other one is being timed on.
_CONFIG = {"session.force_spinning_stop": "1"}
_UNKNOWN_VOCAB = 16
_ORT_TYPES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True)
class Workload:
    """Something to time.

    Attributes:
        name: "prefill 128", "decode at 128" or "run".
        units: tokens (or runs) a call computes; the speed is units / seconds.
        unit: what a unit is.
        run: does it once and gives the seconds of the timed part.
        check: does it once and says whether all scores are finite.
    """

    name: str
    units: int
    unit: str
    run: Callable[[], float]
    check: Callable[[], bool]


def workloads(
    opened: Any, path: Path, prefill: Sequence[int], context: Sequence[int], steps: int
) -> list[Workload]:
    """What can be timed of a session: prefill and decode, or one run of any other model."""
    inputs, outputs = opened.get_inputs(), opened.get_outputs()
    kind, _ = model_kind([i.name for i in inputs], [o.name for o in outputs])
    if kind == "generic":
        return [_plain_run(opened, path)]
    decoder = Decoder(opened, path)
    if decoder.length is not None:
        return [_prefill(decoder, decoder.length)]
    made = [_prefill(decoder, length) for length in prefill]
    return made + [_decode(decoder, length, steps) for length in context if decoder.cached]


def _prefill(decoder: Decoder, length: int) -> Workload:
    rows = decoder.batch or 1
    ids = prompt_tokens(decoder.vocab_size or _UNKNOWN_VOCAB, rows, length)

    def run() -> float:
        state = decoder.start(rows)
        started = time.perf_counter()
        decoder.extend(state, ids)
        return time.perf_counter() - started

    def check() -> bool:
        return bool(np.isfinite(decoder.extend(decoder.start(rows), ids)).all())

    return Workload(f"prefill {length}", length * rows, "tokens", run, check)


def _decode(decoder: Decoder, length: int, steps: int) -> Workload:
    """`steps` single tokens after a context of `length`; the context itself is not timed."""
    rows = decoder.batch or 1
    ids = prompt_tokens(decoder.vocab_size or _UNKNOWN_VOCAB, rows, length + steps)
    prompt = decoder.start(rows)
    filled: list[bool] = []

    def once() -> tuple[float, bool]:
        if not filled:
            decoder.extend(prompt, ids[:, :length])
            filled.append(True)
        # The cache is only read by a run, so every repetition can start from the same one.
        state = State(prompt.mask, prompt.ids, list(prompt.cache))
        finite, seconds = True, 0.0
        for step in range(length, length + steps):
            started = time.perf_counter()
            scores = decoder.extend(state, ids[:, step : step + 1])
            seconds += time.perf_counter() - started
            finite = finite and bool(np.isfinite(scores).all())
        return seconds, finite

    return Workload(
        f"decode at {length}", steps * rows, "tokens", lambda: once()[0], lambda: once()[1]
    )


def _plain_run(opened: Any, path: Path) -> Workload:
    """One run of a model that is no language model, batch 1 where it is free."""
    feeds = {}
    for value in opened.get_inputs():
        dtype = value.type.removeprefix("tensor(").removesuffix(")")
        free = [1 if axis == 0 else 32 for axis in range(len(value.shape))]
        shape = [d if isinstance(d, int) else f for d, f in zip(value.shape, free, strict=True)]
        feeds[value.name] = made_up(_ORT_TYPES.get(dtype, dtype), shape, 0, value.name)

    def outputs() -> list[Any]:
        try:
            return list(opened.run(None, feeds))
        except Exception as error:
            raise run_failure(error, path) from None

    def run() -> float:
        started = time.perf_counter()
        outputs()
        return time.perf_counter() - started

    def check() -> bool:
        return all(bool(np.isfinite(v).all()) for v in outputs() if v.dtype.kind == "f")

    return Workload("run", 1, "runs", run, check)


def bench(
    model: str | Path,
    against: str | Path | None = None,
    *,
    prefill: Sequence[int] = (128,),
    context: Sequence[int] = (128,),
    steps: int = 16,
    warmup: int = 2,
    repetitions: int = 10,
    provider: str = "auto",
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time a model, and a reference in turns with it.

    Args:
        model: the .onnx file or its folder.
        against: the dense reference file, or None.
        prefill: prompt lengths in tokens.
        context: context lengths at which single tokens are decoded.
        steps: tokens decoded in one repetition.
        warmup: untimed calls of each workload.
        repetitions: timed calls, at least 2.
        provider: as in `session`.
        threads: as in `session`.
        progress: called with what is about to be done.

    Returns:
        Plain values for JSON: files (load, memory), results (speeds, and with `against` their
        ratios), machine, versions.

    Raises:
        UserInputError: numbers that make no sense, or files that cannot be compared.
        VerificationError: scores that are not finite.
    """
    _check_numbers(prefill, context, steps, warmup, repetitions)
    say = progress or (lambda _: None)
    files = {"model": inspect(model)}
    if against is not None:
        files["against"] = inspect(against)
        if files["against"].kind != files["model"].kind:
            raise UserInputError(
                f"--against {against} is a {files['against'].kind} and {model} a "
                f"{files['model'].kind}; give a reference of the same model"
            )
    for file in files.values():
        _check_lengths(file, prefill, context, steps)
    described = {name: _describe(file, threads, provider, say) for name, file in files.items()}
    sessions, work = {}, {}
    for name, file in files.items():
        say(f"checking {file.path}")
        sessions[name] = session(file.path, threads, provider, checked=file, config=_CONFIG)
        work[name] = workloads(sessions[name], file.path, prefill, context, steps)
        for each in work[name]:
            if not each.check():
                raise VerificationError(
                    f"{file.path}: its scores ({each.name}) are not finite, so it is not timed"
                )
    if "against" in files:
        _check_comparable(files, sessions, work)
    results: list[dict[str, Any]] = []
    for turn in zip(*work.values(), strict=True):
        say(f"timing {turn[0].name}")
        seconds = _interleaved([each.run for each in turn], warmup, repetitions)
        results.append(_result(turn[0], dict(zip(files, seconds, strict=True))))
    return {
        "files": described,
        "results": results,
        "threads": threads,
        "provider": provider_of(sessions["model"]),
        "warmup": warmup,
        "repetitions": repetitions,
        "decode_steps": steps,
        "machine": machine(),
        "versions": versions(),
    }


def _check_numbers(
    prefill: Sequence[int], context: Sequence[int], steps: int, warmup: int, repetitions: int
) -> None:
    if any(n < 1 for n in (*prefill, *context, steps)):
        raise UserInputError("--prefill, --context and --steps are token counts, wanted 1 or more")
    if warmup < 0 or repetitions < 2:
        raise UserInputError(
            f"--warmup is {warmup} and --repetitions {repetitions}, wanted at least 0 and 2"
        )


def _check_comparable(
    files: dict[str, ModelFile], sessions: dict[str, Any], work: dict[str, list[Workload]]
) -> None:
    """A ratio means something only for the same work on the same processor."""
    places = {name: provider_of(opened) for name, opened in sessions.items()}
    if places["model"] != places["against"]:
        raise UserInputError(
            f"{files['model'].path} runs on {places['model']} but {files['against'].path} on "
            f"{places['against']}; give --provider cpu for both"
        )
    done = {name: [each.name for each in found] for name, found in work.items()}
    takes = {
        name: [(v.name, v.type) for v in opened.get_inputs()] for name, opened in sessions.items()
    }
    if done["model"] != done["against"] or takes["model"] != takes["against"]:
        raise UserInputError(
            f"{files['against'].path} and {files['model'].path} do not take the same inputs or "
            "lengths; give a reference of the same model"
        )


def _check_lengths(
    file: ModelFile, prefill: Sequence[int], context: Sequence[int], steps: int
) -> None:
    """Beyond its longest input a model computes something else, or fails."""
    longest = max_length(read_json(file.path.parent / "config.json"))
    wanted = max([*prefill, *(length + steps for length in context)], default=0)
    if longest is not None and file.kind != "generic" and wanted > longest:
        raise UserInputError(
            f"{file.path} takes at most {longest} tokens, but {wanted} are to be timed; "
            "give smaller --prefill, --context or --steps"
        )


def _describe(
    file: ModelFile, threads: int | None, provider: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """A file's size, load time and memory."""
    from elsa_compile.runtime.footprint import measure

    say(f"measuring memory of {file.path}")
    return {
        "path": str(file.path),
        "kind": file.kind,
        "stored_bytes": file.file_bytes + file.external_bytes,
        "dense_weight_bytes": file.dense_bytes,
        **measure(file.path, threads, provider),
    }


def _interleaved(
    runs: Sequence[Callable[[], float]], warmup: int, repetitions: int
) -> list[list[float]]:
    """Seconds of each repetition of each run, taken in turns; who goes first alternates."""
    for _ in range(warmup):
        for run in runs:
            run()
    seconds: list[list[float]] = [[] for _ in runs]
    for repetition in range(repetitions):
        order = list(range(len(runs)))
        for index in order if repetition % 2 == 0 else reversed(order):
            seconds[index].append(runs[index]())
    return seconds


def _result(work: Workload, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Speeds of one workload, and the ratio against / model of each pair of runs."""
    result: dict[str, Any] = {"workload": work.name, "unit": f"{work.unit}/s"}
    for name, values in seconds.items():
        result[name] = {
            "per_s": spread([work.units / value for value in values]),
            "seconds": values,
        }
    if "against" in seconds:
        pairs = zip(seconds["against"], seconds["model"], strict=True)
        ratios = [dense / sparse for dense, sparse in pairs]
        result["speedup"] = {**spread(ratios), "verdict": verdict(ratios)}
    return result


def spread(values: Sequence[float]) -> dict[str, float]:
    """min, median, max and their relative spread (max - min) / median."""
    middle = statistics.median(values)
    low, high = min(values), max(values)
    return {"min": low, "median": middle, "max": high, "spread": (high - low) / middle}


def verdict(ratios: Sequence[float]) -> str:
    """What paired ratios (> 1: faster than the reference) allow to say, in plain words.

    Faster or slower is said when nine of ten pairs agree and the median is off by 2 % or more;
    ten fair coins agree like that once in 47 tries, and 2 % is what a quiet machine repeats to.
    """
    middle, count = statistics.median(ratios), len(ratios)
    faster = sum(ratio > 1.0 for ratio in ratios)
    sides = ((faster, middle - 1, "faster"), (count - faster, 1 - middle, "slower"))
    for wins, gain, word in sides:
        if wins >= 0.9 * count and gain >= 0.02 and count >= 5:
            factor = middle if word == "faster" else 1 / middle
            return f"{factor:.2f}x {word} ({wins} of {count} pairs)"
    few = "; too few repetitions to say more" if count < 5 else ""
    return f"no measurable difference ({faster} of {count} pairs faster, inside the noise{few})"


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    usable = getattr(os, "sched_getaffinity", None)
    cores = len(usable(0)) if usable else os.cpu_count()
    return {"cpu": model, "cores": cores, "system": platform.platform()}


def versions() -> dict[str, str]:
    """Versions of everything that computes."""
    import onnxruntime

    from elsa_compile import __version__

    return {
        "elsa-compile": __version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
