"""Write MODEL_CARD.md, training.json, docs/demo-model.md and the curve from the measured figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from demo_corpus import HELD_OUT_PERCENT, MAX_UNITS
from demo_eval import SEED_SENTENCE
from demo_plot import curve

TEMPLATES = Path(__file__).with_name("templates")


def write_card(work: Path, folder: Path, docs: Path) -> None:
    """Fill in the templates from what the other stages measured."""
    figures = json.loads((work / "figures.json").read_text())
    corpus = json.loads((work / "corpus.json").read_text())
    history = json.loads((work / "history.json").read_text())
    plan = json.loads((work / "plan.json").read_text())
    leaks = json.loads((work / "leaks.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    plan["rate"] = max(entry["rate"] for entry in history)
    values = {**config, **plan, **corpus, **figures} | _derived(folder, corpus, config, figures, plan, len(leaks))
    (folder / "MODEL_CARD.md").write_text(_template("MODEL_CARD.md").format(**values), encoding="utf-8")
    (docs / "demo-model.md").write_text(_template("demo-model.md").format(**values), encoding="utf-8")
    (docs / "img").mkdir(exist_ok=True, parents=True)
    (docs / "img" / "demo-training.svg").write_text(curve(history, figures["unigram_loss"], plan["rate"]))
    record = {"num_experts": config["num_experts"], **figures, "plan": plan, "corpus": corpus}
    record["quoted_sentences_in_training_text"] = len(leaks)
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _derived(
    folder: Path,
    corpus: dict[str, Any],
    config: dict[str, Any],
    figures: dict[str, Any],
    plan: dict[str, Any],
    leaks: int,
) -> dict[str, Any]:
    """Table rows and words that the templates want ready-made."""
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
    load = [
        f"| {layer} | {figures['experts_alive'][layer]} of {len(shares)} | {max(shares):.1%}, {min(shares):.1%} |"
        for layer, shares in figures["expert_shares"].items()
    ]
    less = "reached" if figures["loss_reduction"] >= 1 / 3 else "missed"
    match = "reached" if figures["match_ratio"] >= 3 else "missed"
    words = sum(count for name, count in counts.items() if name.endswith(" words"))
    return {
        "weights_mb": (folder / "model.safetensors").stat().st_size / 1e6,
        "held_out_percent": HELD_OUT_PERCENT,
        "max_units": MAX_UNITS,
        "seed_sentence": SEED_SENTENCE,
        "hours": f"{plan['core_hours']:.1f}",
        "pieces": config["vocab_size"] - 100,
        "words": words,
        "source_rows": "\n".join(rows),
        "load_rows": "\n".join(load),
        "hash_rows": "\n".join(f"| {s['file']} | `{s['sha256']}` |" for s in corpus["sources"]),
        "rough": counts["excluded as rough"],
        "repeated": counts["excluded as repeated"],
        "quoted": counts.get("excluded as quoted", 0),
        "leaks": leaks,
        "aux": config["router_aux_loss_coef"],
        "z": config["router_z_loss_coef"],
        "jitter": config["router_jitter_noise"],
        "long_share_late": plan["long_share"] / 6,
        "versions": ", ".join(f"{name} {number}" for name, number in figures["versions"].items()),
        "goal": f"The goals were a third less loss ({less}) and three times the match ({match}).",
        "early": plan["note"],
    }
