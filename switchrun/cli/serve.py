"""`switchrun serve`: keeps a model open and answers requests over HTTP."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from switchrun.checkpoint.types import HubWay
from switchrun.cli import options
from switchrun.cli.answering import open_session
from switchrun.cli.help import Panel
from switchrun.cli.startup import quieten_libraries
from switchrun.cli.streams import report, report_lines
from switchrun.dtypes import DtypeChoice
from switchrun.errors import UsageError, printable


def serve(
    model: options.Model = None,
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port to listen on; 0 is any that is free.")
    ] = 8080,
    socket: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            rich_help_panel=Panel.SERVER,
            help="Listen on a Unix socket instead, which only its owner may use.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="SWITCHRUN_TOKEN_FILE",
            metavar="FILE",
            rich_help_panel=Panel.SERVER,
            help="A file with a token that requests must send, as Authorization: Bearer TOKEN.",
        ),
    ] = None,
    max_queue: Annotated[
        int,
        typer.Option(metavar="N", min=1, rich_help_panel=Panel.SERVER, help="Requests that may wait."),
    ] = 64,
    shutdown_grace: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            rich_help_panel=Panel.SERVER,
            help="How long requests may still be answered after SIGTERM.",
        ),
    ] = 30.0,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default="one for each core",
            rich_help_panel=Panel.SERVER,
            help="Threads that compute.",
        ),
    ] = None,
    dtype: options.Dtype = DtypeChoice.AUTO,
    cpu_memory: options.CpuMemory = None,
    gpu_memory: options.GpuMemory = None,
    offload_folder: options.OffloadFolder = None,
    offload_limit: options.OffloadLimit = None,
    device_map: options.DeviceMap = "auto",
    tokenizer: options.Tokenizer = None,
    hub: options.Hub = HubWay.AUTO,
    network_bandwidth: options.NetworkBandwidth = None,
    batch_size: Annotated[
        str,
        typer.Option(
            envvar="SWITCHRUN_BATCH_SIZE",
            metavar="auto|N",
            rich_help_panel=Panel.MEMORY,
            help="Inputs answered together; an expert they share is read once. auto: as many as fit.",
        ),
    ] = "auto",
    max_new_tokens: Annotated[
        int,
        typer.Option(
            envvar="SWITCHRUN_MAX_NEW_TOKENS",
            metavar="N",
            min=1,
            rich_help_panel=Panel.MEMORY,
            help="Most tokens that a request may ask for.",
        ),
    ] = 128,
    num_beams: Annotated[
        int,
        typer.Option(
            envvar="SWITCHRUN_NUM_BEAMS",
            metavar="N",
            min=1,
            rich_help_panel=Panel.MEMORY,
            help="Most beams that a request may ask for: two for each alternative.",
        ),
    ] = 8,
    quiet: options.Quiet = False,
) -> None:
    """Keep a model open, and answer requests over HTTP.

    A page at / is there to try it; /openapi.json describes the requests.

    Examples:
      switchrun serve
      switchrun serve --model google/switch-base-8 --port 9000 --cpu-memory 4GiB
      switchrun serve --host 0.0.0.0 --token-file token.txt
    """
    from switchrun.planning.options import OpenOptions

    token = None if token_file is None else options.read_token(token_file)
    if token is None and socket is None and not _is_loopback(host):
        raise UsageError(f"--host {printable(host, 100)}: others could reach it", "protect it with --token-file FILE")
    opening = OpenOptions(
        model=model,
        dtype=dtype.value,
        cpu_memory=cpu_memory,
        gpu_memory=gpu_memory,
        offload_folder=offload_folder,
        offload_limit=offload_limit,
        device_map=device_map,
        tokenizer=tokenizer,
        hub=hub.value,
        network_bandwidth=network_bandwidth,
        batch_size=options.batch_size(batch_size),
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
    )
    try:
        from switchrun.serve import server
        from switchrun.serve.app import Guard, make_app
        from switchrun.serve.scheduler import Scheduler
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "h11"):
            raise
        raise UsageError(f"serve needs {error.name} (pip install 'switchrun[serve]')") from error
    note = (lambda _text: None) if quiet else report
    quieten_libraries()
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # torch reads it when it is imported
    outcome: list[BaseException] = []
    listener = server.Listener(host, port, socket)

    def open_model(progress: Any) -> Any:
        return open_session(opening, progress, lambda warning: note(f"warning: {warning}"), lambda _plan: None)

    def on_open(error: BaseException | None) -> None:
        if error is not None:
            outcome.append(error)
            return
        assert scheduler.session is not None
        for sentence in (*scheduler.session.checkpoint.repairs, *scheduler.session.plan.notes):
            note(f"note: {sentence}")
        note(f"{scheduler.session.checkpoint.id} is ready at {listener.url}")

    scheduler = Scheduler(open_model, max_queue, on_open, _log_bug)
    hosts = None if token is not None or socket is not None else frozenset({host, "localhost", "127.0.0.1", "::1"})
    app = make_app(scheduler, Guard(token, hosts), _log_bug)
    with listener:
        listener.socket.listen()
        note(f"opening {opening.model or 'the demo model'}; listening on {listener.url}")
        scheduler.start()
        made = server.make_server(app, shutdown_grace)
        code = server.run_server(made, scheduler, listener, lambda: outcome[0] if outcome else None)
    raise typer.Exit(code)


def _is_loopback(host: str) -> bool:
    import ipaddress  # no other command needs it

    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _log_bug(error: Exception) -> str:
    """Write where a bug was to stderr, and return the id that the client is told."""
    import secrets

    number = secrets.token_hex(4)
    where = "".join(
        f"{printable(line)}\n" for lines in traceback.format_exception(error) for line in lines.splitlines()
    )
    report_lines(f"switchrun: internal error {number}\n{where}")
    return number
