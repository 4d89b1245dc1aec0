"""Write training.json and the curve of docs/demo-model.md from what the other stages measured.

The card, switchrun/demo/MODEL_CARD.md, is written by hand; tests/test_demo_model.py holds its figures against it.
"""

from __future__ import annotations

import json
from pathlib import Path

from demo_plot import curve


def write_record(work: Path, folder: Path, docs: Path) -> None:
    """Write both files: the record beside the model, the curve into the documents."""
    figures = json.loads((work / "figures.json").read_text())
    history = json.loads((work / "history.json").read_text())
    plan = json.loads((work / "plan.json").read_text())
    plan["rate"] = max(entry["rate"] for entry in history)
    record = {
        "num_experts": json.loads((folder / "config.json").read_text())["num_experts"],
        **figures,
        "plan": plan,
        "corpus": json.loads((work / "corpus.json").read_text()),
        "quoted_sentences_in_training_text": len(json.loads((work / "leaks.json").read_text())),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (docs / "img").mkdir(exist_ok=True, parents=True)
    (docs / "img" / "demo-training.svg").write_text(curve(history, figures["unigram_loss"], plan["rate"]))
