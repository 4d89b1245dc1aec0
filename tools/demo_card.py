"""Write training.json, MODEL_CARD.md and the curve of docs/demo-model.md from the measured figures.

`python tools/demo_card.py` writes the card again from training.json, after a change of its template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from demo_corpus import HELD_OUT_PERCENT, MAX_UNITS
from demo_eval import SEED_SENTENCE
from demo_plot import curve

TEMPLATE = Path(__file__).with_name("templates") / "MODEL_CARD.md"
DEMO = Path(__file__).resolve().parents[1] / "switchrun" / "demo"


def write_card(work: Path, folder: Path, docs: Path) -> None:
    """Write what the other stages measured, and the card and the curve from it."""
    figures = json.loads((work / "figures.json").read_text())
    history = json.loads((work / "history.json").read_text())
    plan = json.loads((work / "plan.json").read_text())
    plan["rate"] = max(entry["rate"] for entry in history)
    config = json.loads((folder / "config.json").read_text())
    record = {"num_experts": config["num_experts"], **figures, "plan": plan}
    record["corpus"] = json.loads((work / "corpus.json").read_text())
    record["quoted_sentences_in_training_text"] = len(json.loads((work / "leaks.json").read_text()))
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "MODEL_CARD.md").write_text(card(folder), encoding="utf-8")
    (docs / "img").mkdir(exist_ok=True, parents=True)
    (docs / "img" / "demo-training.svg").write_text(curve(history, figures["unigram_loss"], plan["rate"]))


def card(folder: Path) -> str:
    """Return the card of the model in a folder, from its training.json and config.json."""
    figures = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plan, corpus = figures["plan"], figures["corpus"]
    values = {**config, **plan, **corpus, **figures} | _derived(folder, corpus, config, figures, plan)
    return TEMPLATE.read_text(encoding="utf-8").format(**values)


def _derived(
    folder: Path, corpus: dict[str, Any], config: dict[str, Any], figures: dict[str, Any], plan: dict[str, Any]
) -> dict[str, Any]:
    """Return table rows and words that the template wants ready-made."""
    counts = corpus["counts"]
    texts = {
        "wordnet": "definitions and example sentences of WordNet",
        "austen": "six novels by Jane Austen",
        "web": "World English Bible",
    }
    rows = [
        f"| {s['package']} ({s['manager']}) | {s['version']} | {texts[s['name']]} | {counts[s['name'] + ' words']:,} | "
        f"{s['licence']} |"
        for s in corpus["sources"]
    ]
    less = "reached" if figures["loss_reduction"] >= 1 / 3 else "missed"
    match = "reached" if figures["match_ratio"] >= 3 else "missed"
    words = sum(count for name, count in counts.items() if name.endswith(" words"))
    return {
        "weights_mb": (folder / "model.safetensors").stat().st_size / 1e6,
        "held_out_percent": HELD_OUT_PERCENT,
        "max_units": MAX_UNITS,
        "seed_sentence": SEED_SENTENCE,
        "pieces": config["vocab_size"] - 100,
        "words": words,
        "source_rows": "\n".join(rows),
        "alive": min(figures["experts_alive"].values()),
        "rough": counts["excluded as rough"],
        "repeated": counts["excluded as repeated"],
        "leaks": figures["quoted_sentences_in_training_text"],
        "aux": config["router_aux_loss_coef"],
        "z": config["router_z_loss_coef"],
        "jitter": config["router_jitter_noise"],
        "versions": ", ".join(f"{name} {number}" for name, number in figures["versions"].items()),
        "goal": f"The goals were a third less loss ({less}) and three times the match ({match}).",
        "early": plan["note"],
    }


if __name__ == "__main__":
    (DEMO / "MODEL_CARD.md").write_text(card(DEMO), encoding="utf-8")
