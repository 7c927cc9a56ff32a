"""A corpus as one array of token ids on disk: tokenised once, then mapped into memory.

`KEY.tokens` holds the ids, uint16 or uint32 by the size of the vocabulary; `KEY.json` their number,
the largest id and a checksum. KEY depends on the corpus, the tokenizer and how documents are
joined. A cache that is truncated, damaged or of another version is built again. Both files are
written under a temporary name and renamed, so an interrupted run leaves nothing that looks whole.

Text is tokenised in pieces of about 64 Ki characters, so that memory does not grow with the corpus.
They are cut between words, where byte-level tokenizers (GPT-2, LLaMA 3, Qwen, SmolLM) give the very
tokens of the whole text; others may differ by a token a piece.
"""

import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elsa_compile.documents import documents, head, is_dataset_name
from elsa_compile.errors import UserInputError
from elsa_compile.progress import ProgressSink
from elsa_compile.runtime.text import Tokenizer

log = logging.getLogger(__name__)

_VERSION = 1
_PIECE = 64 << 10  # characters tokenised as one text
_BATCH = 1 << 20  # characters handed to the tokenizer at once: about 100 bytes each while in work
_BLOCK = 4 << 20
_EDGE = 64 << 10  # bytes at both ends of a file that enter its key


def cached_tokens(
    source: Path,
    tokenizer: Tokenizer,
    cache: Path,
    *,
    separator: int | None = None,
    field: str = "text",
    progress: ProgressSink | None = None,
) -> tuple[NDArray[Any], int]:
    """Token ids of a corpus, from the cache or built into it.

    Args:
        source: as for `documents`.
        tokenizer: of the model.
        cache: folder for the files; made when it is not there.
        separator: id put after every document, whose closing line ends are left out then; None
            takes the corpus as one text, as evaluation does.
        field: name of the text in a row.
        progress: who is told while the cache is built.

    Returns:
        ids (T,) uint16 or uint32, read-only and mapped from disk; and the largest of them.

    Raises:
        UserInputError: the corpus cannot be read, or the cache cannot be written.
    """
    if not is_dataset_name(source):
        head(source, 1, field, keep=False)  # what is wrong with it is best said there
    path = cache / f"{_key(source, tokenizer, separator, field)}.tokens"
    meta = _meta(path)
    if meta is None:
        log.info("tokenising %s into %s", source, path)
        chunks = _encoded(documents(source, field), tokenizer, separator)
        sink = progress or ProgressSink()
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with sink.stage("tokenise", None, "tokens") as stage:
                meta = _build(path, _told(chunks, stage), _dtype(tokenizer, separator))
        except OSError as error:
            raise UserInputError(
                f"token cache {cache} cannot be written: {error.strerror or error}; give another "
                "folder"
            ) from None
    if meta["count"] == 0:
        raise UserInputError(f"{source} holds no token; give data with some text in it")
    ids = np.memmap(path, dtype=meta["dtype"], mode="r", shape=(int(meta["count"]),))
    return ids, int(meta["largest"])


# --- The files ------------------------------------------------------------------------------


def _key(source: Path, tokenizer: Tokenizer, separator: int | None, field: str) -> str:
    """A name that changes with everything the ids depend on."""
    import tokenizers

    facts = [str(_VERSION), tokenizers.__version__, str(separator), field]
    digest = hashlib.sha256("\0".join([*facts, *_identity(source)]).encode())
    digest.update((tokenizer.folder / "tokenizer.json").read_bytes())
    return digest.hexdigest()[:32]


def _identity(source: Path) -> Iterator[str]:
    """What tells a corpus from others, and from itself before it was edited.

    A dataset of the hub is known by its name alone: its rows are not asked for again.
    """
    if is_dataset_name(source):
        yield source.as_posix()
        return
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        if not path.is_file():
            continue
        facts = path.stat()
        with path.open("rb") as file:
            edges = file.read(_EDGE)
            file.seek(max(facts.st_size - _EDGE, 0))
            edges += file.read(_EDGE)
        seen = f"{zlib.crc32(edges):08x}"
        yield f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns} {seen}"


def _dtype(tokenizer: Tokenizer, separator: int | None) -> str:
    """The smallest of two types that holds every id; ids need not be dense."""
    known = _library(tokenizer).get_vocab(with_added_tokens=True).values()
    largest = max(max(known, default=0), separator or 0)
    return "<u2" if largest < 1 << 16 else "<u4"


def _build(path: Path, chunks: Iterable[NDArray[Any]], dtype: str) -> dict[str, Any]:
    """Write the ids and their description; returns the description."""
    count, largest, checksum = 0, 0, 0
    handle, name = tempfile.mkstemp(prefix=path.stem, suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for ids in chunks:
                content = ids.astype(dtype).tobytes()
                file.write(content)
                checksum = zlib.crc32(content, checksum)
                count += len(ids)
                largest = max(largest, int(ids.max()))
        meta = {"count": count, "largest": largest, "dtype": dtype, "crc32": checksum}
        partial = Path(name + ".json")
        partial.write_text(json.dumps(meta), encoding="utf-8")
        os.replace(name, path)
        os.replace(partial, path.with_suffix(".json"))
    finally:
        for left in (name, name + ".json"):
            with suppress(FileNotFoundError):
                os.unlink(left)
    return meta


def _meta(path: Path) -> dict[str, Any] | None:
    """The description of a whole cache; None when it has to be built."""
    try:
        meta = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        size = path.stat().st_size
        wanted = int(meta["count"]) * {"<u2": 2, "<u4": 4}[meta["dtype"]]
        checksum = 0
        with path.open("rb") as file:
            while size == wanted and (block := file.read(_BLOCK)):
                checksum = zlib.crc32(block, checksum)
        whole: bool = size == wanted and checksum == meta["crc32"] and meta["largest"] >= 0
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        whole = False
    if not whole:
        log.warning("token cache %s is damaged; it is built again", path)
        return None
    return dict(meta)


# --- Tokens ---------------------------------------------------------------------------------


def _library(tokenizer: Tokenizer) -> Any:
    """The `tokenizers` object of the same file: it takes many texts at once."""
    import tokenizers

    opened = tokenizers.Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
    opened.no_truncation()
    opened.no_padding()
    return opened


def _told(chunks: Iterable[NDArray[Any]], stage: Any) -> Iterator[NDArray[Any]]:
    for ids in chunks:
        stage.advance(len(ids))
        yield ids


def _encoded(
    texts: Iterable[str], tokenizer: Tokenizer, separator: int | None
) -> Iterator[NDArray[np.int64]]:
    """Token ids (T,) int64 of all texts in order, a batch of pieces at a time."""
    encode = _library(tokenizer).encode_batch_fast
    for batch in _batches(_pieces(texts) if separator is None else _closed(texts)):
        found = encode([piece for piece, _ in batch], add_special_tokens=False)
        ids: list[int] = []
        for encoding, (_, closes) in zip(found, batch, strict=True):
            ids += encoding.ids
            if closes and separator is not None:
                ids.append(separator)
        if ids:
            yield np.array(ids, dtype=np.int64)


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces in lists of about _BATCH characters."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0]) + 16  # a million empty documents are work too
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _closed(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Pieces of every document by itself, and whether the document ends with the piece."""
    for text in texts:
        pieces = [piece for piece, _ in _pieces([text.rstrip("\r\n")])]
        for index, piece in enumerate(pieces):
            yield piece, index == len(pieces) - 1


def _pieces(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The texts joined and cut again into pieces of about _PIECE characters; none closes."""
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size <= _PIECE:
            continue
        joined, start = "".join(held), 0
        while len(joined) - start > _PIECE:
            stop = _cut(joined, start)
            yield joined[start:stop], False
            start = stop
        held, size = [joined[start:]], len(joined) - start
    if size:
        yield "".join(held), False


def _cut(text: str, start: int) -> int:
    """Where to end a piece that begins at `start`, so that its tokens are those of the whole text.

    Best behind a single line end between two words, or before a single space between two words,
    which goes with the second. Behind the last of several line ends it is not quite as good: GPT-2
    takes the last one of them for itself.
    """
    low, high = start + _PIECE // 2, start + _PIECE
    for mark in "\n ":
        place = text.rfind(mark, low, high)
        for _ in range(1000):
            if place < 0:
                break
            if (
                text[place - 1].isprintable()
                and text[place + 1].isalpha()
                and text[place - 1] != " "
            ):
                return place + (mark == "\n")
            place = text.rfind(mark, low, place)
    place = text.rfind("\n", low, high)
    return place + 1 if place >= 0 else high
