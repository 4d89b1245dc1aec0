"""Option types that several commands share, each with its environment variable."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from switchrun.dtypes import DtypeChoice
from switchrun.errors import UsageError
from switchrun.hints import command

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        envvar="SWITCHRUN_MODEL",
        metavar="PATH|ID[@REVISION]",
        show_default="the demo model",
        help="A folder with a checkpoint, or an id on the Hugging Face Hub.",
    ),
]
Dtype = Annotated[
    DtypeChoice,
    typer.Option(
        "--dtype",
        envvar="SWITCHRUN_DTYPE",
        help="What to compute in; auto is as stored. int8 and nf4: experts in 8 or 4 bit, the rest as auto.",
    ),
]
CpuMemory = Annotated[
    str | None,
    typer.Option(
        "--cpu-memory",
        envvar="SWITCHRUN_CPU_MEMORY",
        metavar="SIZE",
        show_default="80 % of what is free",
        help="Memory that the whole process may use, like 6GiB.",
    ),
]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        "--gpu-memory",
        envvar="SWITCHRUN_GPU_MEMORY",
        metavar="SIZE",
        show_default="what is free on all GPUs, less a reserve",
        help="Memory to use on the first GPU, like 6GiB; for several, 0=6GiB,1=20GiB; 0: no GPU.",
    ),
]


def _folder(name: str) -> Path:
    if not name:
        # Path("") is the current folder: an unset variable of a script must not fill that with experts.
        raise UsageError("--offload-folder: the name is empty", "name a folder, or leave the option out")
    return Path(name)


OffloadFolder = Annotated[
    Path | None,
    typer.Option(
        "--offload-folder",
        parser=_folder,
        envvar="SWITCHRUN_OFFLOAD_FOLDER",
        metavar="DIR",
        show_default="./offload if it exists, else in the user's cache",
        help="Where switchrun keeps what it writes itself.",
    ),
]
OffloadLimit = Annotated[
    str | None,
    typer.Option(
        "--offload-limit",
        envvar="SWITCHRUN_OFFLOAD_LIMIT",
        metavar="SIZE",
        show_default="no limit",
        help="What the experts that --dtype int8 and nf4 keep there may take, like 200GB; those used last stay.",
    ),
]

DeviceMap = Annotated[
    str,
    typer.Option(
        "--device-map",
        envvar="SWITCHRUN_DEVICE_MAP",
        metavar="auto|FILE",
        help="Which weights go where: a JSON file from `switchrun plan --format json`, or one in accelerate's format.",
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        envvar="SWITCHRUN_TOKENIZER",
        metavar="PATH|ID",
        show_default="the model's own",
        help="Where the tokenizer is, for a checkpoint that carries none.",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size",
        envvar="SWITCHRUN_BATCH_SIZE",
        min=1,
        help="Inputs filled together; an expert they share is read once.",
    ),
]
NumBeams = Annotated[
    int,
    typer.Option(
        "--num-beams",
        envvar="SWITCHRUN_NUM_BEAMS",
        min=1,
        help="Beams of the search; 1 is greedy.",
    ),
]


def device_map_path(value: str, **given: Any) -> Path | None:
    """Give the file that `--device-map` names; None for `auto`.

    Args:
        value: As `--device-map` has it.
        given: The user's `model`, `dtype` and `offload_folder`, for the hint.

    Raises:
        UsageError: There is no such file.
    """
    if value == "auto":
        return None
    path = Path(value)
    if not path.is_file():
        plan = f"{command('plan', '--format', 'json', **given)} > {shlex.quote(value)}"
        raise UsageError(f"--device-map: there is no file '{value}'", f"write one with: {plan}")
    return path


def check_memory(cpu_memory: str | None, gpu_memory: str | None) -> None:
    """Refuse what is not a size before anything slow is done.

    Raises:
        UsageError: One of them is not a size.
    """
    from switchrun.planning.budgets import resolve_budgets

    gpus = 0 if gpu_memory is None else gpu_memory
    for option, sizes in (("--cpu-memory", (cpu_memory, 0)), ("--gpu-memory", (0, gpus))):
        try:
            resolve_budgets(*sizes)
        except UsageError as error:
            raise UsageError(f"{option}: {error.message}", error.hint) from None


def check_offload_limit(limit: str | None) -> None:
    """Refuse what is not a size before anything slow is done.

    Raises:
        UsageError: It is not one.
    """
    from switchrun._plan import offload_limit_bytes

    option = "--offload-limit"
    try:
        offload_limit_bytes(limit)
    except UsageError as error:
        raise UsageError(f"{option}: {error.message}", error.hint) from None


def memory_bytes(cpu_memory: str | None) -> int | None:
    """Give the bytes of a checked `--cpu-memory`; None if it is not given."""
    from switchrun.units import parse_bytes

    return None if cpu_memory is None else parse_bytes(cpu_memory)


def words(option: str, text: str) -> list[str]:
    """Take a list of values apart.

    Raises:
        UsageError: One is empty, or there twice.
    """
    found = [word.strip() for word in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise UsageError(f"{option}: '{text}' is not a list", "write different values with commas between them")
    return found


def dtype_list(text: str, option: str = "--dtype") -> list[str]:
    """Take a list of dtypes apart.

    Raises:
        UsageError: One is not a dtype, or there twice.
    """
    from switchrun.dtypes import resolve_dtype

    found = words(option, text)
    for word in found:
        resolve_dtype(word, "BF16")
    return found
