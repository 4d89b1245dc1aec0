"""`switchrun models`: which models are on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchrun.cli import options
from switchrun.cli.config_file import DEMO, read_config
from switchrun.cli.startup import quieten_libraries
from switchrun.cli.streams import write_answer
from switchrun.dtypes import STORED_NAMES
from switchrun.errors import SwitchrunError
from switchrun.machine import folders
from switchrun.output.sinks import format_record

if TYPE_CHECKING:
    from switchrun.checkpoint.hub_cache import CachedModel
    from switchrun.store import StoreInfo

SCHEMA_VERSION = 1


def models(
    offload_folder: options.OffloadFolder = None,
    style: options.Format = options.TableFormat.TABLE,
) -> None:
    """List the models on this machine: aliases, downloads, kept weights.

    Models of the Hub's local cache are listed if they are Switch models, and what the offload folder keeps of any.

    Examples:
        switchrun models
        switchrun models --format json
        switchrun models --offload-folder /big/disk/offload
    """
    from switchrun.checkpoint.hub import cache_folder
    from switchrun.checkpoint.hub_cache import cached_models
    from switchrun.checkpoint.locate import demo_folder
    from switchrun.store import list_stores

    quieten_libraries()
    place = folders.offload_folder(offload_folder)
    cache = cache_folder()
    record = {
        "schema_version": SCHEMA_VERSION,
        "demo": {"model": DEMO, "folder": str(demo_folder()), **_opened(None, place), "total_bytes": _demo_bytes()},
        "aliases": [{"alias": name, "model": model} for name, model in read_config().aliases.items()],
        "hub_cache": {
            "folder": None if cache is None else str(cache),
            "models": [_cached(model, place) for model in cached_models()],
        },
        "offload": {"folder": str(place), "models": list(_kept(list_stores(place)))},
    }
    if style is options.TableFormat.JSON:
        write_answer(format_record(record, indent=True))
    else:
        from switchrun.output.tables import render_models

        write_answer(render_models(record))


def _demo_bytes() -> int:
    from switchrun.checkpoint.locate import demo_folder

    return sum(path.stat().st_size for path in demo_folder().glob("*") if path.is_file())


def _cached(model: CachedModel, place: Path) -> dict[str, Any]:
    from switchrun.checkpoint.hub_cache import bytes_of

    return {
        "model": model.id,
        "revision": model.commit,
        "folder": str(model.folder),
        **_opened(model.name, place),
        "total_bytes": bytes_of(model),
    }


def _opened(name: str | None, place: Path) -> dict[str, Any]:
    """Return what the headers say, of what is on this machine."""
    from switchrun.checkpoint import open_checkpoint

    try:
        checkpoint = open_checkpoint(name, cache_dir=place / "index", download=False)
    except SwitchrunError as error:
        return {"dtype": None, "problem": error.message}
    return {"dtype": STORED_NAMES[checkpoint.stored_dtype], "problem": None}


def _kept(stores: Sequence[StoreInfo]) -> Iterator[dict[str, Any]]:
    """Yield each model of which weights are kept; one whose manifest cannot be read goes by its folder's name."""
    by_folder: dict[Path, list[StoreInfo]] = {}
    for info in stores:
        by_folder.setdefault(info.folder.parent, []).append(info)
    for folder, infos in by_folder.items():
        yield {
            "model": next((info.manifest.model for info in infos if info.manifest), folder.name),
            "folder": str(folder),
            "dtypes": [info.folder.name for info in infos],
            "num_experts": sum(info.experts for info in infos),
            "total_bytes": sum(info.nbytes for info in infos),
            "problem": next((info.problem for info in infos if info.problem), None),
        }
