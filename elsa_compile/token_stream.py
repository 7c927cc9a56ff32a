"""What a training pass reads: step number in, batch out.

Three streams, one interface. `batch(step, batch_size)` depends on nothing but the data, the seed
and its arguments, so a run that is resumed at step 1000 sees what it would have seen. An epoch
draws everything once, in an order of its own; batches run on over the end of an epoch.
`held_out()` is never drawn.

    TokenStream    windows of a corpus, for language models        `text_stream`
    PythonStream   token batches from any Python iterable          `python_stream`
    SampleStream   rows of named inputs, for any model             `sample_stream`
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elsa_compile.batch_streams import PythonStream, SampleStream, python_stream, sample_stream
from elsa_compile.documents import documents
from elsa_compile.errors import UserInputError
from elsa_compile.program import Program
from elsa_compile.progress import ProgressSink
from elsa_compile.row_order import held_out_count, mixed, permuted, places
from elsa_compile.runtime import text as text_module
from elsa_compile.token_cache import cached_tokens

__all__ = [
    "PythonStream",
    "SampleStream",
    "TokenBatches",
    "TokenStream",
    "documents",
    "held_out_count",
    "permuted",
    "python_stream",
    "sample_stream",
    "text_stream",
]


class TokenBatches(Protocol):
    """What a language model trains on."""

    def batch(self, step: int, batch_size: int) -> Tensor:
        """Token ids (batch_size, S) int64 of a step, counted from 0."""

    def held_out(self) -> Tensor | None:
        """Windows (V, S) int64 that are never drawn; None when the source keeps none apart."""


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Windows of a corpus.

    The corpus is one stream of tokens. Its last `held_out_count` windows are held out; the tokens
    before them, a multiple of a window's, form a ring, which each epoch cuts into windows from
    another offset: every training token is drawn once an epoch, and windows do not always begin at
    the same words. (One window an epoch may lie across the ring's seam.)

    Attributes:
        tokens: (T,) unsigned integer, the corpus; may be mapped from disk.
        seq_len: tokens of a window, BOS included.
        seed: of the order.
        bos_id: starts every window; None for no BOS.
        source: where the text came from, for messages.

    Raises:
        UserInputError: a window of fewer than 2 tokens, or a corpus shorter than one window.
    """

    tokens: NDArray[Any] = field(repr=False)
    seq_len: int
    seed: int = 0
    bos_id: int | None = None
    source: str = "text"
    _keep: object = field(default=None, repr=False)  # the temporary folder that `tokens` maps

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.seq_len < 2:
            raise UserInputError(
                f"the window is {self.seq_len}, wanted at least 2 (one token is predicted)"
            )
        if len(self.tokens) < self.taken:
            raise UserInputError(
                f"{self.source}: the text holds {len(self.tokens)} tokens, wanted at least "
                f"{self.taken} for one window; give a longer text or a smaller --window"
            )

    @property
    def taken(self) -> int:
        """Tokens of the corpus in a window."""
        return self.seq_len - (self.bos_id is not None)

    @property
    def held_out_windows(self) -> int:
        """Number of windows that are never drawn."""
        return held_out_count(len(self.tokens) // self.taken)

    @property
    def windows(self) -> int:
        """Number of training windows, which is what an epoch draws."""
        return len(self.tokens) // self.taken - self.held_out_windows

    def batch(self, step: int, batch_size: int) -> Tensor:
        """Windows (batch_size, seq_len) int64 of a step, counted from 0."""
        starts = [
            mixed(self.seed, epoch, 1) % self.taken + window * self.taken
            for epoch, window in places(step, batch_size, self.windows, self.seed)
        ]
        return self._cut(np.array(starts), self.windows * self.taken)

    def held_out(self) -> Tensor:
        """Windows (V, seq_len) int64 from the end of the corpus, the same for every seed."""
        first = self.windows * self.taken
        starts = first + self.taken * np.arange(self.held_out_windows)
        return self._cut(starts, first + self.held_out_windows * self.taken)

    def _cut(self, starts: NDArray[Any], ring: int) -> Tensor:
        places = (starts[:, None] + np.arange(self.taken)) % ring
        cut = torch.from_numpy(self.tokens[places].astype(np.int64))
        if self.bos_id is None:
            return cut
        return torch.cat([torch.full((len(cut), 1), self.bos_id), cut], dim=1)


def text_stream(
    program: Program,
    source: str | Path,
    seq_len: int | None = None,
    *,
    seed: int = 0,
    bos: str = "auto",
    separate: bool = False,
    text_field: str = "text",
    cache: Path | None = None,
    progress: ProgressSink | None = None,
) -> TokenStream:
    """Windows of a corpus, tokenised with the model's own tokenizer.

    By default the corpus is cut as evaluation cuts it (`runtime.text.PROTOCOL`): documents follow
    each other as they stand in the file, no special token between them, and every window starts
    with BOS exactly where evaluation's windows do. A pruned model is then trained on what it is
    measured on. `separate` puts the tokenizer's EOS after every document instead, for models that
    are to keep ending their answers.

    Args:
        program: a language model with a tokenizer.
        source: as for `documents`.
        seq_len: tokens of a window, BOS included; None takes 512 or the model's longest input.
        seed: of the order of windows.
        bos: "auto", "yes" or "no": whether windows start with BOS.
        separate: put EOS after every document.
        text_field: name of the text in a JSON object or a dataset's row.
        cache: folder for the tokens, reused when the same corpus comes again; None takes a
            temporary folder that lives as long as the stream.
        progress: who is told while the corpus is tokenised.

    Raises:
        UserInputError: no tokenizer, a corpus that cannot be read or is too short, a window longer
            than the model's longest input, a tokenizer that is not the model's.
    """
    if program.folder is None:
        raise UserInputError(
            f"{source}: text needs the model's tokenizer, but {program.source} comes without one; "
            "give the folder that holds tokenizer.json with --tokenizer"
        )
    config = program.config or {}
    length = _window_length(config, seq_len)
    tokenizer = text_module.Tokenizer(program.folder)
    start = text_module.bos_token(tokenizer, bos)
    keep = None
    if cache is None:
        keep = tempfile.TemporaryDirectory(prefix="elsa-tokens-")
        cache = Path(keep.name)
    tokens, largest = cached_tokens(
        Path(source),
        tokenizer,
        cache,
        separator=_eos(tokenizer) if separate else None,
        field=text_field,
        progress=progress,
    )
    size = config.get("vocab_size")
    if size and largest >= int(size):
        raise UserInputError(
            f"{source}: the tokenizer gives token {largest}, but the model knows {size}; is this "
            "the model's own tokenizer?"
        )
    return TokenStream(tokens, length, seed, start, str(source), keep)


def _window_length(config: Mapping[str, Any], seq_len: int | None) -> int:
    longest = text_module.max_length(config)
    length = text_module.default_window(config) if seq_len is None else seq_len
    if longest is not None and length > longest:
        raise UserInputError(f"the window is {length}, but the model takes at most {longest}")
    return length


def _eos(tokenizer: text_module.Tokenizer) -> int:
    """The token that ends a document: the only one, or that of tokenizer_config.json."""
    found = set(tokenizer.eos_ids)
    if len(found) > 1:
        stated = text_module.read_json(tokenizer.folder / "tokenizer_config.json").get("eos_token")
        word = stated.get("content") if isinstance(stated, dict) else stated
        import tokenizers

        opened = tokenizers.Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
        found &= {opened.token_to_id(word)} if isinstance(word, str) else set()
    if len(found) != 1:
        raise UserInputError(
            f"the tokenizer in {tokenizer.folder} names no single EOS token to put between "
            "documents; leave them unseparated"
        )
    return found.pop()
