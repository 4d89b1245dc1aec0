"""Train switchrun's demo model from nothing: `python tools/train_demo.py`.

Fetches the text, trains the vocabulary and the model, evaluates what it wrote with plain transformers, and
fills switchrun/demo. A run that was stopped goes on where it was. Nothing of the text enters the repository.

Stages: all (the default), corpus, train, export, evaluate, leaks, record.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import pickle
import shutil
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import demo_corpus
import demo_tokenizer
import torch
from demo_model import export
from demo_spans import prepare
from demo_train import Plan, Trainer

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "switchrun" / "demo"
TOKENIZER_FILES = ("spiece.model", "tokenizer.json", "tokenizer_config.json")


def keep_memory() -> None:
    """Tell glibc to reuse freed memory: by default every large tensor is new pages, and those cost more than sums."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        m_mmap_max, m_trim_threshold = -4, -1
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def log(line: str) -> None:
    """Print with the time, at once: the log is what tells how far a background run is."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def load_corpus(work: Path) -> demo_corpus.Corpus:
    """The corpus and its vocabulary, made on the first call and read back later."""
    path = work / "corpus.pickle"
    if not path.exists():
        corpus = demo_corpus.build(ROOT, work)
        log(f"corpus: {corpus.facts}")
        demo_corpus.save_facts(corpus, work / "corpus.json")
        demo_tokenizer.train(corpus.train, work / "tokenizer")
        path.write_bytes(pickle.dumps(corpus))
    corpus = pickle.loads(path.read_bytes())
    assert isinstance(corpus, demo_corpus.Corpus)
    return corpus


def train(plan: Plan, work: Path) -> None:
    """Train, or go on training, to the end of the plan."""
    corpus = load_corpus(work)
    units = demo_tokenizer.Units(work / "tokenizer")
    examples, held_out = (prepare(texts, units) for texts in (corpus.train, corpus.held_out))
    log(f"{len(examples)} training examples, {sum(e.length for e in examples)} tokens; {len(held_out)} held out")
    trainer = Trainer(plan, examples, held_out, units, work)
    if trainer.resume():
        log(f"resumed at step {trainer.step}")
    log(f"{sum(p.numel() for p in trainer.model.parameters())} parameters; {plan}")
    trainer.run(log)


def export_checkpoint(work: Path, folder: Path) -> None:
    """Write the last checkpoint and the vocabulary as an ordinary transformers model."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(work / "tokenizer" / name, folder / name)
    from demo_model import Routing, build

    model = build(Routing())
    model.load_state_dict(torch.load(work / "checkpoint.pt", weights_only=True)["model"])
    export(model, folder)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    log(f"wrote {folder}: {size / 1e6:.2f} MB")


def main() -> None:
    """Run one stage or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = ("all", "corpus", "train", "export", "evaluate", "leaks", "record")
    parser.add_argument("stage", nargs="?", default="all", choices=stages)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "switchrun-demo")
    parser.add_argument("--out", type=Path, default=DEMO)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--decay-steps", type=int, default=Plan.decay_steps)
    parser.add_argument("--rate", type=float, default=Plan.rate)
    parser.add_argument("--tokens", type=int, default=Plan.tokens)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    keep_memory()
    torch.set_num_threads(2)
    plan = Plan(steps=options.steps, decay_steps=options.decay_steps, rate=options.rate, tokens=options.tokens)

    if options.stage in ("all", "corpus"):
        load_corpus(options.work)
    if options.stage in ("all", "train"):
        train(plan, options.work)
    if options.stage in ("all", "export"):
        export_checkpoint(options.work, options.out)
    if options.stage in ("all", "evaluate"):
        from demo_eval import evaluate

        figures = evaluate(load_corpus(options.work), options.out, options.work, log)
        (options.work / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if options.stage in ("all", "leaks"):
        found = demo_corpus.leaks(load_corpus(options.work), ROOT)
        (options.work / "leaks.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
        log(f"{len(found)} training sentences are quoted in README, docs or tests: {found[:10]}")
    if options.stage in ("all", "record"):
        from demo_record import write_record

        write_record(options.work, options.out, ROOT / "docs")


if __name__ == "__main__":
    main()
