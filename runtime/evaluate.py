"""Perplexity of an ONNX language model by the one protocol (runtime/text.py)."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime.decoder import Decoder, open_decoder
from elsa_compile.runtime.errors import UnsupportedModelError, UserInputError, VerificationError
from elsa_compile.runtime.session import provider_of
from elsa_compile.runtime.text import (
    PROTOCOL,
    Tokenizer,
    bos_token,
    check_numbers,
    default_window,
    perplexity_from_nll,
    read_json,
    read_text,
    windows,
)

log = logging.getLogger(__name__)

# Logits that onnxruntime hands out at once: a vocabulary of 262 k makes 537 MB of 512 rows.
_LOGITS_BYTES = 128 << 20
_ROWS = 64  # rows whose log-sum-exp is computed together


def summed_nll(logits: NDArray[Any], targets: NDArray[Any]) -> float:
    """Summed negative log-likelihood in nats.

    Args:
        logits: (S, V) float; row t scores targets[t].
        targets: (S,) integer.

    Example: logits [[0, 0]] and target [1] give ln 2 = 0.693.
    """
    total = 0.0
    for start in range(0, len(targets), _ROWS):
        rows = logits[start : start + _ROWS].astype(np.float32)
        chosen = rows[np.arange(len(rows)), targets[start : start + _ROWS]].astype(np.float64)
        top = rows.max(axis=1, keepdims=True)
        rows -= top
        np.exp(rows, out=rows)
        norm = np.log(rows.sum(axis=1, dtype=np.float64)) + top[:, 0]
        total += float((norm - chosen).sum())
    return total


def window_nll(decoder: Decoder, window: NDArray[np.int64]) -> float:
    """Summed NLL of tokens 1 ... of one window (S,), fed in pieces that keep the logits small."""
    size = len(window)
    if decoder.cached and decoder.vocab_size:
        size = max(16, min(size, _LOGITS_BYTES // (4 * decoder.vocab_size)))
    state = decoder.start()
    total = 0.0
    for start in range(0, len(window), size):
        logits = decoder.extend(state, window[None, start : start + size])[0]
        targets = window[start + 1 : start + size + 1]
        total += summed_nll(logits[: len(targets)], targets)
    return total


def perplexity(
    decoder: Decoder,
    cut: NDArray[np.int64],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Perplexity over windows (W, window) int64 from `text.windows`.

    Args:
        decoder: the model.
        cut: the windows.
        progress: called with (windows done, windows in all).

    Returns:
        perplexity, nll (mean, nats), windows, window, tokens (predicted ones), protocol, seconds.

    Raises:
        VerificationError: the model's scores are not finite.
    """
    started = time.perf_counter()
    _refuse_bidirectional(decoder, cut[0])
    total = 0.0
    for done, window in enumerate(cut, 1):
        total += window_nll(decoder, window)
        if not math.isfinite(total):
            raise VerificationError(
                f"{decoder.path}: its scores in window {done} of {len(cut)} are not finite; "
                "the weights are damaged or the float type is too small"
            )
        if progress is not None:
            progress(done, len(cut))
    count = cut.shape[0] * (cut.shape[1] - 1)
    return {
        "perplexity": perplexity_from_nll(total / count),
        "nll": total / count,
        "windows": int(cut.shape[0]),
        "window": int(cut.shape[1]),
        "tokens": int(count),
        "protocol": PROTOCOL,
        "seconds": time.perf_counter() - started,
    }


def _refuse_bidirectional(decoder: Decoder, window: NDArray[np.int64]) -> None:
    """A model that sees the token it is to predict has a perplexity that means nothing."""
    if decoder.cached or decoder.length is not None:
        return
    short = window[: min(8, len(window))]
    alone = decoder.extend(decoder.start(), short[None, :1])[0, 0].astype(np.float64)
    within = decoder.extend(decoder.start(), short[None])[0, 0].astype(np.float64)
    if np.abs(alone - within).max() > 1e-2 * max(1.0, float(np.abs(alone).max())):
        raise UnsupportedModelError(
            f"{decoder.path}: the scores of a token depend on the tokens after it, so it is no "
            "causal language model and has no perplexity"
        )


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    tokenizer: str | Path | None = None,
    window: int | None = None,
    max_windows: int | None = None,
    bos: str = "auto",
    provider: str = "auto",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Perplexity of an ONNX file on a text file.

    Args:
        model: the .onnx file or its folder.
        data: UTF-8 text.
        tokenizer: folder with tokenizer.json; the model's own folder when None.
        window: tokens a window; 512 or the model's longest input when None.
        max_windows: at most so many windows, from the start of the text.
        bos: "auto" (as the tokenizer does it), "yes" or "no".
        provider: as in `session`.
        threads: as in `session`.
        progress: called with (windows done, windows in all).

    Returns:
        As `perplexity`, with model, data, bos (the token id or None), provider and threads.

    Raises:
        UserInputError: unusable text, tokenizer or model file.
        UnsupportedModelError: not a language model.
        VerificationError: scores that are not finite.
    """
    check_numbers(window, max_windows)
    content = read_text(data)  # before the model: a wrong path should not cost a minute
    decoder, described = open_decoder(model, threads, provider)
    folder = Path(tokenizer) if tokenizer is not None else described.path.parent
    words = Tokenizer(folder)
    config = read_json(described.path.parent / "config.json") or read_json(folder / "config.json")
    if window is None:
        window = decoder.length or default_window(config)
    if decoder.length not in (None, window):
        raise UserInputError(
            f"--window is {window}, but {described.path} takes only {decoder.length} tokens"
        )
    start = bos_token(words, bos)
    cut = windows(words.encode(content), window, max_windows, start)
    log.info("%s: %d windows of %d tokens of %s", described.path, len(cut), window, data)
    result = perplexity(decoder, cut, progress)
    return {
        "model": str(described.path),
        "data": str(data),
        **result,
        "bos": start,
        "provider": provider_of(decoder.session),
        "threads": threads,
    }
