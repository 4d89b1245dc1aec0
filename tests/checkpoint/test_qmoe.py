"""QMoE checkpoints: what lies where, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from switchrun.kernels import native
from tests.support.checkpoints import oracle_state
from tests.support.qmoe_checkpoints import qmoe_config, save_qmoe, ternary_model

pytestmark = pytest.mark.skipif(not native.paths(), reason="built without kernels")


@pytest.mark.parametrize("string_order", [False, True])
def test_what_is_made_decodes_to_the_model(string_order: bool, tmp_path: Path) -> None:
    model = ternary_model(qmoe_config(d_model=34, d_ff=46, num_experts=12))
    folder = save_qmoe(model, tmp_path, string_order=string_order)
    state = oracle_state(model)
    parts = [torch.load(path, weights_only=True) for path in sorted(folder.glob("exp*.pt"))]
    sizes = torch.load(folder / "sizes.pt", weights_only=True)
    assert len(parts) == 4
    for name, columns in [(f"{name}.{each}", 34 if each == "wi" else 46)
                          for name in {n.rpartition(".w")[0] for n in sizes} for each in ("wi", "wo")]:  # fmt: skip
        (part,) = [part for part in parts if f"{name}.w_comp" in part]
        codes, offsets, extremes = (part[f"{name}.{each}"] for each in ("w_comp", "row_off", "ter_minmax"))
        assert torch.equal(
            native.unpack_qmoe(native.QmoeMatrix(codes, offsets, extremes, columns)), state[f"{name}.weight"]
        )
        assert sizes[name] == len(codes)
