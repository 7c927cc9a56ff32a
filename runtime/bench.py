"""Speed, load time and memory of a model file, and its ratio to a reference.

The reference is another file, or a stock version of the same one: the file in onnxruntime without
our kernels, or its matrices in 8 or 4 bits as onnxruntime multiplies them best (`stock`). Both are
timed in one process, in turns, so that a machine that warms up or is disturbed does so for both;
each ratio is of two runs that followed each other. Memory and load time come from a process of
their own for each file (`footprint`). Before anything is timed scores are finite, and a stock
version is the same model: its scores are near, or of fewer bits its products what they should be.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elsa_compile.runtime import provider as sparse
from elsa_compile.runtime.agreement import agreement
from elsa_compile.runtime.bandwidth import read_gb_per_s
from elsa_compile.runtime.circumstances import machine, versions
from elsa_compile.runtime.decoder import LOGITS_TO_KEEP
from elsa_compile.runtime.errors import UserInputError, VerificationError
from elsa_compile.runtime.kernels import available
from elsa_compile.runtime.onnx_file import ModelFile, inspect
from elsa_compile.runtime.prediction import compare_prediction, prediction_of
from elsa_compile.runtime.session import decoding_session, provider_of
from elsa_compile.runtime.text import max_length, read_json
from elsa_compile.runtime.workloads import Workload, scores, workloads

# Idle threads of one session would spin on the cores that the other one is being timed on.
_CONFIG = {"session.force_spinning_stop": "1"}
PREFILL = (32, 128, 512)
CONTEXT = (32, 128, 512)
STOCK = ("stock", "stock-fp32", "stock-int8", "stock-int4")
# Root mean square of the differences over that of the scores, beyond which a stock version is
# broken: it sums in another order. What fewer bits do to the scores of a model is no fault;
# `write_stock` judges their products one by one.
_NEAR = {"stock": 1e-3, "stock-fp32": 1e-3}
_NEAR_HALVES, _NEAR_INT8 = 2e-2, 0.15


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Attributes:
        name: "model" or "against".
        label: what it is, for people.
        file: the checked file.
        stock: opened without our kernels.
        built: what was made for the comparison, or None.
    """

    name: str
    label: str
    file: ModelFile
    stock: bool = False
    built: dict[str, Any] | None = None


def bench(
    model: str | Path,
    against: str | Path | None = None,
    *,
    prefill: Sequence[int] | None = None,
    context: Sequence[int] | None = None,
    steps: int = 16,
    warmup: int = 2,
    repetitions: int = 10,
    provider: str = "auto",
    threads: int | None = None,
    layers: bool = False,
    clock: str = "wall",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time a model, and a reference in turns with it.

    Args:
        model: the .onnx file or its folder.
        against: a reference file, "stock" (the same file without our kernels), "stock-fp32" (all
            its matrices as dense float32), "stock-int8", "stock-int4" (its best stock quantised
            versions), the last three made here, or None.
        prefill: prompt lengths in tokens; None takes those of 32, 128 and 512 that it can.
        context: context lengths at which single tokens are decoded; None likewise.
        steps: tokens decoded in one repetition.
        warmup: untimed calls of each workload.
        repetitions: timed calls, at least 2.
        provider: as in `session`.
        threads: as in `session`.
        layers: also profile every node, in sessions of their own after the timing.
        clock: "wall", or "cpu": the processor time of the one thread that then does everything,
            for a machine that is also busy with other things.
        progress: called with what is about to be done.

    Returns:
        Plain values for JSON: files (load, memory, kernels), agreement of their scores, results
        (speeds, and with `against` their ratios), layers, machine, versions.

    Raises:
        UserInputError: numbers that make no sense, or files that cannot be compared.
        VerificationError: scores that are not finite, or a stock version that computes something
            else.
    """
    _check_numbers(prefill or (), context or (), steps, warmup, repetitions)
    read_clock = _clock(clock, threads)
    say = progress or (lambda _: None)
    with _sides(model, against, say) as sides:
        first = sides[0].file
        lengths = _lengths(first, prefill, PREFILL, 0), _lengths(first, context, CONTEXT, steps)
        for side in sides:
            _check_lengths(side.file, *lengths, steps)
        last = all(LOGITS_TO_KEEP in side.file.optional for side in sides)
        described = {side.name: _describe(side, threads, provider, say) for side in sides}
        sessions, work = {}, {}
        for side in sides:
            say(f"checking {side.label}")
            sessions[side.name] = _open(side, threads, provider)
            described[side.name]["kernels"] = _kernels_of(sessions[side.name])
            work[side.name] = workloads(
                sessions[side.name], side.file.path, *lengths, steps, read_clock, int(last)
            )
            _check_finite(side, work[side.name])
        near = _compare(sides, sessions, work, str(against)) if len(sides) > 1 else None
        results: list[dict[str, Any]] = []
        for turn in zip(*work.values(), strict=True):
            say(f"timing {turn[0].name}")
            seconds = _interleaved([each.run for each in turn], warmup, repetitions)
            results.append(_result(turn[0], dict(zip(work, seconds, strict=True))))
        place = provider_of(sessions["model"])
        sessions.clear()
        work.clear()
        profiled = _layers(sides, lengths, int(last), threads, provider, say) if layers else None
        reference = sides[-1].file.nodes
        quantised = bool({"DequantizeLinear", "MatMulNBits"} & set(reference))
        predicted = compare_prediction(
            prediction_of(first.path.parent), results, threads, len(sides) > 1 and quantised
        )
    return {
        "files": described,
        "agreement": near,
        "results": results,
        "prediction": predicted,
        "layers": profiled,
        "read_gb_per_s": read_gb_per_s(threads) if layers else None,
        "clock": clock,
        "threads": threads,
        "provider": place,
        "warmup": warmup,
        "repetitions": repetitions,
        "decode_steps": steps,
        "prefill_logits": "last position" if last else "all positions",
        "machine": machine(),
        "versions": versions(),
    }


@contextlib.contextmanager
def _sides(
    model: str | Path, against: str | Path | None, say: Callable[[str], None]
) -> Iterator[list[Side]]:
    """The model and what it is compared with; what is made for that goes afterwards."""
    file = inspect(model)
    mine = Side("model", str(file.path), file)
    if against is None:
        yield [mine]
    elif against == "stock":
        yield [mine, Side("against", f"{file.path} (stock)", file, stock=True)]
    elif against in STOCK:
        from elsa_compile.runtime.stock import ACCURACY_LEVEL, BLOCK, write_stock

        with tempfile.TemporaryDirectory(prefix="elsa-bench-") as folder:
            say(f"making the {against} version of {file.path}")
            bits = {"stock-fp32": 32, "stock-int8": 8, "stock-int4": 4}[str(against)]
            made = write_stock(file, bits, Path(folder))
            few = {"block_size": BLOCK, "accuracy_level": ACCURACY_LEVEL} if bits < 32 else {}
            built = {
                "operator": "com.microsoft.MatMulNBits" if bits < 32 else "MatMul",
                "bits": made.bits,
                **few,
                "products": len(made.quantised),
                "left": [{"node": node, "why": why} for node, why in made.left],
            }
            label = f"{file.path} ({against})"
            yield [mine, Side("against", label, inspect(made.path), stock=True, built=built)]
    else:
        other = inspect(against)
        if other.kind != file.kind:
            raise UserInputError(
                f"--against {against} is a {other.kind} and {model} a {file.kind}; give a "
                "reference of the same model"
            )
        yield [mine, Side("against", str(other.path), other)]


def _open(side: Side, threads: int | None, provider: str) -> Any:
    return decoding_session(
        side.file.path,
        threads,
        provider,
        checked=side.file,
        config=_CONFIG,
        kernels=False if side.stock else None,
    )


def _kernels_of(opened: Any) -> dict[str, Any]:
    """Whose kernels multiply; call it before another session is opened with ours."""
    if sparse.NAME not in opened.get_providers():
        return {"ours": False, "products": 0, "why": available()[1]}
    taken = [claim for claim in sparse.claims() if claim["format"] != "dense"]
    return {"ours": True, "products": len(taken), "why": ""}


def _lengths(
    file: ModelFile, given: Sequence[int] | None, usual: Sequence[int], more: int
) -> Sequence[int]:
    """Lengths that were asked for, or the usual ones that the model can take."""
    if given is not None or file.kind == "generic":
        return given or usual
    longest = max_length(read_json(file.path.parent / "config.json"))
    fitting = [n for n in usual if longest is None or n + more <= longest]
    return fitting or [max(1, (longest or 0) - more)]


def _check_finite(side: Side, work: list[Workload]) -> None:
    for each in work:
        if not each.check():
            raise VerificationError(
                f"{side.label}: its scores ({each.name}) are not finite, so it is not timed"
            )


def _compare(
    sides: Sequence[Side], sessions: dict[str, Any], work: dict[str, list[Workload]], against: str
) -> dict[str, Any]:
    """How far the reference is from the model; a broken stock version is no reference.

    Another file may differ, as a dense model from its pruned one does: there it is only said.
    """
    files = {side.name: side.file for side in sides}
    _check_comparable(files, sessions, work)
    model, other = (scores(sessions[side.name], side.file.path) for side in sides)
    found = agreement(other, model)
    limit = _NEAR.get(against)
    if limit is not None:
        quantised = {"DequantizeLinear", "MatMulNBits"} & set(files["model"].nodes)
        halves = any(weight.dtype == "float16" for weight in files["model"].weights)
        limit = max(limit, _NEAR_INT8 if quantised else 0, _NEAR_HALVES if halves else 0)
        if not found["rms"] <= limit:
            raise VerificationError(
                f"{sides[1].label}: its scores are off by {found['rms']:.2g} of the model's (root "
                f"mean square), wanted at most {limit:g}, so it is no reference"
            )
    return {**found, "limit": limit}


def _layers(
    sides: Sequence[Side],
    lengths: tuple[Sequence[int], Sequence[int]],
    keep: int,
    threads: int | None,
    provider: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Tables of `layers.profile` for each side."""
    from elsa_compile.runtime.layers import profile

    made = {}
    for side in sides:
        say(f"profiling {side.label}")
        made[side.name] = profile(_open(side, threads, provider), side.file, *lengths, keep)
    return made


def _clock(name: str, threads: int | None) -> Callable[[], float]:
    if name == "wall":
        return time.perf_counter
    if name != "cpu":
        raise UserInputError(f"--clock is {name!r}, wanted wall or cpu")
    if threads != 1:
        raise UserInputError("--clock cpu counts one thread's time alone; give --threads 1 with it")
    return time.thread_time


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
    side: Side, threads: int | None, provider: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """A file's size, load time and memory."""
    from elsa_compile.runtime.footprint import measure

    say(f"measuring memory of {side.label}")
    return {
        "path": side.label,
        "kind": side.file.kind,
        "stored_bytes": side.file.file_bytes + side.file.external_bytes,
        "dense_weight_bytes": side.file.dense_bytes,
        "built": side.built,
        **measure(side.file.path, threads, provider, side.stock),
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
