"""Evaluates dtypes one after another, each in a process of its own so that its peak is its own, and compares them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from switchrun.bench.children import ChildError, run_child
from switchrun.errors import SwitchrunError

SCHEMA_VERSION = 1
_CELL = "switchrun.bench.eval_cell"
#: What is wrong with these is wrong with them in every dtype.
_COMMON = ("usage", "input", "model", "network")

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What to evaluate.

    Attributes:
        model: As `--model` has it.
        text: What the text is called in messages and records.
        lines: Its lines.
        cpu_memory: Bytes for each process; None is most of what is free.
        offload_folder: Where switchrun writes.
        offload_limit: As `--offload-limit` has it.
        tokenizer: As `--tokenizer` has it.
        seed: Decides the spans.
        batch_size: Passages that attend and generate together.
        max_new_tokens: Most tokens to generate for each passage; 0 generates nothing.
    """

    model: str | None
    text: str
    lines: Sequence[str]
    cpu_memory: int | None
    offload_folder: str | None
    offload_limit: str | None
    tokenizer: str | None
    seed: int
    batch_size: int
    max_new_tokens: int

    def run(self, dtypes: Sequence[str], reference: str, tell: Callable[[str], None]) -> Record:
        """Evaluate and compare; a dtype that fails has its error in its row.

        Args:
            dtypes: What to compute in, in the order of the rows.
            reference: The one among them that the others are held against.
            tell: Called with a line for a human now and then.

        Raises:
            SwitchrunError: Something is wrong that no other dtype would mend, or every dtype failed.
        """
        answers: dict[str, Record] = {}
        failures: dict[str, Record] = {}
        for number, dtype in enumerate(dtypes, 1):
            tell(f"{dtype}, {number} of {len(dtypes)}")
            try:
                answers[dtype] = run_child(_CELL, asdict(self) | {"dtype": dtype}, None)
            except ChildError as error:
                if error.record["kind"] in _COMMON:
                    raise as_error(error.record) from error
                failures[dtype] = error.record
                continue
            for warning in answers[dtype]["warnings"]:
                tell(f"warning: {dtype}: {warning}")
        if not answers:
            raise as_error(next(iter(failures.values())))
        base = answers.get(reference)
        first = next(iter(answers.values()))
        for repair in first["repairs"]:
            tell(f"note: {repair}")
        return {
            "schema_version": SCHEMA_VERSION,
            "model": first["model"],
            "text": _text(self, first),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            "reference": reference,
            "rows": [
                _row(dtype, answers[dtype], base) if dtype in answers else _failed(dtype, failures[dtype])
                for dtype in dtypes
            ],
        }


def as_error(record: Record) -> SwitchrunError:
    """Give the error that a child told of."""
    error = SwitchrunError(record["message"], record["hint"])
    error.exit_code, error.kind = record["exit_code"], record["kind"]
    return error


def token_agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Give the share of places that have the same token."""
    places = [a == b for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)]
    return sum(places) / len(places)


def output_agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float | None:
    """Give the share of passages whose generated ids are all the same; None if nothing was generated."""
    same = [list(one) == list(other) for one, other in zip(ours, theirs, strict=True)]
    return sum(same) / len(same) if same else None


def _text(task: Evaluation, answer: Record) -> Record:
    return {
        "name": task.text,
        "lines": len(task.lines),
        "passages": len(answer["predictions"]),
        "skipped": answer["skipped"],
        "cut": answer["cut"],
        "input_tokens": answer["input_tokens"],
        "target_tokens": answer["target_tokens"],
    }


def _row(dtype: str, answer: Record, base: Record | None) -> Record:
    same_tokens = same_outputs = difference = None
    if base is not None:
        difference = answer["loss"] - base["loss"]
        same_tokens = token_agreement(answer["predictions"], base["predictions"])
        same_outputs = output_agreement(answer["outputs"], base["outputs"])
    measured = (
        "passes", "hidden_bytes", "experts_used", "open_seconds", "loss_pass", "generation", "peak_rss_bytes",
        "expert_slots", "slot_bytes",
    )  # fmt: skip
    return {
        "name": dtype,
        "status": "ok",
        "dtype": answer["dtype"],
        "compute_dtype": answer["compute_dtype"],
        "loss": answer["loss"],
        "loss_difference": difference,
        "token_agreement": same_tokens,
        "output_agreement": same_outputs,
        **{key: answer[key] for key in measured},
        "error": None,
    }


def _failed(dtype: str, error: Record) -> Record:
    return {"name": dtype, "status": "failed", "error": error}
