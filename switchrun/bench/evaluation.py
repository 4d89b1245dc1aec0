"""Evaluates dtypes one after another, each in a process of its own so that its peak is its own, and compares them.

The process runs `evaluate_dtype`, so this file imports torch only inside functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from switchrun.bench.child_process import CHILD, Answer, ChildError, OnStep, Task, as_error, open_engine, run_child
from switchrun.bench.spans import LEAST_SENTINELS, LEAST_TOKENS, Passages, make_passages
from switchrun.checkpoint.generation import end_token
from switchrun.checkpoint.steps import NO_STEPS, Steps
from switchrun.dtypes import QMOE
from switchrun.errors import BudgetError, InputError, ModelError, UsageError
from switchrun.machine import processor, ram
from switchrun.model.opening import ImportLibraries, import_model
from switchrun.model.reporting import Reporter
from switchrun.model.sentinels import NUM_SENTINELS
from switchrun.model.tokenizer import Tokenizer
from switchrun.model.tokenizer_files import find_tokenizer
from switchrun.planning import memory
from switchrun.planning.budgets import resolve_budgets
from switchrun.planning.opening import PlannedModel, plan_model
from switchrun.planning.options import OpenOptions
from switchrun.units import MIB, format_bytes

if TYPE_CHECKING:
    from switchrun.bench.loss_pass import Batch
    from switchrun.checkpoint.types import SwitchCheckpoint
    from switchrun.experts.bookkeeping import CacheCounters
    from switchrun.model.engine import Engine

SCHEMA_VERSION = 1
#: What is wrong with these is wrong with them in every dtype.
_COMMON = ("usage", "input", "model", "network")
#: What is compared by default; experts that are stored in few bits cannot be had in others.
DEFAULT_DTYPES = ("auto", "int8", "nf4")
_FEW_BITS = ("I8", QMOE)
#: The row of another model.
_REFERENCE = "reference"
#: Of what is left beside dense weights and a few slots, hidden states may take this share; slots get the rest.
_HIDDEN_SHARE = 0.5
_EVERYTHING = 1 << 50


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What to evaluate: `lines` of what is called `text`, and options as `switchrun eval` has them."""

    model: str | None
    reference_model: str | None
    text: str
    lines: Sequence[str]
    cpu_memory: int | None
    offload_folder: str | None
    offload_limit: str | None
    hub: str
    tokenizer: str | None
    seed: int
    batch_size: int
    max_new_tokens: int

    def run(
        self,
        dtypes: Sequence[str] | None,
        reference: str | None,
        tell: Callable[[str], None],
        watch: Callable[[str], OnStep],
    ) -> Answer:
        """Evaluate dtypes, or those that make sense for the model, and hold them against one of them.

        `tell` takes a line for a human, and `watch` what is evaluated now; it returns what takes its steps.
        That is `reference`, else the reference model if there is one, else the first. A dtype that fails has its error
        in its row.

        Raises:
            SwitchrunError: Something is wrong that is so in every dtype, or every dtype failed.
        """
        answers: dict[str, Answer] = {}
        failures: dict[str, Answer] = {}
        names = [*([_REFERENCE] if self.reference_model else []), *(dtypes or DEFAULT_DTYPES)]
        for number, name in enumerate(names, 1):
            on_step = watch(f"dtype {number} of {len(names)}: {name}")
            other = {"model": self.reference_model, "dtype": "auto"} if name == _REFERENCE else {"dtype": name}
            try:
                answers[name] = run_child(CHILD, asdict(self) | {"work": "evaluate"} | other, on_step=on_step)
            except ChildError as error:
                if error.record["kind"] in _COMMON:
                    raise as_error(error.record) from error
                failures[name] = error.record
                continue
            for warning in answers[name]["warnings"]:
                tell(f"warning: {name}: {warning}")
            if dtypes is None and name != _REFERENCE and answers[name]["model"]["stored_dtype"] in _FEW_BITS:
                names = names[:number]
                break
        first = next((answer for name, answer in answers.items() if name != _REFERENCE), None)
        if first is None:
            raise as_error(next(iter(failures.values())))
        _check_same_text(list(answers.values()))
        reference = reference or names[0]
        for repair in first["repairs"]:
            tell(f"note: {repair}")
        base = answers.get(reference)
        return {
            "schema_version": SCHEMA_VERSION,
            "model": first["model"],
            "reference_model": answers[_REFERENCE]["model"] if _REFERENCE in answers else None,
            "text": {"name": self.text, "lines": len(self.lines), **first["text"]},
            "seed": self.seed,
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            "reference": reference,
            "rows": [
                _row(name, answers[name], base)
                if name in answers
                else {"name": name, "status": "failed", "error": failures[name]}
                for name in names
            ],
        }


def _check_same_text(answers: Sequence[Answer]) -> None:
    """Raise a UsageError if models cut the text into different tokens: then nothing can be compared."""
    if any(answer["text"] != answers[0]["text"] for answer in answers):
        raise UsageError(
            "--reference-model: it cuts the text into other tokens than the model",
            "give both one tokenizer: --tokenizer DIR or a Hub id",
        )


def _row(dtype: str, answer: Answer, base: Answer | None) -> Answer:
    compared: Answer = dict.fromkeys(("loss_difference", "token_agreement", "output_agreement"))
    if base is not None:
        compared["loss_difference"] = answer["row"]["loss"] - base["row"]["loss"]
        tokens, others = (list(chain.from_iterable(each["predictions"])) for each in (answer, base))
        compared["token_agreement"] = _agreement(tokens, others)
        compared["output_agreement"] = _agreement(answer["outputs"], base["outputs"])
    return {"name": dtype, "status": "ok", **answer["row"], **compared, "error": None}


def _agreement(ours: Sequence[Any], theirs: Sequence[Any]) -> float | None:
    """Return the share of places that hold the same; None if there are none."""
    same = [one == other for one, other in zip(ours, theirs, strict=True)]
    return sum(same) / len(same) if same else None


def evaluate_dtype(
    task: Task, import_libraries: ImportLibraries = import_model, report: Reporter | None = None
) -> Answer:
    """Score an evaluation's lines in the task's dtype, then generate for each; the work of the process."""
    report = report or Reporter()
    with report.working():
        planned = _plan(task, task["cpu_memory"], report)
        files = find_tokenizer(planned.checkpoint.path, task["tokenizer"])
        report("import")
        from switchrun.bench import loss_pass
    checkpoint, use = planned.checkpoint, planned.plan.tier("cpu")
    text = _passages(task, Tokenizer.load(checkpoint, files), checkpoint)
    batches = loss_pass.make_batches(text.usable, task["batch_size"])
    sizes = (int(checkpoint.config["d_model"]), planned.plan.precision.compute.itemsize)
    fixed = use.total_bytes - use.expert_bytes + min(use.expert_slots, memory.RESERVED_SLOTS) * use.slot_bytes
    allowed = int(((use.budget_bytes or 0) - fixed) * _HIDDEN_SHARE)
    groups = loss_pass.split_passes(batches, *sizes, allowed)
    reserved = min(allowed, max(loss_pass.hidden_bytes(group, *sizes) for group in groups))
    planned.close()  # only the second plan is opened
    planned = _plan(task, (use.budget_bytes or 0) - reserved)
    warnings: list[str] = []
    with open_engine(planned, warnings.append, import_libraries, report) as engine:
        opened = processor.process_age_seconds()
        start = time.perf_counter()
        most_rows = task["batch_size"] * memory.max_input_tokens(checkpoint)
        with report.working():
            result = loss_pass.score_passages(engine.model, groups, most_rows, partial(report, "score"))
            scored = time.perf_counter()
            counters = engine.cache.counters()
            outputs = _generate(engine, batches, task["max_new_tokens"], report)
        generated = time.perf_counter()
        target_tokens = sum(len(passage.target) for passage in text.usable)
        return {
            "model": {"id": checkpoint.id, "revision": checkpoint.revision, "stored_dtype": checkpoint.stored_dtype},
            "text": {
                "passages": len(text.usable),
                "skipped": text.skipped,
                "cut": text.cut,
                "input_tokens": sum(len(passage.inputs) for passage in text.usable),
                "target_tokens": target_tokens,
            },
            "row": {
                "dtype": planned.plan.dtype,
                "compute_dtype": planned.plan.precision.compute.value,
                "loss": sum(score.loss for score in result.scores) / target_tokens,
                "passes": result.passes,
                "hidden_bytes": result.hidden_bytes,
                "experts_used": result.experts,
                "open_seconds": opened,
                "loss_pass": _work(scored - start, counters),
                "generation": _work(generated - scored, engine.cache.counters().since(counters)) if outputs else None,
                "peak_rss_bytes": ram.peak_rss_bytes(),
                "expert_slots": engine.cache.num_slots,
                "slot_bytes": use.slot_bytes,
            },
            "predictions": [score.predictions for score in result.scores],
            "outputs": outputs,
            "warnings": warnings,
            "repairs": list(checkpoint.repairs),
        }


def _work(seconds: float, counters: CacheCounters) -> Answer:
    return {"seconds": seconds, "expert_loads": counters.loads, "load_bytes": counters.load_bytes}


def _plan(task: Task, cpu_memory: int | None, steps: Steps = NO_STEPS) -> PlannedModel:
    """Plan with all dense weights in memory; a `BudgetError` says what they and a slot need."""
    allowed = resolve_budgets(cpu_memory, {}).cpu_bytes
    options = OpenOptions(
        model=task["model"],
        dtype=task["dtype"],
        cpu_memory=allowed,
        gpu_memory=0,
        offload_folder=task["offload_folder"],
        offload_limit=task["offload_limit"],
        # Blocks are run one by one, past the hooks that would bring weights in from disk.
        device_map={"": "cpu"},
        tokenizer=task["tokenizer"],
        hub=task["hub"],
        batch_size=task["batch_size"],
        max_new_tokens=max(1, task["max_new_tokens"]),
    )
    try:
        return plan_model(options, steps=steps)
    except BudgetError as error:
        use = plan_model(replace(options, cpu_memory=_EVERYTHING)).plan.tier("cpu")
        least = -(-(use.total_bytes - use.expert_bytes + use.slot_bytes) // MIB)
        raise BudgetError(
            f"eval keeps all dense weights in memory and needs {least} MiB, {format_bytes(allowed)} is allowed",
            f"use --cpu-memory {least}MiB or more",
        ) from error


def _passages(task: Task, tokenizer: Tokenizer, checkpoint: SwitchCheckpoint) -> Passages:
    sentinels = [each for each in map(tokenizer.sentinel_id, range(NUM_SENTINELS)) if each is not None]
    if len(sentinels) < LEAST_SENTINELS:
        raise ModelError(f"eval needs {LEAST_SENTINELS} sentinels, the tokenizer has {len(sentinels)}")
    eos = end_token(checkpoint.config) if tokenizer.eos_id is None else tokenizer.eos_id
    limit = memory.max_input_tokens(checkpoint)
    try:
        text = make_passages(task["lines"], tokenizer.plain_ids, sentinels, eos, limit, task["seed"])
    except InputError as error:
        raise InputError(f"{task['text']}, {error.message}", error.hint) from error
    if not text.usable:
        raise InputError(f"no line of {task['text']} is long enough for a span", f"{LEAST_TOKENS} tokens are the least")
    return text


def _generate(engine: Engine, batches: Sequence[Batch], max_new_tokens: int, report: Reporter) -> list[list[int]]:
    """Return the greedily generated ids of each passage, in order; none if no token is wanted."""
    from switchrun.model.generate import generate_batch
    from switchrun.model.records import GenerationOptions

    if not max_new_tokens:
        return []
    options = GenerationOptions(max_new_tokens=max_new_tokens)
    found: dict[int, list[int]] = {}
    passages = sum(len(batch.rows) for batch in batches)
    for batch in batches:
        report("generate", len(found), passages)
        outputs = generate_batch(
            engine.model, engine.context, batch.input_ids, batch.attention_mask, options, lambda _: None
        )
        found |= {row: list(output.ids) for row, output in zip(batch.rows, outputs, strict=True)}
    return [found[row] for row in sorted(found)]
