"""Option types that several commands share, each with its environment variable."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchrun.checkpoint.types import HubWay
from switchrun.cli.config_file import DEMO, read_config, resolve_alias
from switchrun.cli.help import Panel
from switchrun.dtypes import DtypeChoice, resolve_dtype
from switchrun.errors import UsageError
from switchrun.model.records import GenerationOptions
from switchrun.model.sentinels import replace_blanks

if TYPE_CHECKING:
    from switchrun.client import Client
    from switchrun.planning.plan import BatchSize as AnyBatchSize

#: A token is short, and its file holds nothing else.
_MOST_TOKEN_BYTES = 4096


def named(option: str) -> Callable[[str], str]:
    """Return a parser that refuses an empty name: an unset variable of a script must not mean the current folder."""

    def parse(name: str) -> str:
        if not name:
            raise UsageError(f"--{option}: the name is empty", "name one, or leave the option out")
        return name

    return parse


def model_name(option: str) -> Callable[[str], str]:
    """Return a parser of a model's name, which puts what it stands for in the place of an alias."""
    parse = named(option)
    return lambda name: resolve_alias(parse(name))


def _model(name: str) -> str | None:
    found = model_name("model")(name)
    return None if found == DEMO else found


def complete_model(incomplete: str) -> list[str]:
    """Return names that begin so, for the shell: aliases, and models of the Hub's cache. There is never an error."""
    from switchrun.checkpoint.hub_cache import cached_models

    names = [DEMO]
    with suppress(Exception):
        names += read_config().aliases
    with suppress(Exception):
        names += [model.id for model in cached_models()]
    return [name for name in names if name.startswith(incomplete)]


def or_demo_folder(parse: Callable[[str], str]) -> Callable[[str], str]:
    """Return a parser that takes `demo` for the demo model's folder."""

    def parsed(name: str) -> str:
        from switchrun.checkpoint.locate import demo_folder

        found = parse(name)
        return str(demo_folder()) if found == DEMO else found

    return parsed


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        parser=_model,
        autocompletion=complete_model,
        envvar="SWITCHRUN_MODEL",
        metavar="PATH|ID[@REVISION]",
        show_default="the demo model",
        help="A folder with a checkpoint, an id on the Hugging Face Hub, or an alias. demo: the demo model.",
    ),
]
Dtype = Annotated[
    DtypeChoice,
    typer.Option(
        envvar="SWITCHRUN_DTYPE",
        help="What to compute in. auto: as stored. int8, nf4: experts in 8 or 4 bit, the rest as stored.",
    ),
]
CpuMemory = Annotated[
    str | None,
    typer.Option(
        envvar="SWITCHRUN_CPU_MEMORY",
        metavar="SIZE",
        show_default="80 % of what is free",
        help="Memory that the whole process may use, like 6GiB.",
    ),
]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        envvar="SWITCHRUN_GPU_MEMORY",
        metavar="SIZE",
        show_default="what is free, less a reserve",
        rich_help_panel=Panel.MEMORY,
        help="Memory to use on the first GPU, like 6GiB; on several, like 0=6GiB,1=20GiB; 0 uses none.",
    ),
]
OffloadFolder = Annotated[
    str | None,
    typer.Option(
        parser=named("offload-folder"),
        envvar="SWITCHRUN_OFFLOAD_FOLDER",
        metavar="DIR",
        show_default="./offload, or the user's cache",
        rich_help_panel=Panel.MEMORY,
        help="Where switchrun keeps what it writes itself.",
    ),
]
OffloadLimit = Annotated[
    str | None,
    typer.Option(
        envvar="SWITCHRUN_OFFLOAD_LIMIT",
        metavar="SIZE",
        show_default="no limit",
        rich_help_panel=Panel.MEMORY,
        help="What the experts of a dtype that are kept there may take, like 200GB; those used last stay.",
    ),
]
DeviceMap = Annotated[
    str,
    typer.Option(
        envvar="SWITCHRUN_DEVICE_MAP",
        metavar="auto|FILE",
        rich_help_panel=Panel.MEMORY,
        help="Which weights go where: a JSON file from `switchrun plan --format json`, or one in accelerate's format.",
    ),
]
Hub = Annotated[
    HubWay,
    typer.Option(
        envvar="SWITCHRUN_HUB",
        rich_help_panel=Panel.MODEL,
        help="How to open a model of the Hub. ranges: read what is needed. download: download all of it first. "
        "auto: download what is under 1 GB, else ranges.",
    ),
]
NetworkBandwidth = Annotated[
    str | None,
    typer.Option(
        envvar="SWITCHRUN_NETWORK_BANDWIDTH",
        metavar="RATE",
        show_default="as measured, else 12.5MB/s",
        rich_help_panel=Panel.MODEL,
        help="How fast the Hub is, for the estimate, like 12MB/s.",
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        parser=or_demo_folder(named("tokenizer")),
        envvar="SWITCHRUN_TOKENIZER",
        metavar="PATH|ID",
        show_default="the model's own",
        rich_help_panel=Panel.MODEL,
        help="Where the tokenizer is, for a checkpoint that carries none. demo: the demo model's.",
    ),
]
BatchSize = Annotated[
    str | None,
    typer.Option(
        envvar="SWITCHRUN_BATCH_SIZE",
        metavar="auto|N",
        show_default="auto; 1 for one TEXT or at a terminal",
        rich_help_panel=Panel.MEMORY,
        help="Inputs answered together; an expert they share is read once. auto: what has come, as many as fit.",
    ),
]
Server = Annotated[
    str | None,
    typer.Option(
        envvar="SWITCHRUN_SERVER",
        metavar="URL|unix:PATH",
        rich_help_panel=Panel.SERVER,
        help="Ask a server, which keeps its model open, like http://127.0.0.1:8080: see `switchrun serve`.",
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        envvar="SWITCHRUN_TOKEN_FILE",
        metavar="FILE",
        show_default="SWITCHRUN_TOKEN",
        rich_help_panel=Panel.SERVER,
        help="A file with the token that the server asks for.",
    ),
]
_DEFAULTS = GenerationOptions()
_SAMPLING = "Only with --sample."


def max_new_tokens(shown: bool | str = True) -> Any:
    """Return `--max-new-tokens`, for which help shows this default."""
    return typer.Option(
        envvar="SWITCHRUN_MAX_NEW_TOKENS",
        metavar="N",
        min=1,
        show_default=shown,
        help="Most tokens to generate for an input.",
    )


def num_beams(shown: bool | str = True) -> Any:
    """Return `--num-beams`; see `max_new_tokens`."""
    return typer.Option(
        envvar="SWITCHRUN_NUM_BEAMS",
        metavar="N",
        min=1,
        show_default=shown,
        rich_help_panel=Panel.GENERATION,
        help="Beams of the search; 1 is greedy.",
    )


def sample_or_not(shown: str) -> Any:
    """Return `--sample/--no-sample`; see `max_new_tokens`."""
    return typer.Option(
        "--sample/--no-sample",
        show_default=shown,
        rich_help_panel=Panel.GENERATION,
        help="Draw tokens, or take the likeliest.",
    )


def temperature(shown: str) -> Any:
    """Return `--temperature`; see `max_new_tokens`."""
    return typer.Option(
        metavar="NUMBER",
        show_default=shown,
        rich_help_panel=Panel.GENERATION,
        help=f"Divides the logits before drawing. {_SAMPLING}",
    )


def top_p(shown: str) -> Any:
    """Return `--top-p`; see `max_new_tokens`."""
    return typer.Option(
        metavar="NUMBER",
        show_default=shown,
        rich_help_panel=Panel.GENERATION,
        help=f"Draw from the likeliest tokens that together have this probability. {_SAMPLING}",
    )


def top_k(shown: str) -> Any:
    """Return `--top-k`; see `max_new_tokens`."""
    return typer.Option(
        metavar="N",
        min=0,
        show_default=shown,
        rich_help_panel=Panel.GENERATION,
        help=f"Draw from this many likeliest tokens; 0 is all. {_SAMPLING}",
    )


MaxNewTokens = Annotated[int, max_new_tokens()]
NumBeams = Annotated[int, num_beams()]
Sample = Annotated[
    bool,
    typer.Option("--sample", rich_help_panel=Panel.GENERATION, help="Draw tokens instead of taking the likeliest."),
]
Temperature = Annotated[float | None, temperature(str(_DEFAULTS.temperature))]
TopP = Annotated[float | None, top_p(str(_DEFAULTS.top_p))]
TopK = Annotated[int | None, top_k(str(_DEFAULTS.top_k))]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        max=2**63 - 1,
        show_default=str(_DEFAULTS.seed),
        rich_help_panel=Panel.GENERATION,
        help=f"The same seed draws the same. {_SAMPLING}",
    ),
]
Blank = Annotated[
    str | None,
    typer.Option(
        metavar="MARK",
        show_default=False,
        rich_help_panel=Panel.INPUT,
        help="Take this mark, like ___, for the next sentinel.",
    ),
]
Explain = Annotated[
    bool,
    typer.Option(
        "--explain",
        rich_help_panel=Panel.OUTPUT,
        help="Say which expert each token went to, in each layer: in records, or as a table on stderr.",
    ),
]
Stats = Annotated[
    bool,
    typer.Option("--stats", rich_help_panel=Panel.OUTPUT, help="Show memory and speed on stderr at the end."),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", rich_help_panel=Panel.OUTPUT, help="No notes and no progress on stderr.")
]


def batch_size(given: str) -> AnyBatchSize:
    """Return a batch size: `auto` or a number."""
    if given == "auto":
        return "auto"
    with suppress(ValueError):  # no number, or one of thousands of digits
        if int(given) > 0:
            return int(given)
    raise UsageError(f"--batch-size: '{given}' is neither auto nor a whole number above 0")


def batch_size_for(given: str | None, texts: Sequence[str] | None) -> AnyBatchSize:
    """Return the batch size for TEXT arguments, or if there is none for the lines of stdin.

    Without more texts to come nothing is reserved for them, and a person who types wants an answer to each line.
    """
    lines = not texts or texts == ["-"]
    typed = lines and sys.stdin is not None and sys.stdin.isatty()
    single = texts is not None and len(texts) == 1 and not lines
    if given in (None, "auto"):
        return 1 if single or (typed and given is None) else "auto"
    return batch_size(str(given))


#: What is decided where the model is open.
_OF_THE_SERVER = frozenset({
    "model", "dtype", "cpu_memory", "gpu_memory", "offload_folder", "offload_limit", "device_map", "tokenizer", "hub",
    "network_bandwidth", "batch_size", "stats",
})  # fmt: skip


def client(context: typer.Context, server: str | None, token_file: Path | None) -> Client | None:
    """Return who asks the server, if there is to be one.

    Raises:
        UsageError: Its URL or the token is none, or there are options beside it that are the server's own.
    """
    typed = [
        name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if server is None:
        if "token_file" in typed:
            raise UsageError("--token-file does nothing without --server", "add --server")
        return None
    for name in typed:
        if name in _OF_THE_SERVER:
            flag = name.replace("_", "-")
            raise UsageError(
                f"--{flag} does nothing with a server, which has its own", f"leave out --{flag} or --server"
            )
    from switchrun.client import Client

    token = os.environ.get("SWITCHRUN_TOKEN") if token_file is None else read_token(token_file)
    return Client(server, token or None, timeout=None)


def drawing(sample: bool | None, **values: float | None) -> dict[str, Any]:
    """Return the options of drawing that are given; without `--sample` there may be none."""
    given = {name: value for name, value in values.items() if value is not None}
    if given and not sample:
        raise UsageError(f"--{next(iter(given)).replace('_', '-')} does nothing without --sample", "add --sample")
    return {"sample": sample, **given}


def sentinels_for(blank: str | None) -> Callable[[str], str]:
    """Return what puts sentinels in the place of blanks, if there is a mark for them.

    Raises:
        UsageError: The mark cannot stand for a blank.
    """
    if blank is None:
        return lambda text: text
    replace_blanks("", blank)
    return lambda text: replace_blanks(text, blank)


def is_typed(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line; else its value is a default, a variable's or the config file's."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


class TableFormat(StrEnum):
    """What `--format` takes where there is nothing to choose but who reads it."""

    TABLE = "table"
    JSON = "json"


Format = Annotated[TableFormat, typer.Option("--format", help="table: to read; json: to process.")]


def words(option: str, text: str) -> list[str]:
    """Split a list of values; none may be empty or there twice."""
    found = [word.strip() for word in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise UsageError(f"{option}: '{text}' is not a list", "write different values with commas between them")
    return found


def dtype_list(text: str, option: str = "--dtype") -> list[str]:
    """Split a list of dtypes; none may be there twice."""
    found = words(option, text)
    for word in found:
        resolve_dtype(word, "BF16")
    return found


def read_token(path: Path) -> str:
    """Return the token in a file.

    Raises:
        UsageError: There is none.
    """
    try:
        with path.open("rb") as file:
            token = file.read(_MOST_TOKEN_BYTES + 1).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        words = error.strerror if isinstance(error, OSError) else "it is not ASCII"
        raise UsageError(f"--token-file {path}: {words}") from error
    if not token or len(token) > _MOST_TOKEN_BYTES or not token.isprintable() or " " in token:
        raise UsageError(f"--token-file {path}: it holds no token", "write one with: openssl rand -hex 32 > FILE")
    return token
