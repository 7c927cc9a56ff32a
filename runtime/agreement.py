"""How far two sessions of the same model are from each other, before anything is timed."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime.decoder import Decoder
from elsa_compile.runtime.probe import prompt_tokens

Array = NDArray[Any]
_LENGTH = 32
_UNKNOWN_VOCAB = 16


def language_scores(decoder: Decoder) -> list[Array]:
    """Logits of a made-up prompt (B, S, V), and of four single steps after it (B, 1, V)."""
    rows, length = decoder.batch or 1, decoder.length or _LENGTH
    ids = prompt_tokens(decoder.vocab_size or _UNKNOWN_VOCAB, rows, length, seed=3)
    if decoder.length is not None:
        return [decoder.extend(decoder.start(rows), ids)]
    state = decoder.start(rows)
    scores = [decoder.extend(state, ids[:, :-4])]
    return scores + [decoder.extend(state, ids[:, t : t + 1]) for t in range(length - 4, length)]


def agreement(found: list[Array], wanted: list[Array]) -> dict[str, float]:
    """Outputs of a session against those of another.

    Args:
        found: outputs of any shapes; only float ones are compared.
        wanted: the same outputs of the other.

    Returns:
        rms: root of the summed squares of the differences over that of `wanted`; largest: largest
        |difference| over the largest |wanted|; same_top: fraction of positions (all but the last
        axis) with the same largest entry.
    """
    pairs = [
        (a.astype(np.float64), b.astype(np.float64))
        for a, b in zip(found, wanted, strict=True)
        if b.dtype.kind == "f" and b.size
    ]
    if not pairs:
        return {"rms": 0.0, "largest": 0.0, "same_top": 1.0}
    if any(a.shape != b.shape for a, b in pairs):
        return {"rms": float("inf"), "largest": float("inf"), "same_top": 0.0}
    off = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
    size = sum(float((b**2).sum()) for _, b in pairs)
    tops = [(a.argmax(axis=-1) == b.argmax(axis=-1)).ravel() for a, b in pairs if b.ndim]
    return {
        "rms": float(np.sqrt(off / size)) if size else float(off > 0),
        "largest": max(float(np.abs(a - b).max()) for a, b in pairs)
        / (max(float(np.abs(b).max()) for _, b in pairs) or 1.0),
        "same_top": float(np.concatenate(tops).mean()) if tops else 1.0,
    }
