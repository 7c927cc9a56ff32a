"""Documents of a corpus, one after the other: text files, JSON lines, `datasets`.

    documents("train.txt")                     plain UTF-8, a blank line between documents
    documents("train.jsonl")                   one object a line, the text in its field "text"
    documents("train.txt.gz")                  either of them, compressed with gzip
    documents("saved/")                        a folder written by datasets' save_to_disk
    documents("datasets:owner/name")           a dataset of the hub, its split "train"
    documents("datasets:owner/name:config:split")

Nothing here holds more than one document and one block of the file, whatever the corpus' size, and
everything is taken for hostile: the size of a line is bounded before it is parsed.
"""

import codecs
import gzip
import json
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO, Any, cast

from elsa_compile.errors import UserInputError
from elsa_compile.runtime import text as text_module

PREFIX = "datasets:"
BOUNDARY = "\n\n"  # closes a document that is no plain text
MAX_DOCUMENT = 4 << 20  # characters of plain text without a blank line before it is cut anyway
MAX_LINE = 64 << 20  # bytes of a JSON line

_BLOCK = 1 << 20
_ROWS = 64  # of a dataset, fetched together
_CHECKED = 64 << 20  # characters of plain text that `check_source` reads
_BLANK = re.compile(r"\n(?:[ \t\r]*\n)+")
_INK = re.compile(r"[^ \t\r]")


def documents(source: str | Path, field: str = "text") -> Iterator[str]:
    r"""The documents of a corpus, in order.

    A document of plain text carries the blank lines that close it, so that `"".join(documents(f))`
    is the file, byte order mark excepted; any other document is closed by `BOUNDARY`. Example: the
    file "a\nb\n\nc" holds the documents "a\nb\n\n" and "c". Documents without a visible character
    are left out. Plain text without a blank line for 4 Mi characters is cut at a line's end.

    Args:
        source: a file, a folder, or `datasets:NAME[:CONFIG[:SPLIT]]`; see the module.
        field: name of the text in a JSON object or a dataset's row.

    Raises:
        UserInputError: while iterating; the source is missing, empty, or not what its name says.
    """
    path = Path(source)
    if is_dataset_name(path):
        found = _hub(path.as_posix(), field)
    elif path.is_dir():
        found = _saved(path, field)
    elif _is_json(path):
        found = _json_lines(path, field)
    else:
        found = _plain(path)
    empty = True
    for document in found:
        if not document.isspace():
            empty = False
            yield document
    if empty:
        raise UserInputError(f"{source} is empty; give data with some text in it")


def is_dataset_name(source: Path) -> bool:
    """True for `datasets:NAME`, unless a file is called so."""
    return source.as_posix().startswith(PREFIX) and not source.exists()


def is_plain_text(source: Path) -> bool:
    """True for what is read as one uncompressed text: no folder, JSON lines, gzip or dataset."""
    named = source.name.endswith(".gz") or _is_json(source)
    return not (named or is_dataset_name(source) or source.is_dir())


def check_source(source: Path, field: str = "text") -> None:
    """Refuse what cannot be read, before anything expensive starts.

    Plain text is read for its first 64 Mi characters, of anything else the first document.

    Raises:
        UserInputError: as `documents`.
    """
    head(source, _CHECKED if is_plain_text(source) else 1, field, keep=False)


def head(source: Path, limit: int, field: str = "text", keep: bool = True) -> str:
    """The first documents as one text, as many as make `limit` characters.

    With `keep` off they are read and forgotten, and the text is empty.
    """
    parts: list[str] = []
    size = 0
    for document in documents(source, field):
        size += len(document)
        if keep:
            parts.append(document)
        if size >= limit:
            break
    return "".join(parts)


def _is_json(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz"))


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, uncompressed; whatever goes wrong while reading is one sentence."""
    try:
        # A device or pipe could deliver bytes without end; only a regular file has a size.
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserInputError(f"text {path} is not a regular file; give a UTF-8 text file")
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield cast(IO[bytes], file)
    except FileNotFoundError:
        raise UserInputError(
            f"text file {path} does not exist; a dataset of the hub is written {PREFIX}NAME"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserInputError(f"{path} is not a whole gzip file ({error}); get it again") from None
    except OSError as error:
        raise UserInputError(f"text file {path} cannot be read: {error.strerror}") from None


# --- Plain text -----------------------------------------------------------------------------


def _plain(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, offset, characters, begins = "", 0, 0, True
    with _opened(path) as file:
        while True:
            block = file.read(_BLOCK)
            read = _decoded(path, decoder, block, offset)
            if begins and read:
                read, begins = read.removeprefix("\ufeff"), False
            if "\0" in read:
                where = characters + read.index("\0")
                raise UserInputError(
                    f"{path} holds binary data (a NUL at character {where}); give plain text"
                )
            held += read
            offset += len(block)
            characters += len(read)
            if not block:
                break
            start = 0
            for stop in _boundaries(held):
                yield held[start:stop]
                start = stop
            held = held[start:]
    if held:
        yield held


def _decoded(path: Path, decoder: codecs.IncrementalDecoder, block: bytes, offset: int) -> str:
    """The next characters; `offset` counts the bytes before `block`."""
    waiting = len(decoder.getstate()[0])  # bytes of a character that the last block began
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        raise UserInputError(
            f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x} at offset "
            f"{offset - waiting + error.start}); give plain text, converted to UTF-8"
        ) from None


def _boundaries(held: str) -> Iterator[int]:
    """Where documents end in the text read so far; the last document may go on and is left."""
    start = 0
    for match in _BLANK.finditer(held):
        stop = match.end()
        # Blank lines that reach the end may go on in the next block; a text may begin with some.
        if _INK.search(held, stop) and not held[start:stop].isspace():
            yield from _cuts(held, start, stop)
            yield stop
            start = stop
    yield from _cuts(held, start, len(held))


def _cuts(held: str, start: int, stop: int) -> Iterator[int]:
    """Ends of lines that cut held[start:stop] into parts of at most MAX_DOCUMENT characters."""
    while stop - start > MAX_DOCUMENT:
        line = held.rfind("\n", start + MAX_DOCUMENT // 2, start + MAX_DOCUMENT)
        start = line + 1 if line >= 0 else start + MAX_DOCUMENT
        yield start


# --- JSON lines -----------------------------------------------------------------------------


def _json_lines(path: Path, field: str) -> Iterator[str]:
    with _opened(path) as file:
        for number in count(1):
            line = file.readline(MAX_LINE + 1)
            if not line:
                return
            where = f"{path} line {number}"
            if len(line) > MAX_LINE:
                raise UserInputError(
                    f"{where} is longer than {MAX_LINE >> 20} MiB; split it into documents"
                )
            if not line.isspace():
                yield _text_of(where, _parsed(where, line), field) + BOUNDARY


def _parsed(where: str, line: bytes) -> dict[str, Any]:
    """A JSON line as an object."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserInputError(
            f"{where} is not UTF-8 (byte 0x{line[error.start]:02x}); convert the file to UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise UserInputError(
            f"{where} is not valid JSON ({error.msg} at column {error.colno}); wanted one JSON "
            "object a line"
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, nesting without end
        raise UserInputError(f"{where} holds JSON too large to read; remove the line") from None
    if not isinstance(value, dict):
        raise UserInputError(
            f"{where} holds a JSON {type(value).__name__}, wanted an object with its text in a "
            "field"
        )
    return value


def _text_of(where: str, row: dict[str, Any], field: str) -> str:
    """The text in `field` of a row, proper Unicode."""
    if field not in row:
        names = ", ".join(repr(str(name)) for name in list(row)[:20]) or "none"
        raise UserInputError(
            f"{where} has no field {field!r} (its fields: {names}); rename the one that holds the "
            "text"
        )
    value = row[field]
    if not isinstance(value, str):
        raise UserInputError(
            f"{where}: field {field!r} holds {type(value).__name__}, wanted text; leave the row out"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserInputError(
            f"{where}: field {field!r} holds half of a surrogate pair, which is no text; repair "
            "the line"
        ) from None
    return value


# --- Datasets -------------------------------------------------------------------------------


def _saved(folder: Path, field: str) -> Iterator[str]:
    """Rows of a folder that save_to_disk wrote: a dataset, or the split "train" of several."""
    if (folder / "dataset_dict.json").is_file():
        splits = text_module.read_json(folder / "dataset_dict.json").get("splits")
        names = sorted(str(name) for name in splits) if isinstance(splits, list) else []
        if "train" not in names and len(names) != 1:
            raise UserInputError(
                f"{folder} holds the splits {', '.join(names) or 'none'}; give the folder of one "
                f"of them, as in {folder / (names or ['train'])[0]}"
            )
        folder = folder / ("train" if "train" in names else names[0])
    if not (folder / "state.json").is_file():
        raise UserInputError(
            f"folder {folder} is no dataset written by save_to_disk (it has no state.json); give "
            "one, or a .txt or .jsonl file"
        )
    import datasets

    try:
        opened = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow and datasets raise of all kinds
        raise UserInputError(f"dataset {folder} cannot be read: {_reason(error)}") from None
    yield from _rows(f"dataset {folder}", opened, field)


def _hub(name: str, field: str) -> Iterator[str]:
    """Rows of a dataset of the hub, fetched while they are read."""
    repository, config, split = (*name.removeprefix(PREFIX).split(":", 2), "", "")[:3]
    if not repository:
        raise UserInputError(f"{name!r} names no dataset, wanted {PREFIX}NAME[:CONFIG[:SPLIT]]")
    import datasets

    try:
        opened = datasets.load_dataset(
            repository, config or None, split=split or "train", streaming=True
        )
    except Exception as error:
        raise UserInputError(
            f"dataset {repository} cannot be opened: {_reason(error)}; wanted "
            f"{PREFIX}NAME[:CONFIG[:SPLIT]] and the network"
        ) from None
    yield from _rows(f"dataset {repository}", opened, field)


def _rows(where: str, opened: Any, field: str) -> Iterator[str]:
    if opened.column_names and field in opened.column_names:
        opened = opened.select_columns([field])  # images and the like are not even decoded
    number = 0
    try:
        for rows in opened.iter(batch_size=_ROWS):
            texts = rows.get(field) or [None] * max(map(len, rows.values()), default=0)
            for text in texts:
                number += 1
                row = {field: text} if field in rows else dict.fromkeys(rows)
                yield _text_of(f"{where} row {number}", row, field) + BOUNDARY
    except UserInputError:
        raise
    except Exception as error:
        raise UserInputError(f"{where} fails after row {number}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """The first line of what another library says."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
