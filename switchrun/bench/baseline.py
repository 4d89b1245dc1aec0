"""The stock recipe in a process of its own: `python -m switchrun.bench.baseline`, with a task on stdin."""

from __future__ import annotations

import time
from typing import Any

from switchrun.bench.cell import Answer, Task, main


def measure(task: Task) -> Answer:
    """Open the checkpoint with transformers and accelerate as their documentation says, and generate.

    The task's `path`, `dtype`, `cpu_budget_bytes` and `scratch` decide what is opened; the ids are those of the cell.
    """
    import torch
    from transformers import SwitchTransformersForConditionalGeneration

    from switchrun.bench.process import group_peak_bytes, io_read_bytes
    from switchrun.bench.workload import make_inputs
    from switchrun.machine import processor, ram
    from switchrun.planning.budgets import resolve_budgets

    budgets = resolve_budgets(task["cpu_budget_bytes"], task["gpu_memory"])
    model: Any = SwitchTransformersForConditionalGeneration.from_pretrained(
        task["path"],
        dtype=getattr(torch, task["torch_dtype"]),
        device_map="auto",
        max_memory={**budgets.gpu_bytes, "cpu": budgets.cpu_bytes},
        offload_folder=task["scratch"],
    )
    answer: Answer = {
        "open_seconds": processor.process_age_seconds(),
        "open_io_read_bytes": io_read_bytes(),
        "fills": [],
    }
    for turn in range(task["fills"]):
        seed = task["seed"] if task["cold"] else task["seed"] + turn
        ids = torch.tensor(make_inputs(model.config.to_dict(), task["batch_size"], task["input_tokens"], seed))
        start, before = time.perf_counter(), io_read_bytes()
        if model.device.type != "meta":
            ids = ids.to(model.device)
        with torch.no_grad():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=task["output_tokens"],
                min_new_tokens=task["output_tokens"],
                do_sample=False,
                num_beams=1,
            )
        after = io_read_bytes()
        answer["fills"].append(
            {
                "seconds": time.perf_counter() - start,
                "io_read_bytes": None if before is None or after is None else after - before,
                "peak_rss_bytes": ram.peak_rss_bytes(),
                "peak_group_bytes": group_peak_bytes(task),
                "output_ids": output.tolist(),
            }
        )
    return answer


if __name__ == "__main__":
    main(measure)
