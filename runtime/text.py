"""Text to token windows: the one perplexity protocol, used by onnxruntime and torch side alike.

The protocol (`PROTOCOL`): the whole file is one stream of tokens without special tokens, cut into
non-overlapping windows of `window` tokens (512, or the model's longest input when that is shorter);
what is left over at the end is dropped. With BOS every window is [bos] + window - 1 tokens of the
stream. The model scores each window by itself; the NLL is the mean over the window - 1 predicted
tokens of every window, and perplexity = exp(NLL).

Example: 10 tokens, window 4, no BOS: [0 1 2 3] [4 5 6 7], 6 predicted tokens; with BOS b:
[b 0 1 2] [b 3 4 5] [b 6 7 8], 9 predicted tokens.
"""

import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime.errors import UserInputError

PROTOCOL = (
    "whole file as one token stream without special tokens, non-overlapping windows, each scored "
    "alone (with BOS: [bos] + window-1 tokens); NLL is the mean over the window-1 predicted tokens "
    "of every window; perplexity = exp(NLL)"
)
DEFAULT_WINDOW = 512

# Names under which configurations keep the longest input, the usual one first.
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


def read_text(path: str | Path) -> str:
    """A UTF-8 text file as it is, without a byte order mark.

    Raises:
        UserInputError: it is missing, not a regular file, not readable, empty or not text.
    """
    path = Path(path)
    try:
        # A device or pipe could deliver bytes without end; only a regular file has a size.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserInputError(f"text {path} is not a regular file; give a UTF-8 text file")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserInputError(f"text file {path} does not exist") from None
    except OSError as error:
        raise UserInputError(f"text file {path} cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserInputError(
            f"{path} is not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start}); "
            "give plain text, converted to UTF-8"
        ) from None
    if "\0" in text:
        raise UserInputError(
            f"{path} holds binary data (a NUL at character {text.index(chr(0))}); give plain text"
        )
    if not text.strip():
        raise UserInputError(f"{path} is empty; give a file with some text in it")
    return text


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} when there is no such file.

    Raises:
        UserInputError: the file is there but is not a readable JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserInputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserInputError(f"{path} is not valid JSON; get the file again") from None
    if not isinstance(value, dict):
        raise UserInputError(f"{path} holds a JSON {type(value).__name__}, wanted an object")
    return value


class Tokenizer:
    """The tokenizer.json of a model folder, without its habit of inserting special tokens.

    Attributes:
        folder: where it was loaded from.
        bos_id: the token that starts a text, or None.
        eos_ids: the tokens that end a text; generation stops at any of them.
        vocab_size: number of tokens, added ones included.
    """

    def __init__(self, folder: str | Path) -> None:
        """Load tokenizer.json, and the special ids from the configurations beside it.

        Raises:
            UserInputError: the folder has no tokenizer.json, or it cannot be loaded.
        """
        self.folder = Path(folder)
        self._inner = _load(self.folder / "tokenizer.json")
        self._inner.no_truncation()
        self._inner.no_padding()
        self._settings = read_json(self.folder / "tokenizer_config.json")
        configs = [read_json(self.folder / f) for f in ("generation_config.json", "config.json")]
        bos = [self._named("bos_token"), *(i for c in configs for i in _ids(c.get("bos_token_id")))]
        eos = [self._named("eos_token"), *(i for c in configs for i in _ids(c.get("eos_token_id")))]
        self.bos_id: int | None = next((i for i in bos if i is not None), None)
        self.eos_ids: frozenset[int] = frozenset(i for i in eos if i is not None)
        self.vocab_size: int = self._inner.get_vocab_size()

    def _named(self, key: str) -> int | None:
        """Id of a token that tokenizer_config.json names, as text or as {"content": text}."""
        token = self._settings.get(key)
        if isinstance(token, dict):
            token = token.get("content")
        return self._inner.token_to_id(token) if isinstance(token, str) else None

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids (T,) int64 of a text; nothing is inserted."""
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def decode(self, ids: Any) -> str:
        """Text of token ids; special tokens are left out."""
        text: str = self._inner.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def stream(self) -> "TextStream":
        """A decoder that takes one token at a time."""
        return TextStream(self)

    def adds_bos(self) -> bool:
        """True when the model's own way of encoding a text starts it with BOS.

        `add_bos_token` of tokenizer_config.json decides where it is given; else the post-processor.
        """
        stated = self._settings.get("add_bos_token")
        if self.bos_id is None:
            return False
        if isinstance(stated, bool):
            return stated
        ids = self._inner.encode("a", add_special_tokens=True).ids
        plain = self._inner.encode("a", add_special_tokens=False).ids
        return len(ids) > len(plain) and ids[0] == self.bos_id


class TextStream:
    """Turns tokens into text as they come.

    A character may need several tokens: text is held back while it ends in an unfinished one.
    Only the tokens given out last and those held back are decoded again, so a step costs O(1).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Start with no tokens."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._done = 0  # tokens whose text was given out
        self._context = 0  # first token that is decoded again, as context of the next

    def push(self, token: int) -> str:
        """The text that became final with this token, perhaps none."""
        self._ids.append(int(token))
        before, now = self._tail()
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return now[len(before) :]

    def close(self) -> str:
        """What is still held back at the end, an unfinished character shown as U+FFFD."""
        before, now = self._tail()
        self._context = self._done = len(self._ids)
        return now[len(before) :]

    def _tail(self) -> tuple[str, str]:
        before = self._tokenizer.decode(self._ids[self._context : self._done])
        return before, self._tokenizer.decode(self._ids[self._context :])


def wants_bos(folder: str | Path) -> bool:
    """What `--bos auto` means for a model folder: True when its tokenizer itself prepends a BOS."""
    return Tokenizer(folder).adds_bos()


def bos_token(tokenizer: Tokenizer, choice: str) -> int | None:
    """The BOS id that `--bos auto|yes|no` asks for, or None.

    Raises:
        UserInputError: yes, but the tokenizer has none; or another word.
    """
    if choice not in ("auto", "yes", "no"):
        raise UserInputError(f"--bos is {choice!r}, wanted auto, yes or no")
    if choice == "no" or (choice == "auto" and not tokenizer.adds_bos()):
        return None
    if tokenizer.bos_id is None:
        raise UserInputError(
            f"--bos yes: the tokenizer in {tokenizer.folder} has no BOS token; use --bos no"
        )
    return tokenizer.bos_id


def windows(
    ids: NDArray[Any], window: int, max_windows: int | None = None, bos_id: int | None = None
) -> NDArray[np.int64]:
    """Cut a token stream by the protocol.

    Args:
        ids: (T,) integer, the stream.
        window: tokens a window, BOS included; at least 2.
        max_windows: at most so many, from the start; None takes all.
        bos_id: put in front of every window; None for no BOS.

    Returns:
        (W, window) int64.

    Raises:
        UserInputError: the text is shorter than one window, or a number makes no sense.
    """
    check_numbers(window, max_windows)
    taken = window - (bos_id is not None)
    count = len(ids) // taken
    if count == 0:
        raise UserInputError(
            f"the text holds {len(ids)} tokens, wanted at least {taken} for one window; "
            "give a longer text or a smaller --window"
        )
    count = min(count, max_windows or count)
    cut = np.asarray(ids[: count * taken], dtype=np.int64).reshape(count, taken)
    if bos_id is None:
        return cut
    return np.concatenate([np.full((count, 1), bos_id, dtype=np.int64), cut], axis=1)


def check_numbers(window: int | None, max_windows: int | None) -> None:
    """Refuse counts that make no sense; None stands for the default.

    Raises:
        UserInputError: a window of fewer than 2 tokens, or no windows.
    """
    if window is not None and window < 2:
        raise UserInputError(f"--window is {window}, wanted at least 2 (one token is predicted)")
    if max_windows is not None and max_windows < 1:
        raise UserInputError(f"--max-windows is {max_windows}, wanted at least 1")


def max_length(config: Mapping[str, Any]) -> int | None:
    """The longest input of a model by its configuration, in tokens; None where it is not said."""
    inner = config.get("text_config")
    for holder in (config, inner if isinstance(inner, Mapping) else {}):
        for key in _LENGTH_KEYS:
            value = holder.get(key)
            if isinstance(value, int) and value > 0:
                return value
    return None


def default_window(config: Mapping[str, Any]) -> int:
    """512 tokens, or the model's maximum length when that is smaller."""
    return min(DEFAULT_WINDOW, max_length(config) or DEFAULT_WINDOW)


def perplexity_from_nll(nll: float) -> float:
    """The exponential of a mean negative log-likelihood in nats; inf where that leaves float64."""
    return math.exp(nll) if nll < 709.0 else math.nan if math.isnan(nll) else math.inf


def _ids(value: Any) -> list[int]:
    """Token ids from a configuration: one or a list; -1 and null stand for none."""
    found = value if isinstance(value, list) else [value]
    return [i for i in found if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _load(path: Path) -> Any:
    """The `tokenizers` object of a tokenizer.json."""
    import tokenizers

    if not path.is_file():
        raise UserInputError(
            f"{path} does not exist; text needs the model's tokenizer, "
            "give the folder that holds tokenizer.json with --tokenizer"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust side is no Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserInputError(f"{path} cannot be loaded as a tokenizer: {reason}") from None
