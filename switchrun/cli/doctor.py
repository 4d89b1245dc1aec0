"""`switchrun doctor`: looks whether switchrun will work here, and tells the mend of what will not."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from switchrun.cli import options
from switchrun.cli.startup import quieten_libraries
from switchrun.cli.streams import write_answer
from switchrun.machine import folders


class DoctorFormat(StrEnum):
    """What `switchrun doctor --format` takes."""

    TABLE = "table"
    JSON = "json"


def doctor(
    model: options.Model = None,
    cpu_memory: options.CpuMemory = None,
    gpu_memory: options.GpuMemory = None,
    offload_folder: options.OffloadFolder = None,
    online: Annotated[bool, typer.Option("--online", help="Ask the Hub too; there is no network access else.")] = False,
    style: Annotated[
        DoctorFormat, typer.Option("--format", help="table: to read; json: to process.")
    ] = DoctorFormat.TABLE,
) -> None:
    """Look whether switchrun will work here: packages, torch, GPUs, memory, disks, the Hub, the model.

    Exit code: 0, or that of the first check that fails.
    """
    from switchrun.doctor import Questions, examine, exit_code
    from switchrun.output.doctor_tables import checks_record, render_checks
    from switchrun.output.sinks import format_record
    from switchrun.planning import resolve_budgets

    resolve_budgets(cpu_memory, 0 if gpu_memory is None else gpu_memory)  # refuses what is not a size
    quieten_libraries()
    checks = examine(Questions(folders.offload_folder(offload_folder), model, cpu_memory, gpu_memory, online))
    if style is DoctorFormat.JSON:
        write_answer(format_record(checks_record(checks), indent=True))
    else:
        write_answer(render_checks(checks))
    if code := exit_code(checks):
        raise typer.Exit(code)
