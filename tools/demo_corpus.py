"""Clean the fetched text, leave out what the repository quotes, and split off held-out passages."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from demo_sources import SOURCES, Fetched, fetch, passages, rough_words, split_sentences

UNIT = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*|\d+|[^\w\s]+|\S")
SENTINEL = re.compile(r"<extra_id_\d+>")
# A demo is for every desk: what these words are about is left out, whatever the source says of it.
ADULT = re.compile(
    r"\b(?:sex(?:es|ual\w*)?|genital\w*|orgasm\w*|semen|ejaculat\w*|penis\w*|vagina\w*|copulat\w*|prostitut\w*|"
    r"harlots?|whor\w+|rap(?:e|ed|es|ist|ists)|incest\w*|masturbat\w*|sodom\w*|concubines?|fornicat\w*|foreskins?|"
    r"circumcis\w*|erotic\w*|nud(?:e|ity)|suicid\w*|homosexual\w*|negro\w*|jew\w*|slaves?)\b"
)
MAX_UNITS = 60
MIN_UNITS = 5
HELD_OUT_PERCENT = 2


@dataclass
class Corpus:
    """Training and held-out examples (strings of one or more sentences) and how they came about."""

    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)


def clean(text: str) -> str:
    """Plain ASCII punctuation, one space between words, no accents."""
    text = text.replace("--", " - ").replace("`", "'").replace("’", "'").replace("‘", "'")
    text = text.replace("“", '"').replace("”", '"').replace("—", " - ").replace("–", "-")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return " ".join(text.split())


def normalise(text: str) -> str:
    """The words alone, in lower case: what two spellings of one sentence have in common."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


class Quoted:
    """Sentences of four words or more that README, docs and tests show.

    One with blanks counts with every filling of up to four words a blank, if five or more of its words are given.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        """Collect quoted sentences from whole files' texts."""
        self.hashes: set[str] = set()
        self.patterns: set[re.Pattern[str]] = set()
        for text in texts:
            pieces = re.split(r"[\"`\n|]|\\n", text)
            pieces += split_sentences(text.replace("\n", " ")) + [t for p in pieces for t in split_sentences(p)]
            for piece in pieces:
                self._add(piece)

    def _add(self, piece: str) -> None:
        if SENTINEL.search(piece):
            words = [normalise(part) for part in SENTINEL.split(piece)]
            if sum(len(part.split()) for part in words) >= 5:
                gap = r"(?: ?\b[a-z0-9]+){0,4} ?"
                self.patterns.add(re.compile(gap.join(re.escape(part) for part in words)))
        elif len(normalise(piece).split()) >= 4:
            self.hashes.add(_digest(normalise(piece)))

    def __contains__(self, sentence: str) -> bool:
        """Whether this sentence may not be trained on."""
        plain = normalise(sentence)
        return _digest(plain) in self.hashes or any(p.fullmatch(plain) for p in self.patterns)


def read_quoted(root: Path) -> Quoted:
    """Read what README.md, docs and tests of the repository at root quote."""
    files = [root / "README.md", *root.glob("docs/**/*.md"), *root.glob("tests/**/*.py")]
    return Quoted(path.read_text(encoding="utf-8") for path in sorted(files) if path.exists())


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _chunks(sentences: list[str]) -> list[str]:
    """Join neighbouring sentences to examples of up to MAX_UNITS words and marks, dropping longer ones."""
    examples: list[str] = []
    current: list[str] = []
    used = 0
    for sentence in [*sentences, ""]:
        size = len(UNIT.findall(sentence)) if sentence else MAX_UNITS + 1
        if used + size > MAX_UNITS:
            if current:
                examples.append(" ".join(current))
            current, used = [], 0
        if size <= MAX_UNITS:
            current.append(sentence)
            used += size
    return [example for example in examples if len(UNIT.findall(example)) >= MIN_UNITS]


def build(root: Path, work: Path) -> Corpus:
    """Fetch, clean, exclude, split and deduplicate.

    Args:
        root: the repository, whose quoted sentences are left out.
        work: a folder for downloads; nothing of it belongs into the repository.

    Returns:
        The corpus, with its figures in ``facts``.
    """
    packages = [fetch(source, work / "downloads") for source in SOURCES]
    list(passages(packages[0], work))  # unpacks WordNet, whose marks for rough words are needed first
    rough = rough_words(work / "wordnet/usr/share/wordnet")
    quoted = read_quoted(root)
    corpus = Corpus()
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    for package in packages:
        for passage in passages(package, work):
            held_out = int(_digest("".join(passage)), 16) % 100 < HELD_OUT_PERCENT
            kept = _keep(passage, rough, quoted, seen, counts)
            target = corpus.held_out if held_out else corpus.train
            chunks = _chunks(kept)
            target.extend(chunks)
            counts[f"{package.source.name} examples"] += len(chunks)
            counts[f"{package.source.name} words"] += sum(len(chunk.split()) for chunk in chunks)
    corpus.facts = {
        "counts": dict(counts),
        "train_examples": len(corpus.train),
        "held_out_examples": len(corpus.held_out),
        "sources": [_describe(package) for package in packages],
    }
    return corpus


def _keep(passage: list[str], rough: frozenset[str], quoted: Quoted, seen: set[str], counts: Counter[str]) -> list[str]:
    """The sentences of a passage that may be used: not quoted, not rough, not seen before."""
    kept = []
    for sentence in map(clean, passage):
        if sentence in quoted:
            counts["excluded as quoted"] += 1
        elif ADULT.search(sentence.lower()) or rough.intersection(normalise(sentence).split()):
            counts["excluded as rough"] += 1
        elif _digest(normalise(sentence)) in seen:
            counts["excluded as repeated"] += 1
        else:
            seen.add(_digest(normalise(sentence)))
            kept.append(sentence)
    return kept


def _describe(package: Fetched) -> dict[str, str]:
    return {**asdict(package.source), "file": package.path.name, "sha256": package.sha256}


def leaks(corpus: Corpus, root: Path) -> list[str]:
    """Sentences of the training text that the repository quotes by now; there must be none."""
    quoted = read_quoted(root)
    return sorted({s for example in corpus.train for s in [example, *split_sentences(example)] if s in quoted})


def save_facts(corpus: Corpus, path: Path) -> None:
    """Write the corpus's figures as JSON."""
    path.write_text(json.dumps(corpus.facts, indent=1) + "\n", encoding="utf-8")
