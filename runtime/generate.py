"""Text from an ONNX language model: greedy by default, sampled when a temperature is given."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime.decoder import Decoder
from elsa_compile.runtime.errors import UserInputError, VerificationError
from elsa_compile.runtime.text import Tokenizer, bos_token, max_length, read_json


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most probable token; above, logits are divided by it first.
        top_k: only the k most probable tokens; 0 for all.
        top_p: only the fewest most probable tokens that together have this probability.
        seed: of the random numbers; the same seed gives the same text.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no sense; each message names the option."""
        if not 0.0 <= self.temperature < float("inf"):
            raise UserInputError(f"--temperature is {self.temperature}, wanted 0 or more")
        if self.top_k < 0:
            raise UserInputError(f"--top-k is {self.top_k}, wanted 0 (all tokens) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise UserInputError(f"--top-p is {self.top_p}, wanted above 0 and at most 1")
        if self.seed < 0:
            raise UserInputError(f"--seed is {self.seed}, wanted 0 or more")
        if self.temperature == 0.0 and (self.top_k or self.top_p < 1.0):
            raise UserInputError(
                "--top-k and --top-p sample, but --temperature is 0 (always the most probable "
                "token); give --temperature 0.8, say"
            )


@dataclass(frozen=True)
class Generation:
    """A generated text.

    Attributes:
        prompt_tokens: tokens fed, BOS included.
        ids: the new tokens, a final end-of-text token included.
        text: their text.
        stop: why it ended: "eos", "max-new-tokens" or "context-full".
        prefill_s, decode_s: seconds until the first token, and for all later ones.
    """

    prompt_tokens: int
    ids: list[int]
    text: str
    stop: Literal["eos", "max-new-tokens", "context-full"]
    prefill_s: float
    decode_s: float

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Speed after the first token; None when there was only one."""
        later = len(self.ids) - 1
        return later / self.decode_s if later > 0 and self.decode_s > 0 else None


def choose(logits: NDArray[Any], sampling: Sampling, random: np.random.Generator) -> int:
    """The next token from the logits (V,) of the last position.

    Example: logits [2, 1, 0] at temperature 1 are probabilities [0.67, 0.24, 0.09]; top_p 0.7 keeps
    the first two (0.67 is not enough), which then have [0.73, 0.27].
    """
    scores = logits.astype(np.float64)
    if sampling.temperature == 0.0:
        return int(scores.argmax())
    # The maximum goes first: a tiny temperature must not turn large logits into inf - inf.
    scores = (scores - scores.max()) / sampling.temperature
    order = np.argsort(-scores, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = np.exp(scores[order])
    weights /= weights.sum()
    if sampling.top_p < 1.0:
        kept = int(np.searchsorted(weights.cumsum(), sampling.top_p)) + 1
        order, weights = order[:kept], weights[:kept] / weights[:kept].sum()
    return int(random.choice(order, p=weights))


def tokens(
    decoder: Decoder, prompt: NDArray[Any], sampling: Sampling | None = None
) -> Iterator[int]:
    """Endless new tokens after a prompt (S,); the caller stops.

    Raises:
        VerificationError: the model's scores are not finite.
    """
    sampling = sampling or Sampling()
    random = np.random.default_rng(sampling.seed)
    state = decoder.start()
    fed = np.asarray(prompt)[None]
    while True:
        scores = decoder.extend(state, fed, keep=1)[0, -1]
        if not np.isfinite(scores).all():
            raise VerificationError(
                f"{decoder.path}: its scores after {state.length} tokens are not finite; "
                "the weights are damaged or the float type is too small"
            )
        token = choose(scores, sampling, random)
        yield token
        fed = np.array([[token]], dtype=np.int64)


def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt until end of text, `max_new_tokens` or the model's longest input.

    The prompt starts with BOS where the model's tokenizer does that itself, or when it is empty.

    Args:
        decoder: the model.
        tokenizer: its tokenizer; config.json in the same folder gives the longest input.
        prompt: text to continue.
        max_new_tokens: at least 1.
        sampling: greedy when None.
        on_text: called with each new piece of text.

    Raises:
        UserInputError: nothing to start from, or the prompt fills the model's longest input.
    """
    if max_new_tokens < 1:
        raise UserInputError(f"--max-new-tokens is {max_new_tokens}, wanted at least 1")
    ids = prompt_ids(tokenizer, prompt)
    room = _room(tokenizer.folder, len(ids))
    stream, pieces, new = tokenizer.stream(), [], []
    stop: Literal["eos", "max-new-tokens", "context-full"] = "max-new-tokens"
    started = first = time.perf_counter()
    for token in tokens(decoder, ids, sampling):
        new.append(token)
        if len(new) == 1:
            first = time.perf_counter()
        if token in tokenizer.eos_ids:
            stop = "eos"
            break
        pieces.append(stream.push(token))
        if on_text and pieces[-1]:
            on_text(pieces[-1])
        if len(new) >= max_new_tokens:
            break
        if room is not None and len(new) > room:
            stop = "context-full"
            break
    ended = time.perf_counter()
    pieces.append(stream.close())
    if on_text and pieces[-1]:
        on_text(pieces[-1])
    return Generation(len(ids), new, "".join(pieces), stop, first - started, ended - first)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> NDArray[np.int64]:
    """Token ids (S,) int64 of a prompt, S at least 1."""
    ids = tokenizer.encode(prompt)
    bos = bos_token(tokenizer, "auto")
    if bos is None and not len(ids):
        bos = tokenizer.bos_id
    if bos is not None:
        ids = np.concatenate([np.array([bos], dtype=np.int64), ids])
    if not len(ids):
        raise UserInputError(
            "--prompt is empty and the tokenizer has no BOS token to start from; give some text"
        )
    return ids


def _room(folder: Path, used: int) -> int | None:
    """Tokens the model can still take after the prompt; None where config.json does not say."""
    longest = max_length(read_json(folder / "config.json"))
    if longest is None:
        return None
    if used > longest:
        raise UserInputError(
            f"the prompt has {used} tokens, but the model takes at most {longest}; shorten it"
        )
    return longest - used
