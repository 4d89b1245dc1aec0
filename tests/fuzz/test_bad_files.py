"""Whatever the files hold: the library's tokens, or one clear line; never a crash, a hang, or a file outside.

More examples, and what came of them:
`pytest tests/fuzz --campaign --hypothesis-show-statistics`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from switchrun.kernels import native
from tests.fuzz.mutations import Named, edits
from tests.fuzz.zygote import Zygote
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.qmoe_checkpoints import qmoe_config, save_qmoe, ternary_model

TEXT = "the <extra_id_0> sat on the <extra_id_1> ."
NEW_TOKENS = 6
GROWS_BYTES = 1 << 30
#: What may be said of a file: it is no model that is supported, memory is short, it is damaged. An input may be refused
#: for what the tokenizer makes of it.
CODES = {0, 4, 5, 6, 7}

#: Of each kind of file: the container, the file, and how it is edited.
TARGETS = {
    "header": ("safetensors", "model.safetensors", "header"),
    "index": ("sharded", "model.safetensors.index.json", "json"),
    "pickle": ("torch", "pytorch_model.bin", "pickle"),
    "config": ("safetensors", "config.json", "json"),
    "generation": ("safetensors", "generation_config.json", "json"),
    "tokenizer": ("safetensors", "tokenizer.json", "json"),
    "tokenizer settings": ("safetensors", "tokenizer_config.json", "json"),
    "manifest": ("kept", "manifest.json", "json"),
    "kept expert": ("kept", "safetensors", "header"),
    "cached index": ("kept", "index", "json"),
}
if native.paths():  # by which the checkpoint is encoded
    TARGETS |= {
        "QMoE's dense weights": ("qmoe", "noexp.pt", "pickle"),
        "QMoE's experts": ("qmoe", "exp02.pt", "pickle"),
        "QMoE's sizes": ("qmoe", "sizes.pt", "pickle"),
    }


@dataclass
class House:
    """Folders with a checkpoint in each container, and where each example is tried."""

    root: Path
    zygote: Zygote
    plain: dict[str, list[int]] = field(default_factory=dict)

    @cached_property
    def model(self) -> Path:
        """The folder of every example: a cached index belongs to a path."""
        return self.root / "model"

    @cached_property
    def offload(self) -> Path:
        return self.root / "offload"

    def lay_out(self, container: str) -> None:
        """Put a sound checkpoint, and a sound offload folder, in the places of examples."""
        for path in (self.model, self.offload):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.root / "sound" / ("safetensors" if container == "kept" else container), self.model)
        if container == "kept":
            shutil.copytree(self.root / "sound" / "offload", self.offload)

    def fill(self, *args: str) -> dict[str, Any]:
        options = ["--model", str(self.model), "--offload-folder", str(self.offload), "--format", "jsonl"]
        words = ["fill", TEXT, "--max-new-tokens", str(NEW_TOKENS), *options, *args]
        return self._run(work="switchrun", args=words)

    def oracle(self) -> dict[str, Any] | None:
        """What plain transformers answers; None if it does not."""
        result = self._run(work="transformers", folder=str(self.model), text=TEXT, max_new_tokens=NEW_TOKENS)
        if result["exit"] != 0:
            return None
        record: dict[str, Any] = json.loads(result["stdout"].splitlines()[-1])
        return record

    def _run(self, **job: Any) -> dict[str, Any]:
        places = {"scratch": str(self.root / "scratch"), "secret": str(self.root / "secret")}
        writable = [str(self.offload), str(self.root / "home")]
        return self.zygote.run(**places, writable=writable, **job)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("scratch", "secret", "home"):
        (root / name).mkdir()
    (root / "secret" / "file").write_text("{}")
    model = random_model(tiny_config(), seed=8)  # whose tokens vary
    for name, options in {
        "safetensors": {},
        "sharded": {"sharded": True},
        "torch": {"container": "torch"},
    }.items():
        save_checkpoint(model, root / "sound" / name, **options)  # type: ignore[arg-type]
        save_tiny_tokenizer(root / "sound" / name)
        settings = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "repetition_penalty": 1.1}
        (root / "sound" / name / "generation_config.json").write_text(json.dumps(settings))
    home = {name: str(root / "home") for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "SWITCHRUN_CACHE")}
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SWITCHRUN_", "HF_"))}
    with Zygote({**env, **home, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}) as zygote:
        house = House(root, zygote)
        house.lay_out("safetensors")
        sound = house.fill("--dtype", "int8")
        house.plain["int8"] = json.loads(sound["stdout"])["output_ids"]
        shutil.copytree(house.offload, root / "sound" / "offload")
        if native.paths():
            save_qmoe(ternary_model(qmoe_config(), seed=1), root / "sound" / "qmoe", string_order=True)
            house.lay_out("qmoe")
            house.plain["qmoe"] = json.loads(house.fill()["stdout"])["output_ids"]
        yield house


def test_the_sound_ones_are_answered(house: House) -> None:
    for container in ("safetensors", "sharded", "torch"):
        house.lay_out(container)
        result = house.fill()
        assert (result["exit"], result["stderr"], result["touched"]) == (0, "", [])
        oracle = house.oracle()
        assert oracle is not None
        ids = json.loads(result["stdout"])["output_ids"]
        assert ids == _until_end(oracle)
        assert len(set(ids)) > 3


@st.composite
def examples(draw: st.DrawFn) -> tuple[str, Named, int]:
    kind = draw(st.sampled_from(sorted(TARGETS)))
    return kind, draw(edits(TARGETS[kind][2])), draw(st.integers(0, 100))


#: Each takes a third of a second; a campaign has more.
_EXAMPLES = max(40, settings().max_examples - 100)


@settings(deadline=None, max_examples=_EXAMPLES, suppress_health_check=list(HealthCheck))
@given(example=examples())
def test_no_file_does_harm(house: House, example: tuple[str, Named, int]) -> None:
    kind, change, which = example
    container, file, _ = TARGETS[kind]
    house.lay_out(container)
    if container == "kept":
        found = sorted(path for path in house.offload.rglob("*") if path.is_file() and file in str(path))
        change.edit(found[which % len(found)])
    else:
        change.edit(house.model / file)

    result = house.fill(*(("--dtype", "int8") if container == "kept" else ()))

    assert result["exit"] in CODES, result
    assert "internal error" not in result["stderr"]
    assert "Traceback" not in result["stderr"]
    assert "\x1b" not in result["stderr"] + result["stdout"]
    assert result["grown_bytes"] < GROWS_BYTES, result
    # In the place of a checkpoint's file a link is as good as the file: the Hub's cache is made of links.
    if container == "kept" or change.name != "outside":
        assert result["touched"] == []
    assert (house.root / "secret" / "file").read_text() == "{}"
    if result["exit"] == 0:
        event(f"{kind}: {_compare(house, kind, result)}")
    else:
        # A library written in Rust says itself first that it has panicked.
        assert result["stderr"].startswith("switchrun: ") or "panicked at" in result["stderr"]
        event(f"{kind}: refused with {result['exit']}")


def _compare(house: House, kind: str, result: dict[str, Any]) -> str:
    ids = json.loads(result["stdout"])["output_ids"]
    if TARGETS[kind][0] == "kept":
        assert ids == house.plain["int8"]
        return "answered as without it"
    if TARGETS[kind][0] == "qmoe":
        assert ids == house.plain["qmoe"] or kind != "QMoE's sizes"
        return "answered"
    if "→" in result["stderr"]:
        return "repaired"
    oracle = house.oracle()
    if oracle is None:
        assert kind != "header"
        return "answered, though transformers does not"
    if not oracle["clean"] or oracle["dtype"] != "torch.float32":
        return "answered, and transformers lacks weights or rounds"
    assert ids == _until_end(oracle)
    return "answered as transformers"


def _until_end(oracle: dict[str, Any]) -> list[int]:
    ids: list[int] = oracle["ids"]
    end = next((at for at in range(1, len(ids)) if ids[at] in oracle["eos"]), len(ids))
    return ids[: end + 1]
