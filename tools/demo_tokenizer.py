"""Train the SentencePiece vocabulary and write it in both forms that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
from demo_corpus import UNIT
from transformers import AutoTokenizer

PIECES = 3996
SENTINELS = 100


def train(examples: list[str], folder: Path) -> None:
    """Train a unigram SentencePiece model with T5's ids (pad 0, eos 1, unk 2, sentinels last) into folder."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(examples),
        model_prefix=str(folder / "spiece"),
        vocab_size=PIECES,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        character_coverage=1.0,
        num_threads=2,
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": SENTINELS, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


class Units:
    """Words and marks as token ids, memoised.

    The model must train on exactly what the tokenizer makes of a text with blanks, and after a sentinel the
    tokenizer always starts a new word ("▁" before the full stop of ``<extra_id_0>.``). So a unit has
    three spellings: after a space, glued to the unit before it, and after a sentinel (as after a space).
    """

    def __init__(self, folder: Path) -> None:
        """Load the vocabulary from a folder that train() wrote."""
        self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
        self._space = self._pieces.piece_to_id("▁")
        self._cache: dict[tuple[str, bool], list[int]] = {}
        self.size = PIECES + SENTINELS

    def sentinel(self, index: int) -> int:
        """The id of ``<extra_id_index>``: T5 numbers them from the end of the vocabulary."""
        return self.size - 1 - index

    def ids(self, unit: str, spaced: bool) -> list[int]:
        """Token ids of one unit, with a space before it or glued to the unit before."""
        key = (unit, spaced)
        if key not in self._cache:
            self._cache[key] = self._encode(unit, spaced)
        return self._cache[key]

    def _encode(self, unit: str, spaced: bool) -> list[int]:
        if spaced:
            return list(self._pieces.encode(unit))
        # SentencePiece always puts a space first. A character of another script in front takes that space,
        # and no piece ever reaches across two scripts.
        lead = "." if unit[0].isalnum() else "a"
        return list(self._pieces.encode(lead + unit))[len(self._pieces.encode(lead)) :]


def split_units(text: str) -> list[tuple[str, bool]]:
    """Words and marks of a text, each with whether a space stands before it."""
    return [(m.group(), m.start() == 0 or text[m.start() - 1] == " ") for m in UNIT.finditer(text)]
