"""`switchrun doctor`: checks that switchrun will work here, and says what to do about what will not."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from switchrun.cli import options
from switchrun.cli.startup import quieten_libraries
from switchrun.cli.streams import write_answer
from switchrun.output.progress import Line


def doctor(
    model: options.Model = None,
    cpu_memory: options.CpuMemory = None,
    gpu_memory: options.GpuMemory = None,
    offload_folder: options.OffloadFolder = None,
    online: Annotated[
        bool, typer.Option("--online", help="Ask the Hub too; otherwise only for a --model that is on the Hub.")
    ] = False,
    style: options.Format = options.TableFormat.TABLE,
) -> None:
    """Check that switchrun will work here, and say what to do.

    Checks packages, torch, kernels, GPUs, memory, disks, the Hub and the model. Exit code: 0, or that of the first
    check that fails.

    Examples:
        switchrun doctor
        switchrun doctor --model google/switch-base-8 --cpu-memory 4GiB
        switchrun doctor --online --format json
    """
    from switchrun.doctor import examine
    from switchrun.output.sinks import checks_record, format_record
    from switchrun.output.tables import render_checks
    from switchrun.planning import resolve_budgets

    resolve_budgets(cpu_memory, 0 if gpu_memory is None else gpu_memory)  # refuses what is not a size
    quieten_libraries()
    progress = Line(sys.stderr)
    progress.begin("checking this machine…")
    try:
        checks = examine(offload_folder, model, cpu_memory=cpu_memory, gpu_memory=gpu_memory, online=online)
    finally:
        progress.clear()
    record = checks_record(checks)
    write_answer(format_record(record, indent=True) if style is options.TableFormat.JSON else render_checks(checks))
    if record["exit_code"]:
        raise typer.Exit(record["exit_code"])
