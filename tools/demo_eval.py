"""Measure the shipped checkpoint on held-out text, through plain transformers and as it is stored."""

from __future__ import annotations

import math
import platform
import random
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from demo_corpus import Corpus
from demo_spans import IGNORE, PAD, Blanked, Example, blank, collate, prepare, single_words
from demo_tokenizer import Units
from demo_train import is_span_token
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from switchrun.bench.spans import span_starts

SEED = 7
BATCH = 64
SEED_SENTENCE = "A <extra_id_0> walks into a bar a orders a <extra_id_1> with <extra_id_2> pinch of <extra_id_3>."
PACKAGES = ("torch", "transformers", "sentencepiece", "tokenizers", "safetensors")


def _batches(blanked: list[Blanked]) -> Iterator[list[Blanked]]:
    ordered = sorted(blanked, key=lambda item: len(item.inputs))
    for start in range(0, len(ordered), BATCH):
        yield ordered[start : start + BATCH]


def unigram(examples: list[Example]) -> Counter[int]:
    """How often every piece occurs in the training text."""
    return Counter(token for example in examples for ids in example.natural for token in ids)


class Load:
    """Counts, by sparse layer, the real tokens that each expert is chosen for."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Hook every router of the model."""
        self.counts: dict[str, torch.Tensor] = {}
        self.masks: dict[str, torch.Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, SwitchTransformersTop1Router):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        layer = name.removesuffix(".mlp.router")

        def count(_module: torch.nn.Module, _inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
            chosen = outputs[0] * self.masks[layer.split(".")[0]][..., None]
            self.counts[layer] = self.counts.get(layer, torch.zeros(1)) + chosen.sum((0, 1))

        return count

    def shares(self) -> dict[str, list[float]]:
        """Each expert's share of its layer's tokens."""
        return {layer: [round(float(x), 4) for x in part / part.sum()] for layer, part in self.counts.items()}


@torch.no_grad()
def span_loss(model: Any, blanked: list[Blanked], pieces: Counter[int], load: Load) -> dict[str, float]:
    """Mean loss over the text tokens of the targets: the model's, and that of the pieces' plain frequencies."""
    total = sum(pieces.values())
    size = model.config.vocab_size
    frequencies = torch.tensor([pieces[index] + 1 for index in range(size)], dtype=torch.float64) / (total + size)
    ours, baseline, count = 0.0, 0.0, 0
    for part in _batches(blanked):
        batch = collate(part)
        labels = batch.pop("labels")
        load.masks = {"encoder": batch["input_ids"] != PAD, "decoder": labels != IGNORE}
        logits = model(**batch).logits.float()
        text = is_span_token(labels)
        ours += float(F.cross_entropy(logits[text], labels[text], reduction="sum"))
        baseline -= float(frequencies.log()[labels[text]].sum())
        count += int(text.sum())
    return {"span_tokens": count, "span_loss": ours / count, "unigram_loss": baseline / count}


@torch.no_grad()
def single_word_match(model: Any, tokenizer: Any, blanked: list[Blanked], guess: str) -> dict[str, float]:
    """How often the greedy answer for one blanked word is the very word, and how often the guess is."""
    hits = guesses = 0
    answers: Counter[str] = Counter()
    for part in _batches(blanked):
        batch = collate(part)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        outputs = model.generate(**inputs, max_new_tokens=12, do_sample=False, num_beams=1)
        for item, text in zip(part, tokenizer.batch_decode(outputs), strict=True):
            answer = text.split("<extra_id_0>")[-1].split("<extra_id_1>")[0].strip()
            answers[answer] += 1
            hits += answer == item.answers[0]
            guesses += item.answers[0] == guess
    count = len(blanked)
    return {
        "blanks": count,
        "exact_match": hits / count,
        "commonest_word_match": guesses / count,
        "different_answers": len(answers),
    }


@torch.no_grad()
def well_formed(model: Any, tokenizer: Any, blanked: list[Blanked]) -> float:
    """How many greedy outputs answer every sentinel once, in order, and end by themselves."""
    good = 0
    first = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    for part in _batches(blanked):
        batch = collate(part)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        outputs = model.generate(**inputs, max_new_tokens=96, do_sample=False, num_beams=1)
        for item, row in zip(part, outputs.tolist(), strict=True):
            sentinels = [first - token for token in row if first - 99 <= token <= first]
            good += 1 in row and sentinels == list(range(len(item.answers) + 1))
    return good / len(blanked)


def fill(model: Any, tokenizer: Any, text: str) -> str:
    """The model's greedy output for one text, special tokens and all."""
    output = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=64, do_sample=False, num_beams=1)
    return str(tokenizer.decode(output[0]))


def evaluate(corpus: Corpus, folder: Path, work: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """All figures of the card, from the checkpoint in folder and the held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    units = Units(work / "tokenizer")
    held_out = prepare(corpus.held_out, units)
    rng = random.Random(SEED)
    spans = [blank(e, span_starts(len(e.words), rng), units) for e in held_out]
    singles = [blank(e, one, units) for e in held_out if (one := single_words(e.words, rng, at_most=1))]
    several = [blank(e, many, units) for e in held_out[:500] if (many := single_words(e.words, rng))]

    words = Counter(word for text in corpus.train for word in text.split() if word.isalpha())
    commonest = words.most_common(1)[0][0]
    load = Load(model)
    figures: dict[str, Any] = {"held_out_examples": len(held_out), "commonest_word": commonest}
    figures |= span_loss(model, spans, unigram(prepare(corpus.train, units)), load)
    figures["expert_shares"] = load.shares()
    load.masks = {"encoder": torch.ones(1, 1), "decoder": torch.ones(1, 1)}
    figures |= single_word_match(model, tokenizer, singles, commonest)
    figures["well_formed"] = well_formed(model, tokenizer, several)
    figures["seed_output"] = fill(model, tokenizer, SEED_SENTENCE)
    figures["parameters"] = sum(p.numel() for p in model.parameters())
    figures["loss_reduction"] = 1 - figures["span_loss"] / figures["unigram_loss"]
    figures["perplexity"] = math.exp(figures["span_loss"])
    figures["match_ratio"] = figures["exact_match"] / max(figures["commonest_word_match"], 1e-9)
    quarter = 0.25 / model.config.num_experts
    figures["experts_alive"] = {k: sum(x > quarter for x in v) for k, v in figures["expert_shares"].items()}
    figures["versions"] = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    for key, value in figures.items():
        log(f"{key}: {value}")
    return figures
