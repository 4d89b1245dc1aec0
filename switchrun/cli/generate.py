"""`switchrun generate`: answers texts, given as arguments or as lines on stdin, with a model fine-tuned to do so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchrun.checkpoint.types import HubWay
from switchrun.cli import options
from switchrun.cli.answering import Work, answer_texts
from switchrun.cli.help import Panel
from switchrun.cli.streams import read_arguments
from switchrun.dtypes import DtypeChoice
from switchrun.errors import UsageError
from switchrun.model.records import GenerateResult, GenerationOptions
from switchrun.model.sentinels import has_sentinel
from switchrun.output.sinks import FillFormat

if TYPE_CHECKING:
    from switchrun.model.tokenizer import EncodedText

_OWN = "the model's"


def generate(
    context: typer.Context,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT",
            show_default=False,
            help="A text, quoted for the shell. No TEXT, or -, reads one input a line from stdin.",
        ),
    ] = None,
    model: options.Model = None,
    prefix: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            show_default=False,
            rich_help_panel=Panel.INPUT,
            help="Put this before each text, as the model was trained: 'summarize: '.",
        ),
    ] = "",
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
    max_new_tokens: Annotated[int | None, options.max_new_tokens(f"{_OWN}, else 64")] = None,
    num_beams: Annotated[int | None, options.num_beams(f"{_OWN}, else 1")] = None,
    sample: Annotated[bool | None, options.sample_or_not(_OWN)] = None,
    temperature: Annotated[float | None, options.temperature(f"{_OWN}, else 1.0")] = None,
    top_p: Annotated[float | None, options.top_p(f"{_OWN}, else 1.0")] = None,
    top_k: Annotated[int | None, options.top_k(f"{_OWN}, else 50")] = None,
    seed: options.Seed = None,
    explain: options.Explain = False,
    style: Annotated[
        FillFormat,
        typer.Option(
            "--format",
            envvar="SWITCHRUN_FORMAT",
            help="text: the answer; raw: the same with special tokens; json, jsonl: a record of each input.",
        ),
    ] = FillFormat.TEXT,
    server: options.Server = None,
    token_file: options.TokenFile = None,
    stats: options.Stats = False,
    quiet: options.Quiet = False,
) -> None:
    """Answer texts with a fine-tuned model: summaries, translations.

    The texts need no sentinels. Lengths, beams and sampling are as the model's own settings say, unless you set them.

    Examples:
        switchrun generate -m my-summarizer --prefix "summarize: " < dialogues.txt
        switchrun generate -m my-summarizer --max-new-tokens 20 "A long text."
        switchrun generate -m my-summarizer --format jsonl < in.txt > out.jsonl
    """
    from switchrun.planning.options import OpenOptions

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
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
    )
    drawing = options.drawing(sample, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    asked = drawing | {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "explain": explain or None}
    given = {name: value for name, value in asked.items() if value is not None}
    answer_texts(generate_work(given, prefix), texts, opening, style=style, stats=stats, quiet=quiet)


def generate_work(given: Mapping[str, Any], prefix: str) -> Work[str, EncodedText, GenerateResult]:
    """Return how texts are answered; `given` are fields of `GenerationOptions`, the rest is as the model says.

    Raises:
        UsageError: What is given makes no sense.
    """
    GenerationOptions(**given)
    unreadable = next(read_arguments([prefix])).error
    if unreadable is not None:
        raise UsageError(f"prefix: {unreadable.message}", unreadable.hint, "prefix")
    return Work(
        check=lambda text: text,
        encode=lambda session, text: session.encode_text(text, prefix),
        answer=lambda session, encoded, ids, on_results: session.generate(
            encoded, session.own_options(**given), ids=ids, on_results=on_results
        ),
        ask=lambda client, texts, ids: client.answer_each("generate", texts, ids, {**given, "prefix": prefix}),
        remark=_remark,
    )


def _remark(results: Sequence[GenerateResult]) -> str | None:
    """Say that a model looks merely pre-trained: it answers in sentinels, as none does that was fine-tuned."""
    in_sentinels = sum(has_sentinel(result.raw) for result in results)
    if 2 * in_sentinels <= len(results):
        return None
    return (
        f"{results[0].model.id} answers in sentinels, so it looks pre-trained only, to fill in blanks: "
        "use switchrun fill, or a fine-tuned model"
    )
