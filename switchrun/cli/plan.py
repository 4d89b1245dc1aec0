"""`switchrun plan`: which weights go where and why, and what a fill will cost; from headers alone."""

from __future__ import annotations

from typing import Annotated

import typer

from switchrun.checkpoint.types import HubWay
from switchrun.cli import options
from switchrun.cli.downloads import shown_opening
from switchrun.cli.help import Panel
from switchrun.cli.streams import write_answer
from switchrun.dtypes import DtypeChoice
from switchrun.output.sinks import format_record


def plan(
    model: options.Model = None,
    dtype: options.Dtype = DtypeChoice.AUTO,
    cpu_memory: options.CpuMemory = None,
    gpu_memory: options.GpuMemory = None,
    offload_folder: options.OffloadFolder = None,
    device_map: options.DeviceMap = "auto",
    batch_size: Annotated[
        str,
        typer.Option(
            envvar="SWITCHRUN_BATCH_SIZE",
            metavar="auto|N",
            rich_help_panel=Panel.MEMORY,
            help="Inputs to reserve memory for; auto: one, and a share of what is left for more.",
        ),
    ] = "1",
    num_beams: options.NumBeams = 1,
    input_tokens: Annotated[
        int,
        typer.Option(metavar="N", min=1, rich_help_panel=Panel.ESTIMATE, help="Tokens of an input."),
    ] = 24,
    output_tokens: Annotated[
        int,
        typer.Option(metavar="N", min=1, rich_help_panel=Panel.ESTIMATE, help="Tokens generated for it."),
    ] = 12,
    disk_bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="RATE|measure",
            show_default="as measured, else 1GB/s",
            rich_help_panel=Panel.ESTIMATE,
            help="Read bandwidth of the disk, like 1.8GB/s; measure: read experts for half a second.",
        ),
    ] = None,
    hub: options.Hub = HubWay.AUTO,
    network_bandwidth: options.NetworkBandwidth = None,
    style: Annotated[
        options.TableFormat,
        typer.Option("--format", help="table: to read; json: to process, and a file for --device-map."),
    ] = options.TableFormat.TABLE,
) -> None:
    """Show which weights go where and why, and what a fill will cost.

    No weights are read or downloaded.

    Examples:
        switchrun plan --model google/switch-c-2048 --cpu-memory 6GiB
        switchrun plan -m google/switch-base-8 --disk-bandwidth measure
        switchrun plan --format json --gpu-memory 0 > device-map.json
    """
    from switchrun.planning.opening import plan_model
    from switchrun.planning.options import OpenOptions

    chosen = OpenOptions(
        model=model,
        dtype=dtype.value,
        cpu_memory=cpu_memory,
        gpu_memory=gpu_memory,
        offload_folder=offload_folder,
        device_map=device_map,
        batch_size=options.batch_size(batch_size),
        num_beams=num_beams,
        max_new_tokens=output_tokens,
        hub=hub.value,
        network_bandwidth=network_bandwidth,
    )
    with shown_opening(chosen, quiet=False, asks=False) as (steps, warn):
        planned = plan_model(
            chosen,
            input_tokens=input_tokens,
            disk_bandwidth=disk_bandwidth,
            headers_only=True,
            warn=warn,
            steps=steps,
        )
    planned.close()
    made = planned.plan
    if style is options.TableFormat.JSON:
        write_answer(format_record(made.as_record(), indent=True))
    else:
        from switchrun.output.tables import render_plan

        write_answer(render_plan(made))
