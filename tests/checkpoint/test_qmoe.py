"""QMoE checkpoints: what lies where, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from switchrun.bench import synthetic
from switchrun.bench.synthetic_qmoe import Measures, write_qmoe
from switchrun.bench.torch_zip import StoredTensor
from switchrun.checkpoint import index as index_module
from switchrun.checkpoint import open_checkpoint, qmoe
from switchrun.checkpoint.names import expert_prefix
from switchrun.checkpoint.remote import HubRanges, Patience
from switchrun.checkpoint.types import HubWay, RemoteFile, SwitchCheckpoint, TensorSlice
from switchrun.errors import CorruptCheckpointError, ModelError, SwitchrunError
from switchrun.kernels import native
from switchrun.kernels.qmoe import QmoeMatrix, decode
from switchrun.model.tokenizer_files import find_tokenizer
from tests.conftest import RunSwitchrun
from tests.support.checkpoints import oracle_state, read_tensor, tiny_config
from tests.support.edits import edit_config
from tests.support.fake_hub import FakeHub
from tests.support.qmoe_checkpoints import qmoe_config, rewrite, save_qmoe, ternary_model

pytestmark = pytest.mark.skipif(not native.paths(), reason="built without kernels, by which test models are encoded")

REPO = "ISTA-DASLab/switch-tiny_qmoe"
#: Of the second part, the first tensors.
EXPERT = "encoder.block.1.layer.1.mlp.experts.expert_0"
NORM = "encoder.final_layer_norm.weight"
CODES, OFFSETS, EXTREMES = (f"{EXPERT}.wi.{each}" for each in ("w_comp", "row_off", "ter_minmax"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qmoe(ternary_model(qmoe_config(d_model=34, d_ff=46)), tmp_path_factory.mktemp("original") / "m")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "m"))


def bytes_of(tensor: TensorSlice) -> bytes:
    assert isinstance(tensor.file, Path)
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.nbytes)


def decoded(matrix: TensorSlice) -> torch.Tensor:
    """Decode a matrix from where its slices say that it lies."""
    codes, offsets, extremes = (
        torch.frombuffer(bytearray(bytes_of(each)), dtype=dtype)
        for each, dtype in zip((matrix, *matrix.parts), (torch.int16, torch.int32, torch.bfloat16), strict=True)
    )
    return decode(QmoeMatrix(codes, offsets, extremes, matrix.shape[1]))


LAYERS = {"num_layers": 4, "num_sparse_encoder_layers": 2, "num_decoder_layers": 3, "num_sparse_decoder_layers": 1}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (qmoe_config(d_model=34, d_ff=46, num_experts=12), {}),
        (qmoe_config(d_model=34, d_ff=46, num_experts=12), {"string_order": True}),
        (qmoe_config(), {"copies": True}),
        (tiny_config(**LAYERS), {}),
        (tiny_config(**LAYERS, tie_word_embeddings=False, num_experts=1), {}),
    ],
)
def test_every_tensor_is_where_it_is_said_to_be(config: Any, options: dict[str, bool], tmp_path: Path) -> None:
    model = ternary_model(config)
    folder = save_qmoe(model, tmp_path / "m", **options)
    wanted = oracle_state(model)
    first = open_checkpoint(str(folder), cache_dir=tmp_path / "c")
    for opened in (first, open_checkpoint(str(folder), cache_dir=tmp_path / "c")):
        found = {name: read_tensor(tensor) for name, tensor in opened.dense.items()}
        for key, slices in opened.experts.items():
            for name, matrix in zip(("wi", "wo"), slices, strict=True):
                found[f"{expert_prefix(*key)}.{name}.weight"] = decoded(matrix)
        copied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
        assert found.keys() - copied == wanted.keys() - copied
        for name, tensor in found.items():
            assert torch.equal(tensor, wanted.get(name, wanted["shared.weight"])), name
        assert dict(opened.experts) == dict(first.experts)
        assert opened.dense == first.dense


def test_what_is_known_of_it(folder: Path) -> None:
    opened = open_checkpoint(str(folder))
    sizes = torch.load(folder / "sizes.pt", weights_only=True)
    assert (opened.stored_dtype, opened.plain_dtype, opened.num_experts) == ("QMOE", "BF16", 4)
    assert len(opened.experts) == 16
    each = [slices.nbytes for slices in opened.experts.values()]
    ((largest, count),) = opened.expert_forms
    assert (largest.nbytes, count) == (max(each), 16)
    assert len(set(each)) > 4
    dense = sum(tensor.nbytes for tensor in opened.dense.values())
    assert opened.experts_total_bytes == sum(each) == 2 * sum(sizes.values()) + 16 * 2 * (4 * 80 + 4)
    assert opened.total_bytes == sum(each) + dense
    for slices in opened.experts.values():
        assert [tensor.dtype for tensor in slices.ranges] == ["QMOE", "QMOE", "I32", "BF16", "I32", "BF16"]
        assert all(tensor.header_bytes and tensor.crc for tensor in slices.ranges)
    assert opened.repairs == ("decoder_sparse_step 0 → 1: the checkpoint has experts in decoder blocks 0, 1",)


def test_the_dtype_is_that_of_the_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    assert open_checkpoint(str(folder)).plain_dtype == "F32"
    del config["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(str(folder)).plain_dtype == "BF16"


def test_what_is_of_no_use_does_not_disturb(folder: Path) -> None:
    rewrite(folder / "exp01.pt", lambda part: part.update(more=torch.ones(3)) or part.pop(f"{EXPERT}.wi.weight"))
    rewrite(folder / "sizes.pt", lambda sizes: sizes.update(more=torch.ones(3)))
    shutil.copy(folder / "exp01.pt", folder / "exp04.pt")
    for name in ("README.md", "optimizer.pt", "exp1.pt", "exp007.pt"):
        (folder / name).write_text("x")
    assert len(open_checkpoint(str(folder)).experts) == 16


# What is refused.


def gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def change(name: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / name, edit)


def put(name: str, value: torch.Tensor) -> Callable[[Path], None]:
    """Replace a tensor of the second part; if it is codes, sizes.pt says the same."""

    def edit(folder: Path) -> None:
        rewrite(folder / "exp01.pt", lambda part: part.update({name: value}))
        if name == CODES:
            rewrite(folder / "sizes.pt", lambda sizes: sizes.update({f"{EXPERT}.wi": value.numel()}))

    return edit


def cut(name: str, share: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return edit


def swap(folder: Path) -> None:
    """Let two parts change places."""
    (folder / "exp01.pt").rename(folder / "x")
    (folder / "exp02.pt").rename(folder / "exp01.pt")
    (folder / "x").rename(folder / "exp02.pt")


def gate(part: dict[str, Any]) -> None:
    for name in [name for name in part if ".wi." in name]:
        part[name.replace(".wi.", ".wi_0.")] = part[name.replace(".wi.", ".wi_1.")] = part.pop(name)


def less(tensor: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state.update({tensor: state[tensor][:-1].clone()})


BAD = {
    "no dense": (gone("noexp.pt"), "noexp.pt: the file is missing; a QMoE checkpoint has it"),
    "no sizes": (gone("sizes.pt"), "sizes.pt: the file is missing; a QMoE checkpoint has it"),
    "no part": (gone("exp02.pt"), "exp02.pt: the file is missing; the model has 4 layers with experts"),
    "last part": (gone("exp03.pt"), "exp03.pt: the file is missing; the model has 4 layers with experts"),
    "empty": (lambda folder: (folder / "exp01.pt").write_bytes(b""), "exp01.pt: the file is empty"),
    "cut": (cut("exp01.pt", 0.7), "exp01.pt: the file is truncated or damaged"),
    "sizes cut": (cut("sizes.pt", 0.5), "sizes.pt: the file is truncated or damaged"),
    "swapped": (swap, f"exp01.pt: tensor {CODES} is missing"),
    "no codes": (change("exp01.pt", lambda part: part.pop(CODES)), f"exp01.pt: tensor {CODES} is missing"),
    "no offsets": (change("exp01.pt", lambda part: part.pop(OFFSETS)), f"exp01.pt: tensor {OFFSETS} is missing"),
    "no extremes": (change("exp01.pt", lambda part: part.pop(EXTREMES)), f"exp01.pt: tensor {EXTREMES} is missing"),
    "codes dtype": (put(CODES, torch.ones(300, dtype=torch.int32)), f"tensor {CODES} is I32 [300], not I16"),
    "codes 2D": (put(CODES, torch.ones(1, 300, dtype=torch.int16)), f"tensor {CODES} is I16 [1, 300], not I16 in one"),
    "codes short": (change("exp01.pt", less(CODES)), "codes; by sizes.pt it must have "),
    "few codes": (put(CODES, torch.ones(45, dtype=torch.int16)), f"{CODES} has the shape [45]; by config.json it must"),
    "codes": (put(CODES, torch.ones(783, dtype=torch.int16)), f"{CODES} has the shape [783]; by config.json it must"),
    "offsets": (change("exp01.pt", less(OFFSETS)), f"{OFFSETS} has the shape [46]; by config.json it must be [47]"),
    "offsets dtype": (put(OFFSETS, torch.ones(47, dtype=torch.int64)), f"{OFFSETS} is I64 [47], not I32"),
    "extremes": (change("exp01.pt", less(EXTREMES)), f"{EXTREMES} has the shape [91]; by config.json it must be [92]"),
    "extremes dtype": (put(EXTREMES, torch.ones(92)), f"tensor {EXTREMES} is F32 [92], not BF16"),
    "no size": (change("sizes.pt", lambda s: s.pop(f"{EXPERT}.wo")), f"sizes.pt: it does not say how many {EXPERT}.wo"),
    "size 0": (change("sizes.pt", lambda s: s.update({f"{EXPERT}.wo": 0})), f"sizes.pt: it says {EXPERT}.wo has 0"),
    "size -1": (change("sizes.pt", lambda s: s.update({f"{EXPERT}.wo": -1})), f"sizes.pt: it says {EXPERT}.wo has -1"),
    "size": (change("sizes.pt", lambda s: s.update({f"{EXPERT}.wo": 1 << 40})), f"{EXPERT}.wo has 1099511627776"),
    "size of 600 digits": (change("sizes.pt", lambda s: s.update({f"{EXPERT}.wo": 10**600})), "0000…0000"),
    "size text": (change("sizes.pt", lambda s: s.update({f"{EXPERT}.wo": "1"})), "sizes.pt: it does not say how many"),
    "sizes list": (lambda folder: torch.save([1], folder / "sizes.pt"), "sizes.pt: the file holds no dictionary"),
    "sizes class": (lambda folder: torch.save(Path("x"), folder / "sizes.pt"), "the file asks to run `pathlib"),
    "dense": (change("noexp.pt", lambda d: d.pop(NORM)), f"noexp.pt: tensor {NORM} is missing"),
    "dense int8": (
        change("noexp.pt", lambda d: d.update({"lm_head.weight": d["lm_head.weight"].to(torch.int8)})),
        "tensor lm_head.weight is stored as I8, not as one of",
    ),
    "config": (lambda folder: edit_config(folder, d_ff=10**4299), "d_ff is 1000000000000000000000000…0000"),
    "router": (
        change("noexp.pt", less("decoder.block.0.layer.2.mlp.router.classifier.weight")),
        "tensor decoder.block.0.layer.2.mlp.router.classifier.weight has the shape [3, 34]",
    ),
    "plain expert": (
        change("noexp.pt", lambda d: d.update({f"{EXPERT.replace('block.1', 'block.7')}.wi.weight": torch.ones(1)})),
        "noexp.pt: tensor encoder.block.2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_damage_is_named(folder: Path, case: str) -> None:
    edit, message = BAD[case]
    edit(folder)
    for _ in range(2):  # It may be in the cache the second time.
        with pytest.raises(CorruptCheckpointError) as caught:
            open_checkpoint(str(folder))
        assert message in caught.value.message
        assert str(folder) in caught.value.message
        assert caught.value.exit_code == 7


def test_gated_experts_are_refused(folder: Path) -> None:
    rewrite(folder / "exp00.pt", gate)
    with pytest.raises(ModelError, match="gated experts") as caught:
        open_checkpoint(str(folder))
    assert caught.value.exit_code == 5


def test_no_layer_with_experts(folder: Path) -> None:
    rewrite(folder / "noexp.pt", lambda d: [d.pop(name) for name in list(d) if ".router." in name])
    with pytest.raises(ModelError, match="none of its tensors belongs to an expert"):
        open_checkpoint(str(folder))


def test_more_experts_than_there_can_be(folder: Path) -> None:
    name = "encoder.block.0.layer.1.mlp.router.classifier.weight"
    rewrite(folder / "noexp.pt", lambda d: d.update({name: torch.zeros(300_000, 1, dtype=torch.bfloat16)}))
    with pytest.raises(CorruptCheckpointError, match="it would have 1200000 experts"):
        open_checkpoint(str(folder))


def test_other_containers_come_first(folder: Path) -> None:
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="none of its tensors belongs to an expert"):
        open_checkpoint(str(folder))


def test_without_a_tokenizer_the_line_says_what_to_do(folder: Path, run_switchrun: RunSwitchrun) -> None:
    (folder / "tokenizer.json").unlink()
    opened = open_checkpoint(str(folder))
    with pytest.raises(ModelError, match="has no tokenizer") as caught:
        find_tokenizer(opened.path, None)
    assert "--tokenizer" in caught.value.hint
    result = run_switchrun(["fill", "--model", str(folder), "a <extra_id_0>"])
    assert result.returncode == 5
    assert "--tokenizer" in result.stderr


# The cached index.


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that were read."""
    found: list[str] = []
    read_part = qmoe.read_part

    def counting(file: Any, *args: Any) -> Any:
        found.append(Path(str(file.place)).name)
        return read_part(file, *args)

    monkeypatch.setattr(qmoe, "read_part", counting)
    return found


def test_a_second_open_reads_nothing(folder: Path, parts: list[str]) -> None:
    first = open_checkpoint(str(folder))
    assert sorted(parts) == [f"exp0{number}.pt" for number in range(4)]
    parts.clear()
    second = open_checkpoint(str(folder))
    assert not parts
    assert dict(second.experts) == dict(first.experts)
    assert second.fingerprint == first.fingerprint
    (folder / "exp02.pt").touch()
    third = open_checkpoint(str(folder))
    assert len(parts) == 4
    assert third.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    "forge",
    [
        lambda r: r.pop("places"),
        lambda r: r.update(places=None),
        lambda r: r.update(places=[]),
        lambda r: r["places"].pop("crc"),
        lambda r: r["places"].update(crc=3),
        lambda r: r["places"].update(crc="!"),
        lambda r: r["places"].update(crc=r["places"]["crc"][4:]),
        lambda r: r["places"].update(nbytes=r["places"]["offset"]),
        lambda r: r["places"].update(offset=r["places"]["offset"] * 2),
        lambda r: r["places"].update(offset="/////////////w==" + r["places"]["offset"][16:]),
        lambda r: r["places"].update(offset="AAAAAAAAAAAAAAAA" + r["places"]["offset"][16:]),
        lambda r: r["places"].update(nbytes="////" + r["places"]["nbytes"][4:]),
        lambda r: r["places"].update(header_bytes="////" + r["places"]["header_bytes"][4:]),
        lambda r: r["files"].pop(),
        lambda r: r["files"].reverse(),
        lambda r: r["files"].__setitem__(2, "../m/exp00.pt"),
    ],
)
def test_a_forged_cache_counts_as_absent(folder: Path, tmp_path: Path, parts: list[str], forge: Any) -> None:
    expected = dict(open_checkpoint(str(folder), cache_dir=tmp_path / "c").experts)
    (cache,) = (tmp_path / "c").iterdir()
    for do, read in ((lambda _: None, 0), (forge, 4)):
        record = json.loads(cache.read_bytes().split(b"\n", 1)[1])
        do(record)
        text = json.dumps(record).encode()
        cache.write_bytes(index_module._checksum(text) + b"\n" + text)
        parts.clear()
        assert dict(open_checkpoint(str(folder), cache_dir=tmp_path / "c").experts) == expected
        assert len(parts) == read


# On the Hub.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.use(monkeypatch)
        yield hub


def open_remote(way: HubWay) -> SwitchCheckpoint:
    patience = Patience(connect_seconds=5, stall_seconds=2, attempts=3, first_wait_seconds=0.01)
    with HubRanges(patience) as ranges:
        return open_checkpoint(REPO, way=way, ranges=ranges)


def test_weights_stay_on_the_hub(hub: FakeHub, folder: Path) -> None:
    commit = hub.add(REPO, folder)
    opened, local = open_remote(HubWay.RANGES), open_checkpoint(str(folder))
    assert (opened.revision, opened.stored_dtype) == (commit, "QMOE")
    assert opened.experts.keys() == local.experts.keys()
    for key in local.experts:
        for ours, theirs in zip(opened.experts[key].ranges, local.experts[key].ranges, strict=True):
            assert isinstance(ours.file, RemoteFile)
            assert isinstance(theirs.file, Path)
            assert ours.file.name == theirs.file.name
            assert (ours.offset, ours.nbytes, ours.header_bytes, ours.crc) == (
                theirs.offset, theirs.nbytes, theirs.header_bytes, theirs.crc,
            )  # fmt: skip
    assert {path.name for path in opened.path.iterdir()} == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    hub.log.clear()
    again = open_remote(HubWay.RANGES)
    assert [each.path for each in hub.requests()] == [f"/api/models/{REPO}?blobs=true"]
    assert dict(again.experts) == dict(opened.experts)


def test_a_small_one_is_downloaded_and_found_again(hub: FakeHub, folder: Path) -> None:
    hub.add(REPO, folder)
    opened = open_remote(HubWay.AUTO)
    assert opened.hub is None
    assert all(isinstance(each.wi.file, Path) for each in opened.experts.values())
    for way in HubWay:
        assert open_remote(way).hub is None
    assert open_checkpoint(REPO, download=False).fingerprint == opened.fingerprint


@pytest.mark.parametrize("name", ["exp02.pt", "noexp.pt", "sizes.pt"])
def test_a_part_is_not_on_the_hub(hub: FakeHub, folder: Path, name: str) -> None:
    (folder / name).unlink()
    hub.add(REPO, folder)
    for way in (HubWay.RANGES, HubWay.DOWNLOAD):
        with pytest.raises(CorruptCheckpointError, match=f"{name}: the file is missing"):
            open_remote(way)


def test_damage_on_the_hub(hub: FakeHub, folder: Path) -> None:
    less_of = less(OFFSETS)
    rewrite(folder / "exp01.pt", less_of)
    hub.add(REPO, folder)
    with pytest.raises(CorruptCheckpointError) as caught:
        open_remote(HubWay.RANGES)
    assert f"{REPO}/exp01.pt: tensor {OFFSETS} has the shape [46]" in caught.value.message


# The geometry of switch-c-2048.


def save_geometry(folder: Path, experts: int) -> Path:
    """Write a checkpoint of switch-c-2048's shapes, with so many experts in a layer, and nothing but holes."""
    _, geometry = synthetic.parse_geometry(f"switch-c-2048-qmoe:experts={experts}")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(geometry.config()))
    dense = {name: StoredTensor("BF16", shape, None) for name, shape in synthetic._dense_shapes(geometry).items()}
    write_qmoe(folder, Measures(2080, 6144, geometry.sparse_blocks, experts, 0), dense)
    return folder


def test_two_requests_for_a_part(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(REPO, save_geometry(tmp_path / "m", 200))
    opened = open_remote(HubWay.RANGES)
    assert len(opened.experts) == 30 * 200
    gets = hub.requests("cdn", "GET")
    # Of noexp.pt both ends; of sizes.pt its pickle too, which is longer than what is asked for.
    assert len(gets) <= 2 * 30 + 2 + 3
    assert hub.sent("cdn") < 32 * 150_000 + 30 * 8 * 200 * 240 + 1_000_000


OPEN = """
import pathlib, sys, time
from switchrun.checkpoint import open_checkpoint
def rss(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
before, start = rss("VmRSS"), time.perf_counter()
opened = open_checkpoint(sys.argv[1])
print(len(opened.experts), rss("VmRSS") - before, rss("VmHWM") - before, time.perf_counter() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_the_full_geometry(run_switchrun: RunSwitchrun, tmp_path: Path) -> None:
    """The first time takes seconds; from then on opening takes less than the command's own start."""

    def run() -> list[float]:
        done = subprocess.run(
            [sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, check=True, env=os.environ
        )
        return [float(each) for each in done.stdout.split()]

    folder = save_geometry(tmp_path / "m", 2048)
    try:
        count, _, peak, first_seconds = run()
        assert count == 61_440
        assert peak < 100 << 20
        count, grown, peak, seconds = run()
        assert count == 61_440
        assert grown < 30 << 20
        assert peak < 40 << 20
        assert seconds < first_seconds / 4
        result = run_switchrun(["plan", "--model", str(folder)])
        assert result.returncode == 0, result.stderr
    finally:
        shutil.rmtree(folder)  # 1.6 GB of local headers


def test_threads_end_when_a_part_is_damaged(folder: Path) -> None:
    before = threading.active_count()
    (folder / "exp00.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(SwitchrunError):
        open_checkpoint(str(folder))
    assert threading.active_count() <= before  # another test's may just have ended
