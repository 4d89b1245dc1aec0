"""The files themselves: valid safetensors, aligned, and readable past the page cache."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from switchrun.checkpoint.types import ExpertKey
from switchrun.experts.reader import FileReader, Segment
from switchrun.store.layout import Layout, int8_layout
from tests.store.conftest import LAYOUT, data_of, holds, key, open_store
from tests.support.headers import read_safetensors

NF4 = Layout.of(
    [
        ("wi.weight", "U8", (65, 17)),
        ("wi.absmax", "F32", (35,)),
        ("wo.weight", "U8", (33, 33)),
        ("wo.absmax", "BF16", (3,)),
    ]
)
LAYOUTS = {
    "odd": LAYOUT,
    "one": int8_layout(1, 1),
    "even": int8_layout(64, 128),
    "nf4": NF4,
    "many": Layout.of([(f"part.{n}", "I8", (n + 1,)) for n in range(200)]),
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


def test_safetensors_reads_the_same_tensors(offload, layout):
    store, data = open_store(offload, layout=layout), data_of(3, layout)
    assert store.write(key(3), data)
    path = store.find(key(3)).path
    assert path.relative_to(store.folder).as_posix() == "encoder.1/3.safetensors"
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {part.name for part in layout.tensors}
        assert file.metadata()["xxh3_64"] == xxh3_64_hexdigest(data)
        for part in layout.parts:
            tensor = file.get_tensor(part.name)
            assert tuple(tensor.shape) == part.shape
            found = bytes(tensor.reshape(-1).view(torch.uint8).numpy())
            assert found == data[part.offset : part.offset + part.nbytes]


def test_parts_are_aligned_in_the_file_and_in_memory(offload, layout):
    store = open_store(offload, layout=layout)
    store.write(key(3), data_of(3, layout))
    stored = store.find(key(3))
    entries = read_safetensors(stored.path)
    assert stored.offset % 4096 == 0
    assert stored.path.stat().st_size == stored.offset + stored.nbytes
    for part in layout.parts:
        assert entries[part.name].offset == stored.offset + part.offset
        assert part.offset % 64 == 0


def test_padding_only_where_it_is_needed():
    assert int8_layout(2080, 6144).tensors == int8_layout(2080, 6144).parts
    assert int8_layout(768, 3072).tensors == int8_layout(768, 3072).parts
    padded = [part for part in LAYOUT.tensors if part not in LAYOUT.parts]
    assert [part.name for part in padded] == ["padding.1", "padding.3", "padding.5"]
    assert all(0 < part.nbytes < 64 for part in padded)


def test_the_reader_takes_it_directly(offload):
    layout = int8_layout(d_model=96, d_ff=512)
    store, data = open_store(offload, layout=layout), data_of(3, layout)
    store.write(key(3), data)
    stored = store.find(key(3))
    length = -(-stored.nbytes // 4096) * 4096
    memory, errors, done = mmap.mmap(-1, length), [], threading.Event()
    reader = FileReader(direct=True)
    try:
        segment = Segment(stored.path, stored.offset, length, 0, stored.nbytes)
        reader.submit([segment], memoryview(memory), lambda error: (errors.append(error), done.set()))
        assert done.wait(10)
        direct = reader.reads_past_page_cache
    finally:
        reader.close()
    assert errors == [None]
    assert memory[: stored.nbytes] == data
    if not direct:
        pytest.skip("the filesystem of the tests refuses O_DIRECT; the bytes were right")


def test_experts_are_told_apart(offload):
    store = open_store(offload)
    keys = [ExpertKey(stack, block, 0) for stack in ("encoder", "decoder") for block in (1, 11)]
    for number, name in enumerate(keys):
        assert store.write(name, data_of(number))
    for number, name in enumerate(keys):
        assert store.find(name).checksum == xxh3_64_intdigest(data_of(number))
    assert store.find(ExpertKey("encoder", 1, 1)) is None
    assert store.find(ExpertKey("encoder", 3, 0)) is None


def test_another_process_finds_what_was_written_since_it_opened(offload):
    reader, writer = open_store(offload), open_store(offload)
    assert reader.find(key(3)) is None
    writer.write(key(3), data_of(3))
    assert holds(reader, 3)


def test_a_second_find_asks_the_system_nothing(offload, monkeypatch):
    store = open_store(offload)
    store.write(key(3), data_of(3))
    fresh = open_store(offload)
    first = fresh.find(key(3))
    for name in ("open", "stat", "lstat", "utime", "scandir"):
        monkeypatch.setattr(f"os.{name}", lambda *_, **__: pytest.fail("a system call"))
    again = fresh.find(key(3)), store.find(key(3))
    monkeypatch.undo()
    assert again == (first, first)


@pytest.mark.parametrize("size", [0, LAYOUT.nbytes - 1, LAYOUT.nbytes + 1])
def test_a_buffer_of_another_length_is_a_bug_of_the_caller(offload, size):
    with pytest.raises(ValueError, match=f"an expert has {LAYOUT.nbytes} bytes here, not {size}"):
        open_store(offload).write(key(3), bytes(size))


@pytest.mark.parametrize("parts", [[], [("a", "I8", (1,))] * 2, [("padding.1", "I8", (1,))]])
def test_layouts_that_cannot_be(parts):
    with pytest.raises(ValueError):
        Layout.of(parts)


def test_nothing_heavy_is_imported():
    code = "import switchrun.store, sys; sys.exit(len({'torch', 'transformers', 'rich', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_data_is_on_disk_before_its_name_and_the_name_before_the_answer(offload, monkeypatch):
    store, order = open_store(offload), []
    store.write(key(1), data_of(1))
    fsync, replace = os.fsync, os.replace

    def log_fsync(file: int) -> None:
        path = Path(f"/proc/self/fd/{file}").readlink()
        order.append("data" if path.suffix == ".tmp" else path.name)
        fsync(file)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", lambda *names, **folders: (order.append("name"), replace(*names, **folders)))
    assert store.write(key(2), data_of(2))
    assert order == ["data", "name", "encoder.1"]
