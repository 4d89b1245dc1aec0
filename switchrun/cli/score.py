"""`switchrun score`: how likely given fillings are, given as arguments or as lines on stdin."""

from __future__ import annotations

from typing import Annotated

import typer

from switchrun.checkpoint.files import parse_json
from switchrun.checkpoint.types import HubWay
from switchrun.cli import options
from switchrun.cli.answering import Work, answer_texts
from switchrun.dtypes import DtypeChoice
from switchrun.errors import InputError
from switchrun.model.sentinels import Filling
from switchrun.output.sinks import FillFormat, ScoreFormat

_EXAMPLE = 'for example {"text": "A <extra_id_0> walks in", "spans": ["man"]}'


def score(
    context: typer.Context,
    fillings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILLING",
            show_default=False,
            help="A text and a span for each of its sentinels, with tabs between; or JSON, as in the examples. No "
            "FILLING, or -, reads one a line from stdin.",
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
    style: Annotated[
        ScoreFormat,
        typer.Option(
            "--format",
            help="text: the log-probability, the sentence filled in, and that of each span, with tabs between; json, "
            "jsonl: a record of each filling.",
        ),
    ] = ScoreFormat.TEXT,
    blank: options.Blank = None,
    server: options.Server = None,
    token_file: options.TokenFile = None,
    stats: options.Stats = False,
    quiet: options.Quiet = False,
) -> None:
    r"""Say how likely given fillings are, as log-probabilities.

    They are in nats: 0 is certain, and each -0.69 halves the probability.

    Examples:
        switchrun score '{"text": "A <extra_id_0> walks in.", "spans": ["man"]}'
        switchrun score --format jsonl -m google/switch-base-8 < fillings.jsonl
        printf 'A ___ walks in.\tman\n' | switchrun score --blank ___
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
        batch_size=options.batch_size_for(batch_size, fillings),
    )
    with_sentinels = options.sentinels_for(blank)

    def check(line: str) -> Filling:
        text, spans = _parse(line)
        return Filling(with_sentinels(text), spans)

    work = Work(
        check=check,
        encode=lambda session, filling: session.encode_filling(filling),
        answer=lambda session, encoded, ids, on_results: session.score(encoded, ids=ids, on_results=on_results),
        ask=lambda client, fillings, ids: client.answer_each("score", fillings, ids, {}),
    )
    answer_texts(work, fillings, opening, style=FillFormat(style), stats=stats, quiet=quiet)


def _parse(line: str) -> tuple[str, list[str]]:
    """Return the text and the spans of a line, which is JSON if it begins with a brace; InputError if it is neither."""
    if not line.lstrip().startswith("{"):
        text, *spans = line.split("\t")
        return text, spans
    try:
        record = parse_json(line.encode())
    except ValueError as error:
        raise InputError(f"a line that begins with {{ is JSON, and this one is not valid: {error}", _EXAMPLE) from error
    text, given = record.get("text"), record.get("spans")
    if not isinstance(text, str):
        raise InputError('the line has no "text", or it is no string', _EXAMPLE)
    if not isinstance(given, list) or not all(isinstance(span, str) for span in given):
        raise InputError('the line has no "spans", or they are no list of strings', _EXAMPLE)
    return text, given
