"""`switchrun offload`: shows, checks and empties what switchrun keeps in the offload folder."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from switchrun.cli import options
from switchrun.cli.commands import Command, Group
from switchrun.cli.streams import confirmed, report, report_lines, write_answer
from switchrun.errors import CorruptCheckpointError, StorageError, SwitchrunError, UsageError, command, printable
from switchrun.machine import folders
from switchrun.output.progress import ByteProgress
from switchrun.output.sinks import format_record, stores_record
from switchrun.units import format_bytes, format_count

if TYPE_CHECKING:
    from switchrun.store import StoreInfo, VerifyReport

app = typer.Typer(cls=Group, rich_markup_mode=None)

# No environment variables here: one that is meant for `fill` must not decide what is deleted.
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        parser=options.model_name("model"),
        autocompletion=options.complete_model,
        metavar="PATH|ID[@REVISION]",
        show_default="every model",
        help="Only this model's experts. demo is the demo model's, a folder of that name ./demo.",
    ),
]
#: What kept weights are called; a number follows where a model stores experts of one dtype in several forms.
_KINDS = ("int8", "nf4", "fp32", "fp16", "bf16", "qmoe", "dense")
_KIND = re.compile(rf"({'|'.join(_KINDS)})(n[0-9]+)?", re.ASCII)


def _kind(name: str) -> str:
    if not _KIND.fullmatch(name):
        kinds = ", ".join(map(repr, _KINDS))
        raise UsageError(f"--dtype: {printable(repr(name), 100)} is not one of {kinds}")
    return name


Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        parser=_kind,
        metavar="KIND",
        show_default="all",
        help=f"Only this: {', '.join(_KINDS[:-1])}, or dense, the dense weights of models of the Hub.",
    ),
]


@app.callback(invoke_without_command=True)
def offload(context: typer.Context) -> None:
    """Show, check and empty the experts kept in the offload folder.

    Examples:
        switchrun offload ls
        switchrun offload verify --delete
        switchrun offload clear --model google/switch-base-8
    """
    if context.invoked_subcommand is None:
        write_answer(f"{context.get_help()}\n")


@app.command("ls", cls=Command)
def list_them(
    offload_folder: options.OffloadFolder = None,
    style: options.Format = options.TableFormat.TABLE,
) -> None:
    """List the stored experts of every model and dtype.

    Examples:
        switchrun offload ls
        switchrun offload ls --offload-folder /big/disk/offload --format json
    """
    from switchrun.store import list_stores

    place = folders.offload_folder(offload_folder)
    stores = list_stores(place)
    if style is options.TableFormat.JSON:
        write_answer(format_record(stores_record(place, stores), indent=True))
    else:
        from switchrun.output.tables import render_stores

        write_answer(render_stores(place, stores))


@app.command(cls=Command)
def verify(
    model: Model = None,
    dtype: Dtype = None,
    offload_folder: options.OffloadFolder = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete what is damaged; it is made again from the checkpoint.")
    ] = False,
) -> None:
    """Read every stored expert and compare it with its checksum.

    Examples:
        switchrun offload verify
        switchrun offload verify --dtype int8 --delete
    """
    from switchrun.output.tables import render_stores, render_verified
    from switchrun.store import clear_hint, verify_store

    place = folders.offload_folder(offload_folder)
    stores = _chosen(place, model, dtype)
    if not stores:
        write_answer(render_stores(place, stores))
    verified: list[tuple[StoreInfo, VerifyReport]] = []
    unusable = 0
    for info in stores:
        progress = ByteProgress(sys.stderr, "verify")
        try:
            found = verify_store(info.folder, progress, delete=delete)
        except CorruptCheckpointError as error:
            unusable += 1
            progress.clear()
            report(f"{error.message} ({clear_hint(place, info.folder.parent.name, info.folder.name)})")
            continue
        finally:
            progress.clear()
        verified.append((info, found))
        for path, reason in found.damaged:
            report(f"{path}: {reason}{'; deleted' if not path.exists() else ''}")
    if verified:
        write_answer(render_verified(place, verified))
    if unusable:
        raise CorruptCheckpointError(
            f"{unusable} of the stores in {place} cannot be used", "the lines above say how to empty them"
        )
    left = sum(path.exists() for _, found in verified for path, _ in found.damaged)
    if left:
        again = command("offload", "verify", "--delete", model=model, dtype=dtype, offload_folder=offload_folder)
        raise CorruptCheckpointError(
            f"damaged experts are left in {place}: {left}",
            f"delete them with: {again}; they are made again from the checkpoint",
        )


@app.command(cls=Command)
def clear(
    model: Model = None,
    dtype: Dtype = None,
    offload_folder: options.OffloadFolder = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete stored experts.

    Nothing is lost but time: they are made again from the checkpoint.

    Examples:
        switchrun offload clear --dtype nf4
        switchrun offload clear --model google/switch-base-8 --yes
    """
    from switchrun.store import clear_store

    place = folders.offload_folder(offload_folder)
    stores = _chosen(place, model, dtype)
    if not stores:
        write_answer(f"nothing to delete in {printable(place)}\n")
        return
    experts = format_count(sum(info.experts for info in stores), "expert")
    size = format_bytes(sum(info.nbytes for info in stores))
    for info in stores:
        counted = f"{format_count(info.experts, 'expert')}, {format_bytes(info.nbytes)}"
        report_lines(f"{printable(info.folder)}: {counted}\n")
    if not yes and not _confirmed(f"Delete {experts}, {size}? [y/N] "):
        write_answer("nothing was deleted\n")
        return
    for info in stores:
        progress = ByteProgress(sys.stderr, "clear")
        try:
            clear_store(info.folder, progress)
        except OSError as error:
            raise StorageError(f"{info.folder} cannot be emptied: {error.strerror}") from error
        finally:
            progress.clear()
    write_answer(f"deleted {experts}, {size}\n")


def _confirmed(question: str) -> bool:
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("nothing was deleted: stdin is no terminal that could be asked", "add --yes")
    return confirmed(question)


def _chosen(place: Path, model: str | None, dtype: str | None) -> list[StoreInfo]:
    """Return the stores of a model and a dtype. The model itself need not be there any more."""
    from switchrun.store import list_stores

    stores = [info for info in list_stores(place) if dtype is None or info.folder.name == dtype]
    if model is None:
        return stores
    return [info for info in stores if _is_of(info, place, model)] or _chosen_by_revision(stores, place, model)


def _chosen_by_revision(stores: list[StoreInfo], place: Path, model: str) -> list[StoreInfo]:
    """Return the stores of a Hub id with a revision, if what is on this machine says which weights that has."""
    from switchrun.checkpoint import open_checkpoint
    from switchrun.store import model_name

    if "@" in model:
        with contextlib.suppress(SwitchrunError):
            name = model_name(open_checkpoint(model, cache_dir=place / "index", download=False))
            return [info for info in stores if _is_of(info, place, name)]
    return []


def _is_of(info: StoreInfo, place: Path, model: str) -> bool:
    from switchrun.store import store_folder

    path = folders.in_home(model)
    # A folder called demo is ./demo: what is deleted must not depend on where one is.
    names = {model} if model == "demo" else {model, str(path.absolute()), str(path.resolve())}
    stored = info.manifest.model if info.manifest else ""
    # A Hub id without a revision means all that are stored of it.
    if stored in names or ("@" not in model and stored.startswith(f"{model}@")):
        return True
    # Without a good manifest the folder's name counts: it is made of the model's, and `ls` and `verify` show it.
    own_folders = [store_folder(place, name, info.folder.name) for name in names]
    return info.folder in own_folders or info.folder.parent.name == model
