"""`switchrun fill`: fills the sentinels of texts, given as arguments or as lines on stdin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from switchrun.checkpoint.types import HubWay
from switchrun.cli import options
from switchrun.cli.answering import Work, answer_texts
from switchrun.cli.help import Panel
from switchrun.dtypes import DtypeChoice
from switchrun.model.records import GenerationOptions
from switchrun.model.sentinels import check_sentinels
from switchrun.output.sinks import FillFormat

if TYPE_CHECKING:
    from switchrun.model.records import FillResult
    from switchrun.model.tokenizer import Encoded

_DEFAULTS = GenerationOptions()


def fill(
    context: typer.Context,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT",
            show_default=False,
            help="A text with sentinels, quoted for the shell: 'A <extra_id_0> walks into a bar.' "
            "No TEXT, or -, reads one input a line from stdin.",
        ),
    ] = None,
    model: options.Model = None,
    dtype: options.Dtype = DtypeChoice.AUTO,
    cpu_memory: options.CpuMemory = None,
    gpu_memory: options.GpuMemory = None,
    offload_folder: options.OffloadFolder = None,
    offload_limit: options.OffloadLimit = None,
    device_map: options.DeviceMap = "auto",
    tokenizer: options.Tokenizer = None,
    hub: options.Hub = HubWay.AUTO,
    network_bandwidth: options.NetworkBandwidth = None,
    batch_size: options.BatchSize = None,
    max_new_tokens: options.MaxNewTokens = _DEFAULTS.max_new_tokens,
    num_beams: options.NumBeams = _DEFAULTS.num_beams,
    sample: options.Sample = False,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    alternatives: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default=False,
            rich_help_panel=Panel.GENERATION,
            help="The N best answers, best first, each with its log-probability: different ones of a beam search, or "
            "with --sample N draws. In text, N lines an input.",
        ),
    ] = None,
    explain: options.Explain = False,
    style: Annotated[
        FillFormat,
        typer.Option(
            "--format",
            envvar="SWITCHRUN_FORMAT",
            help="text: the sentence filled in; raw: the model's own output; json, jsonl: a record of each input.",
        ),
    ] = FillFormat.TEXT,
    blank: options.Blank = None,
    server: options.Server = None,
    token_file: options.TokenFile = None,
    stats: options.Stats = False,
    quiet: options.Quiet = False,
) -> None:
    """Fill in the missing words of texts, which are written <extra_id_0>.

    These marks are called sentinels: the next one of a text is <extra_id_1>, and so on.

    Examples:
        switchrun fill "A <extra_id_0> walks into a bar."
        switchrun fill --blank ___ -m google/switch-base-8 "The ___ of France is ___."
        switchrun fill --format jsonl --cpu-memory 4GiB < texts.txt > answers.jsonl
    """
    from switchrun.planning.options import OpenOptions

    drawing = options.drawing(sample, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    generation = GenerationOptions(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        alternatives=alternatives or 0,
        explain=explain,
        **drawing,
    )
    opening = options.client(context, server, token_file) or OpenOptions(
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
        batch_size=options.batch_size_for(batch_size, texts),
        num_beams=generation.sequences,
        max_new_tokens=max_new_tokens,
    )

    work = fill_work(generation, blank)
    answer_texts(work, texts, opening, style=style, stats=stats, quiet=quiet, lines=alternatives or 1)


def fill_work(generation: GenerationOptions, blank: str | None) -> Work[str, Encoded, FillResult]:
    """Return how texts are filled; UsageError for a mark that cannot stand for a blank."""
    with_sentinels = options.sentinels_for(blank)

    def check(text: str) -> str:
        text = with_sentinels(text)
        check_sentinels(text)
        return text

    return Work(
        check=check,
        encode=lambda session, text: session.encode(text),
        answer=lambda session, encoded, ids, on_results: session.fill(
            encoded, generation, ids=ids, on_results=on_results
        ),
        ask=lambda client, texts, ids: client.answer_each("fill", texts, ids, generation),
        typed=f"a text with {blank or '<extra_id_0>'} where words are missing",
    )
