"""The texts of errors."""

from __future__ import annotations

import pytest

from switchrun.errors import CorruptCheckpointError, escape, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("wi.weight", "wi.weight"),
        ("Gewürz → 日本", "Gewürz → 日本"),
        ("a\nb\tc\r\n", "a b c  "),
        ("\x1b]0;x\x07\x9b31m", r"\x1b]0;x\x07\x9b31m"),
        ("a\u202eb\u2028\ud800", r"a\u202eb\u2028\ud800"),
        ("\x7f\x00\x85\u2066\u200f\u061c", r"\x7f\x00\x85\u2066\u200f\u061c"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    error = CorruptCheckpointError(text, text)
    assert (error.message, error.hint, str(error)) == (shown, shown, f"{shown} ({shown})")


def test_of_a_long_text_both_ends_are_shown() -> None:
    assert printable("0123456789", 10) == "0123456789"
    assert printable("0123456789a", 10) == "01234…789a"
    assert len(str(CorruptCheckpointError("x" * 10**6))) < 5000


@pytest.mark.parametrize(
    "text",
    [
        "👩\u200d🚀 ❤\ufe0f 🏴\U000e0067\U000e007f",  # joined, coloured, and a flag of tags
        "می\u200cخواهم קְרָא हिन्दी e\u0301",  # joiners and marks of scripts
        "10\u202f000\u00a0€\u3000soft\u00adhyphen",  # spaces that are no control codes
        "\ue000 \U0001fadf",  # private, and younger than Python's tables
        "tab\tand\nline",
    ],
)
def test_writing_of_all_kinds_is_left_alone(text: str) -> None:
    assert escape(text) == text
    assert printable(text) == text.replace("\t", " ").replace("\n", " ")


def test_every_code_is_either_kept_or_written_out() -> None:
    for code in range(0x11_0000):
        shown = escape(chr(code))
        assert shown == chr(code) or (shown.isascii() and shown.isprintable() and shown.startswith("\\"))
