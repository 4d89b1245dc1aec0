"""safetensors headers: what the library refuses is refused, and what is meant to be read takes little memory."""

from __future__ import annotations

import itertools
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from switchrun.checkpoint.files import parse_json
from switchrun.errors import CorruptCheckpointError
from tests.conftest import ROOT
from tests.support.headers import read_safetensors

sys.path.insert(0, str(ROOT / "tools"))

import fuzz_headers

TWO = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[4],"data_offsets":[8,12]}'
FINE = "{" + TWO + "}"


def write(path: Path, header: str | bytes, data: bytes = bytes(12)) -> Path:
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_header_that_is_right(tmp_path: Path) -> None:
    """Else the tests below would show nothing."""
    for header in (FINE, f" {FINE}\n  ", '{"__metadata__":{"a":"\\ud83d\\ude00, -1"},' + TWO + "}"):
        assert list(read_safetensors(write(tmp_path / "x", header))) == ["a", "b"]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (FINE.replace("[8,12]", "[4,8]"), "tensor b begins at byte"),
        (FINE.replace("[8,12]", "[9,13]"), r"truncated: tensor b ends|begins at byte"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "its tensors end at byte"),
        ('{"b":{"dtype":"U8","shape":[4],"data_offsets":[8,12]}}', "tensor b begins at byte"),
        ("{}", "its tensors end at byte"),
        (FINE.replace('"U8"', '"X8"'), "stored as X8, which is no known dtype"),
        (FINE.replace('"U8"', '"u8"'), "no known dtype"),
        (FINE.replace("[4]", "[4,-0]"), "a number is negative"),
        (FINE.replace("[4]", "[4,1.0]"), "malformed"),
        (FINE.replace("[4]", "[4,NaN]"), "malformed"),
        (FINE.replace("[4]", "[4,true]"), "malformed"),
        (FINE.replace("[4]", "{}"), "malformed"),
        (FINE.replace("[4]", '""'), "malformed"),
        (FINE.replace("[8,12]", "[8,12,12]"), "malformed"),
        (FINE.replace("[8,12]", '{"8":8,"12":12}'), "malformed"),
        (FINE.replace("[4]", f"[{1 << 62},{1 << 62},0]").replace("[8,12]", "[8,8]"), "takes what is impossible"),
        (FINE.replace("[4]", "[" + "9" * 5000 + "]"), "header is not valid"),
        ("{" + TWO + "," + TWO + "}", "a name occurs twice"),
        (FINE.replace('"dtype":"U8"', '"dtype":"U8","dtype":"U8"'), "a name occurs twice"),
        (FINE.replace('"dtype":"U8"', '"dtype":"U8","more":1'), "malformed"),
        ('{"__metadata__":{"a":1},' + TWO + "}", "__metadata__"),
        ('{"__metadata__":{"a":{"b":"c"}},' + TWO + "}", "__metadata__"),
        ('{"__metadata__":[],' + TWO + "}", "__metadata__"),
        ('{"__metadata__":{"a":"\\ud800"},' + TWO + "}", "__metadata__"),
        ('{"__metadata__":{},"__metadata__":{},' + TWO + "}", "a name occurs twice"),
        (FINE.replace('"b"', '"\\ud800"'), "not valid Unicode"),
        (FINE.replace('"b"', '"\ud800"'), "utf-8"),
        (FINE.replace('"b"', '"\1"'), "header is not valid"),
        (FINE + "\0", "header is not valid"),
        (FINE + FINE, "header is not valid"),
        ("\ufeff" + FINE, "byte order mark"),
        (FINE.encode("utf-16"), "utf-8"),
        ("null", "not a JSON object"),
    ],
)
def test_what_the_library_refuses_is_refused(tmp_path: Path, header: str | bytes, message: str) -> None:
    path = write(tmp_path / "x", header)
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        read_safetensors(path)
    assert caught.value.message.isprintable()
    # Two of a name and other keys are odd enough to be refused without it.
    if message != "a name occurs twice" and '"more"' not in str(header):
        with pytest.raises(SafetensorError), safe_open(path, framework="np"):
            pass


@pytest.mark.parametrize("change", [-1, 1, 8, 1 << 26, 1 << 63])
def test_a_header_that_lies_about_its_length(tmp_path: Path, change: int) -> None:
    path = write(tmp_path / "x", FINE)
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", len(FINE) + change) + data[8:])
    with pytest.raises(CorruptCheckpointError, match=r"header|truncated"):
        read_safetensors(path)


@pytest.mark.parametrize("data", [b"", bytes(11), bytes(13), bytes(1 << 20)])
def test_too_little_or_too_much_data(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"truncated|its tensors end at byte"):
        read_safetensors(write(tmp_path / "x", FINE, data))


def test_damage_is_judged_as_the_library_judges_it(tmp_path: Path) -> None:
    """Some hundreds of what `tools/fuzz_headers.py` does by the thousands."""
    path = tmp_path / "x"
    verdicts: dict[str, int] = {}
    for mutant in itertools.islice(fuzz_headers.mutants(7), 600):
        path.write_bytes(mutant)
        verdict, why = fuzz_headers.compare(path)
        verdicts[verdict] = verdicts.get(verdict, 0) + 1
        assert verdict not in ("switchrun", "other bytes"), mutant
        assert verdict != "library" or "twice" in why or "malformed" in why or "takes" in why, (mutant, why)
    assert verdicts["both"] > 20
    assert verdicts["neither"] > 200


def test_names_are_shown_without_control_codes(tmp_path: Path) -> None:
    name = json.dumps("\x1b]0;x\x07" * 200)
    for header in (FINE.replace('"b"', name).replace("[4]", "[5]"), FINE.replace('"U8"', name)):
        with pytest.raises(CorruptCheckpointError, match=r"\\x1b\]0;x\\x07") as caught:
            read_safetensors(write(tmp_path / "x", header))
        assert caught.value.message.isprintable()
        assert len(caught.value.message) < 2_000


@pytest.mark.slow
def test_the_largest_model_is_not_too_large() -> None:
    """The index of switch-c-2048 in int8 has 370,000 names; no header has half as many."""
    name = "encoder.block.11.layer.1.mlp.experts.expert_{}.wi.weight".format
    files = {name(number): "pytorch_model-00001-of-00364.bin" for number in range(370_000)}
    assert len(parse_json(json.dumps({"weight_map": files}).encode())["weight_map"]) == 370_000
    entry = {"dtype": "BF16", "shape": [6144, 2080], "data_offsets": [1_000_000_000_000, 1_000_000_000_001]}
    assert len(parse_json(json.dumps({name(number): entry for number in range(180_000)}).encode())) == 180_000


#: Texts of many small values, by the bytes of a part, the number of parts, and what comes before and after them.
_BOMBS = {
    "objects": (b'{"a":1},', 600_000, b'{"w":[', b"0]}"),
    "numbers": (b"999,", 3_900_000, b'{"w":[', b"0]}"),
    "texts of four bytes a character": ('"\U0001f600b",'.encode(), 3_900_000, b'{"w":[', b"0]}"),
    "too many": (b"[],", 20_000_000, b'{"w":[', b"0]}"),
    "too deep": (b"[", 20_000_000, b"", b""),
    "digits": (b"9" * 1000, 60_000, b'{"w":', b"}"),
}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", _BOMBS)
@pytest.mark.parametrize("kind", ["header", "object"])
def test_no_text_takes_a_gigabyte(tmp_path: Path, name: str, kind: str) -> None:
    part, count, begin, end = _BOMBS[name]
    write(tmp_path / "x", begin + part * count + end, b"")
    (tmp_path / "x.json").write_bytes(begin + part * count + end)
    read = "read_safetensors(Path('x'))" if kind == "header" else "read_json_object(Path('x.json'), 64 << 20)"
    program = (
        "import resource\nfrom pathlib import Path\n"
        "from switchrun.checkpoint.files import read_json_object\n"
        "from switchrun.errors import CorruptCheckpointError\n"
        "from tests.support.headers import read_safetensors\n"
        "resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9))\n"
        f"try: {read}\nexcept CorruptCheckpointError: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
