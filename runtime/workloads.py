"""What can be timed of a session: prefill and decode, or one run of any other model."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elsa_compile.runtime.agreement import Array, language_scores
from elsa_compile.runtime.decoder import Decoder
from elsa_compile.runtime.onnx_file import model_kind
from elsa_compile.runtime.probe import made_up, prompt_tokens
from elsa_compile.runtime.session import run_failure

_UNKNOWN_VOCAB = 16
Clock = Callable[[], float]
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
    opened: Any,
    path: Path,
    prefill: Sequence[int],
    context: Sequence[int],
    steps: int,
    clock: Clock = time.perf_counter,
    keep: int = 1,
) -> list[Workload]:
    """What can be timed of a session: prefill and decode, or one run of any other model.

    Args:
        opened: the session.
        path: of its file, for messages.
        prefill: prompt lengths.
        context: tokens before those that are decoded.
        steps: tokens to decode.
        clock: gives seconds.
        keep: of how many last positions a prefill gives logits; 0 for all.
    """
    inputs, outputs = opened.get_inputs(), opened.get_outputs()
    kind, _ = model_kind([i.name for i in inputs], [o.name for o in outputs])
    if kind == "generic":
        return [_plain_run(opened, path, clock)]
    decoder = Decoder(opened, path)
    if decoder.length is not None:
        return [_prefill(decoder, decoder.length, clock, keep)]
    made = [_prefill(decoder, length, clock, keep) for length in prefill]
    return made + [_decode(decoder, n, steps, clock) for n in context if decoder.cached]


def _prefill(decoder: Decoder, length: int, clock: Clock, keep: int) -> Workload:
    rows = decoder.batch or 1
    ids = prompt_tokens(decoder.vocab_size or _UNKNOWN_VOCAB, rows, length)

    def run() -> float:
        state = decoder.start(rows, length)
        started = clock()
        decoder.extend(state, ids, keep=keep)
        return clock() - started

    def check() -> bool:
        return bool(np.isfinite(decoder.extend(decoder.start(rows), ids)).all())

    return Workload(f"prefill {length}", length * rows, "tokens", run, check)


def _decode(decoder: Decoder, length: int, steps: int, clock: Clock) -> Workload:
    """`steps` single tokens after a context of `length`; the context itself is not timed."""
    rows = decoder.batch or 1
    ids = prompt_tokens(decoder.vocab_size or _UNKNOWN_VOCAB, rows, length + steps)
    prompt = decoder.start(rows, length + steps)
    filled: list[bool] = []

    def once() -> tuple[float, bool]:
        if not filled:
            decoder.extend(prompt, ids[:, :length], keep=1)
            filled.append(True)
        state = decoder.branch(prompt)  # every repetition starts from the same one
        finite, seconds = True, 0.0
        for step in range(length, length + steps):
            started = clock()
            scores = decoder.extend(state, ids[:, step : step + 1])
            seconds += clock() - started
            finite = finite and bool(np.isfinite(scores).all())
        return seconds, finite

    return Workload(
        f"decode at {length}", steps * rows, "tokens", lambda: once()[0], lambda: once()[1]
    )


def scores(opened: Any, path: Path) -> list[Array]:
    """What the session computes from made-up input, to compare it with another one."""
    inputs, outputs = opened.get_inputs(), opened.get_outputs()
    if model_kind([i.name for i in inputs], [o.name for o in outputs])[0] != "generic":
        return language_scores(Decoder(opened, path))
    try:
        return list(opened.run(None, _made_up_feeds(opened)))
    except Exception as error:
        raise run_failure(error, path) from None


def _made_up_feeds(opened: Any) -> dict[str, Array]:
    """Inputs of a model that is no language model, batch 1 where it is free."""
    feeds = {}
    for value in opened.get_inputs():
        dtype = value.type.removeprefix("tensor(").removesuffix(")")
        free = [1 if axis == 0 else 32 for axis in range(len(value.shape))]
        shape = [d if isinstance(d, int) else f for d, f in zip(value.shape, free, strict=True)]
        feeds[value.name] = made_up(_ORT_TYPES.get(dtype, dtype), shape, 0, value.name)
    return feeds


def _plain_run(opened: Any, path: Path, clock: Clock) -> Workload:
    """One run of a model that is no language model."""
    feeds = _made_up_feeds(opened)

    def outputs() -> list[Any]:
        try:
            return list(opened.run(None, feeds))
        except Exception as error:
            raise run_failure(error, path) from None

    def run() -> float:
        started = clock()
        outputs()
        return clock() - started

    def check() -> bool:
        return all(bool(np.isfinite(v).all()) for v in outputs() if v.dtype.kind == "f")

    return Workload("run", 1, "runs", run, check)
