"""The texts of errors."""

from __future__ import annotations

import pytest

from switchrun.errors import CorruptCheckpointError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("wi.weight", "wi.weight"),
        ("Gewürz → 日本", "Gewürz → 日本"),
        ("a\nb\tc\r\n", "a b c  "),
        ("\x1b]0;x\x07\x9b31m", r"\x1b]0;x\x07\x9b31m"),
        ("a\u202eb\u2028\ud800", r"a\u202eb\u2028\ud800"),
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
