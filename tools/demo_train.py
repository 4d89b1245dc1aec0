"""The training loop: resumable, budgeted in steps, with a switch to finish early."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from demo_loss import head_loss
from demo_model import Routing, ScaledAdam, align_sentinels, build, look_around
from demo_spans import IGNORE, PAD, Blanked, Example, collate, corrupt, forever
from demo_tokenizer import PIECES, Units


@dataclass(frozen=True)
class Plan:
    """How long and how fast: warm-up, a constant rate, then a linear decay to nothing."""

    steps: int = 2270
    decay_steps: int = 570
    warmup_steps: int = 150
    rate: float = 0.012
    tokens: int = 4096
    long_share: float = 0.6
    align_step: int = 750
    look_step: int = 1000
    seed: int = 2026
    eval_every: int = 250

    def learning_rate(self, step: int) -> float:
        """The rate of one step."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        left = min(1.0, max(0.0, (self.steps - step) / self.decay_steps))
        return self.rate * warm * left

    def long_spans(self, step: int) -> float:
        """The share of long spans: most examples until the sentinels are aligned, then half of that, at last few."""
        if step < self.align_step:
            return self.long_share
        return self.long_share / (2 if step < self.steps - self.decay_steps else 6)


def is_span_token(labels: torch.Tensor) -> torch.Tensor:
    """Targets that are text: neither padding, nor a sentinel, nor the end mark."""
    return (labels > 1) & (labels < PIECES)


class Trainer:
    """Model, optimiser and position in the data, all of which a checkpoint keeps."""

    def __init__(self, plan: Plan, train: list[Example], held_out: list[Example], units: Units, work: Path) -> None:
        """Set up a fresh run; call resume() to go on with an old one."""
        torch.manual_seed(plan.seed)
        self.plan = plan
        self.train = train
        self.units = units
        self.work = work
        self.routing = Routing()
        self.model = build(self.routing)
        self.optimiser = ScaledAdam(list(self.model.parameters()))
        self.step = 0
        self.seconds, self.timed_steps = 0.0, 0  # of processor time: a paused or hindered run takes longer
        self.note = ""
        self.history: list[dict[str, Any]] = []
        rng = random.Random(plan.seed)
        blanked = [corrupt(example, units, rng) for example in held_out[:1500]]
        blanked.sort(key=lambda item: len(item.inputs))
        self.validation = [collate(blanked[i : i + 100]) for i in range(0, len(blanked), 100)]

    def save(self) -> None:
        """Write the checkpoint that resume() reads, atomically."""
        state = {
            "model": self.model.state_dict(),
            "first": self.optimiser.first,
            "second": self.optimiser.second,
            "step": self.step,
            "steps": self.plan.steps,
            "decay_steps": self.plan.decay_steps,
            "rate": self.plan.rate,
            "seconds": self.seconds,
            "timed_steps": self.timed_steps,
            "note": self.note,
            "history": self.history,
        }
        torch.save(state, self.work / "checkpoint.tmp")
        (self.work / "checkpoint.tmp").replace(self.work / "checkpoint.pt")

    def resume(self) -> bool:
        """Go on from the last checkpoint, if there is one."""
        path = self.work / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.first, self.optimiser.second = state["first"], state["second"]
        self.optimiser.steps = self.step = state["step"]
        self.seconds, self.timed_steps, self.note = state["seconds"], state["timed_steps"], state["note"]
        if self.note:
            changed = {key: state[key] for key in ("steps", "decay_steps", "rate")}
            self.plan = replace(self.plan, **changed)
        self.history = state["history"]
        return True

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cross entropy over the whole target, the same over span tokens, and the routers' losses."""
        labels = batch["labels"]
        self.routing.start(batch["input_ids"] != PAD, labels != IGNORE)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            encoded = self.model.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            hidden = self.model.decoder(
                input_ids=batch["decoder_input_ids"],
                encoder_hidden_states=encoded.last_hidden_state,
                encoder_attention_mask=batch["attention_mask"],
                use_cache=False,
            ).last_hidden_state
        real = labels != IGNORE
        scaled = hidden[real].float() * self.model.config.d_model**-0.5  # as transformers does for a tied head
        mean, each = head_loss(scaled, self.model.lm_head.weight, labels[real])
        text = is_span_token(labels[real])
        settings = self.model.config
        # Summed over the layers, as in the paper: a mean would leave each of four layers a quarter of the push.
        balance, z = torch.stack(self.routing.balance).sum(), torch.stack(self.routing.z).sum()
        routers = settings.router_aux_loss_coef * balance + settings.router_z_loss_coef * z
        return mean, each[text].mean(), routers

    def run(self, log: Callable[[str], None]) -> None:
        """Train to the plan's last step."""
        self.model.train()
        batches = forever(self.train, self.plan.tokens, self.plan.seed, self.step)
        began, used, seen, recent = time.monotonic(), time.process_time(), 0, []
        while self.step < self.plan.steps:
            if self.step == self.plan.align_step:
                align_sentinels(self.model)
            if self.step == self.plan.look_step:
                look_around(self.model)
            # Seeded by the step: a resumed run draws the same blanks and the same noise.
            rng = random.Random(self.plan.seed * 1_000_003 + self.step)
            torch.manual_seed(self.plan.seed + self.step)
            share = self.plan.long_spans(self.step)
            blanked: list[Blanked] = [corrupt(self.train[i], self.units, rng, share) for i in next(batches)]
            batch = collate(blanked)
            total, text, routers = self.loss(batch)
            torch.autograd.backward(total + routers)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            if torch.isfinite(norm):
                self.optimiser.step(self.plan.learning_rate(self.step))
            self.step += 1
            seen += int((batch["labels"] != IGNORE).sum() + batch["attention_mask"].sum())
            recent.append((float(text.detach()), float(routers.detach())))
            if self.step % 50 == 0:
                mean = [sum(values) / len(recent) for values in zip(*recent, strict=True)]
                speed = seen / (time.monotonic() - began)
                rate = self.plan.learning_rate(self.step)
                log(
                    f"step {self.step}/{self.plan.steps} rate {rate:.4f} span loss {mean[0]:.3f} "
                    f"router loss {mean[1]:.4f} {speed:.0f} tokens/s"
                )
                self._maybe_finish_early(log)
                self.seconds += time.process_time() - used
                self.timed_steps += 50
                used = time.process_time()
                began, seen, recent = time.monotonic(), 0, []
            if self.step % self.plan.eval_every == 0 or self.step == self.plan.steps:
                self._evaluate(log)
                self.save()

    def _maybe_finish_early(self, log: Callable[[str], None]) -> None:
        """A file named decay-now, holding a number of steps, starts the final decay from here."""
        switch = self.work / "decay-now"
        if switch.exists():
            steps = int(switch.read_text().strip() or self.plan.decay_steps)
            switch.unlink()
            if self.step + steps < self.plan.steps:
                self.note = (
                    f"The shipped run was finished so, from step {self.step} over {steps} of {self.plan.steps} planned."
                )
                rate = self.plan.learning_rate(self.step)
                self.plan = replace(self.plan, steps=self.step + steps, decay_steps=steps, rate=rate)
                log(f"final decay from step {self.step} over {steps} steps")

    @torch.no_grad()
    def _evaluate(self, log: Callable[[str], None]) -> None:
        """Log the held-out loss and every sparse layer's load."""
        self.model.train(False)
        self.routing.load = {}
        losses, weights = [], []
        for batch in self.validation:
            _, text, _ = self.loss(batch)
            losses.append(float(text))
            weights.append(int(is_span_token(batch["labels"]).sum()))
        mean = sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights)
        load = {name: [round(float(x), 3) for x in part / part.sum()] for name, part in self.routing.load.items()}
        entry = {"step": self.step, "rate": self.plan.learning_rate(self.step), "span_loss": mean, "load": load}
        self.history.append(entry)
        log(f"held-out span loss {mean:.4f} (perplexity {math.exp(mean):.1f})")
        for name, shares in load.items():
            log(f"  load {name.removesuffix('.mlp')}: {' '.join(f'{share:.2f}' for share in shares)}")
        core_hours = self.seconds / 3600 / max(1, self.timed_steps) * self.step
        facts = {**asdict(self.plan), "core_hours": core_hours, "note": self.note}
        (self.work / "plan.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
        (self.work / "history.json").write_text(json.dumps(self.history) + "\n", encoding="utf-8")
        self.routing.load = {}
        self.model.train()
