"""The bundled demo model gives the same tokens in a session as in plain transformers, in both dtypes and any budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import SwitchTransformersForConditionalGeneration

import switchrun
from tests.model.test_same_tokens import check_ids
from tests.support.sessions import open_with_slots, small_process

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

DEMO = Path(switchrun.__file__).parent / "demo"
TEXTS = (
    "A <extra_id_0> walks into a bar a orders a <extra_id_1> with <extra_id_2> pinch of <extra_id_3>.",
    "The cat sat on the <extra_id_0>.",
    "He put his <extra_id_0> in his pocket and went <extra_id_1>.",
    "She gave him a <extra_id_0> of bread.",
)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("slots", [1, 5, None])
def test_the_demo_answers_as_plain_transformers_does(dtype: str, slots: int | None) -> None:
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    oracle = SwitchTransformersForConditionalGeneration.from_pretrained(DEMO, dtype=kind, local_files_only=True).eval()
    with open_with_slots(DEMO, slots, dtype=dtype, batch_size=len(TEXTS)) as session:
        check_ids(oracle, session, TEXTS, dtype)
        for text in TEXTS:
            check_ids(oracle, session, [text], dtype)
