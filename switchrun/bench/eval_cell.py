"""The process that evaluates one dtype: `python -m switchrun.bench.eval_cell`, with a task on stdin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from switchrun.bench.cell import Answer, Task, main
from switchrun.errors import BudgetError, InputError

if TYPE_CHECKING:
    from switchrun.experts.bookkeeping import CacheCounters
    from switchrun.planning.opening import PlannedModel as Prepared

#: Of what is left beside dense weights and a few slots, hidden states may take this share; slots get the rest.
_HIDDEN_SHARE = 0.5
_EVERYTHING = 1 << 50


def measure(task: Task) -> Answer:
    """Score the task's lines in its dtype, then generate for each; see `switchrun.bench.eval_run` for its keys."""
    import time

    from switchrun.machine import processor, ram
    from switchrun.model import evaluate as passes
    from switchrun.model.engine import Engine
    from switchrun.model.tokenizer import Tokenizer
    from switchrun.planning import memory

    prepared = _prepare(task, task["cpu_memory"])
    checkpoint, precision = prepared.checkpoint, prepared.plan.precision
    tokenizer = Tokenizer.load(checkpoint, task["tokenizer"])
    text = _passages(task, tokenizer, checkpoint)
    batches = passes.make_batches(text.usable, task["batch_size"], int(checkpoint.config.get("pad_token_id") or 0))
    sizes = (int(checkpoint.config["d_model"]), precision.compute.itemsize)
    use = prepared.plan.tier("cpu")
    fixed = use.total_bytes - use.expert_bytes + min(use.expert_slots, memory.RESERVED_SLOTS) * use.slot_bytes
    allowed = int(((use.budget_bytes or 0) - fixed) * _HIDDEN_SHARE)
    groups = passes.split_passes(batches, *sizes, allowed)
    reserved = min(allowed, max(passes.hidden_bytes(group, *sizes) for group in groups))
    prepared = _prepare(task, (use.budget_bytes or 0) - reserved)
    warnings: list[str] = []
    with Engine(prepared, warn=warnings.append) as engine:
        opened = processor.process_age_seconds()
        start = time.perf_counter()
        most_rows = task["batch_size"] * memory.max_input_tokens(checkpoint)
        result = passes.evaluate(engine.model, groups, most_rows)
        scored = time.perf_counter()
        counters = engine.cache.counters()
        outputs = _generate(engine, batches, task["max_new_tokens"], len(text.usable))
        generated = time.perf_counter()
        return {
            "model": {"id": checkpoint.id, "revision": checkpoint.revision, "stored_dtype": checkpoint.stored_dtype},
            "dtype": prepared.plan.dtype,
            "compute_dtype": prepared.plan.precision.compute.value,
            "skipped": text.skipped,
            "cut": text.cut,
            "input_tokens": sum(len(passage.inputs) for passage in text.usable),
            "target_tokens": sum(len(passage.target) for passage in text.usable),
            "loss": sum(score.loss for score in result.scores) / sum(len(p.target) for p in text.usable),
            "predictions": [score.predictions for score in result.scores],
            "outputs": outputs,
            "passes": result.passes,
            "hidden_bytes": result.hidden_bytes,
            "experts_used": result.experts,
            "open_seconds": opened,
            "loss_pass": _work(scored - start, counters),
            "generation": _work(generated - scored, engine.cache.counters().since(counters)) if outputs else None,
            "peak_rss_bytes": ram.peak_rss_bytes(),
            "expert_slots": engine.cache.num_slots,
            "slot_bytes": use.slot_bytes,
            "warnings": warnings,
            "repairs": list(checkpoint.repairs),
        }


def _prepare(task: Task, cpu_memory: int | None) -> Prepared:
    """Plan with all dense weights in memory.

    Raises:
        BudgetError: They and a slot do not fit.
    """
    from switchrun.planning.budgets import resolve_budgets
    from switchrun.units import MIB, format_bytes

    allowed = resolve_budgets(cpu_memory, 0).cpu_bytes
    try:
        return _plan(task, allowed)
    except BudgetError as error:
        use = _plan(task, _EVERYTHING).plan.tier("cpu")
        least = -(-(use.total_bytes - use.expert_bytes + use.slot_bytes) // MIB)
        raise BudgetError(
            f"eval keeps all dense weights in memory and needs {least} MiB, {format_bytes(allowed)} is allowed",
            f"use --cpu-memory {least}MiB or more",
        ) from error


def _plan(task: Task, cpu_bytes: int) -> Prepared:
    from switchrun.planning.opening import plan_model
    from switchrun.planning.options import OpenOptions

    return plan_model(
        OpenOptions(
            model=task["model"],
            dtype=task["dtype"],
            cpu_memory=cpu_bytes,
            gpu_memory=0,
            offload_folder=task["offload_folder"],
            offload_limit=task["offload_limit"],
            # Blocks are run one by one, past the hooks that would bring weights in from disk.
            device_map={"": "cpu"},
            tokenizer=task["tokenizer"],
            batch_size=task["batch_size"],
            max_new_tokens=max(1, task["max_new_tokens"]),
        )
    )


def _passages(task: Task, tokenizer: Any, checkpoint: Any) -> Any:
    from switchrun.model.sentinels import NUM_SENTINELS
    from switchrun.model.spans import LEAST_TOKENS, make_passages
    from switchrun.planning.memory import max_input_tokens

    eos = tokenizer.eos_id
    text = make_passages(
        task["lines"],
        tokenizer.plain_ids,
        [each for each in map(tokenizer.sentinel_id, range(NUM_SENTINELS)) if each is not None],
        int(checkpoint.config.get("eos_token_id") or 1) if eos is None else eos,
        max_input_tokens(checkpoint),
        task["seed"],
    )
    if not text.usable:
        raise InputError(f"no line of {task['text']} is long enough for a span", f"{LEAST_TOKENS} tokens are the least")
    return text


def _generate(engine: Any, batches: Any, max_new_tokens: int, count: int) -> list[list[int]]:
    """Give the greedily generated ids of each passage, in order; none if no token is wanted."""
    from switchrun.model.generate import generate_batch
    from switchrun.model.records import GenerationOptions

    if not max_new_tokens:
        return []
    options = GenerationOptions(max_new_tokens=max_new_tokens)
    found: dict[int, list[int]] = {}
    for batch in batches:
        rows = generate_batch(
            engine.model, engine.context, batch.input_ids, batch.attention_mask, options, lambda _: None
        )
        found |= {row: list(output.ids) for row, output in zip(batch.rows, rows, strict=True)}
    return [found[row] for row in range(count)]


def _work(seconds: float, counters: CacheCounters) -> Answer:
    return {"seconds": seconds, "expert_loads": counters.loads, "load_bytes": counters.load_bytes}


if __name__ == "__main__":
    main(measure)
