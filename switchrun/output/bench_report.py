"""Benchmark records as a page: one HTML file that needs nothing else, for wide and narrow windows, light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from switchrun.bench.records import Record, failure, label, median
from switchrun.bench.verdict import verdict
from switchrun.errors import printable
from switchrun.output.measurement_tables import Section, cell_sections, shared_facts, summary
from switchrun.units import format_bytes, format_count, format_seconds

#: Of the time from the start of a process to the end of its fill; each has a colour of its own.
_STAGES = (
    ("open_seconds", "opening"),
    ("wait_seconds", "waiting for experts"),
    ("expert_seconds", "computing experts"),
    ("dense_seconds", "all else"),
)
#: Of a layer, so many experts are named.
_MOST_EXPERTS = 5
#: The narrowest mark of an expert, as a part of the strip that is its layer.
_LEAST_MARK = 1 / 250
#: How strong a mark can be: the style has a class for each.
_STRENGTHS = 4

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c1e21; --soft: #5a5f66; --line: #d9dce0; --box: #f3f5f7;
  --s0: #8a939c; --s1: #d1495b; --s2: #1f6fb2; --s3: #3a9c78; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --text: #e6e8ea; --soft: #a4abb3; --line: #3a3f46;
  --box: #1f2327; --s0: #8a939c; --s1: #f0788a; --s2: #62b0ee; --s3: #5cc39d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { margin: .4rem 0; }
.verdict { font-size: 1.15rem; background: var(--box); border-left: .3rem solid var(--s2); padding: .8rem 1rem; }
.failed { border-left: .3rem solid var(--s1); padding-left: .8rem; }
code { white-space: nowrap; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
tbody th { font-weight: 400; color: var(--soft); white-space: nowrap; overflow-wrap: normal; position: sticky; left: 0;
  background: var(--page); }
.number { text-align: right; white-space: nowrap; }
details > summary { cursor: pointer; margin-top: 2.25rem; }
details h2 { display: inline; }
ul { list-style: none; margin: .5rem 0; padding: 0; }
.bars li { margin: 0 0 .8rem; }
.bar { display: flex; height: 1.1rem; margin: .15rem 0; }
.bar i, .key { display: block; height: 100%; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
.legend span { margin-right: 1rem; white-space: nowrap; }
.s0 { background: var(--s0); } .s1 { background: var(--s1); }
.s2 { background: var(--s2); } .s3 { background: var(--s3); }
.plot { border: solid var(--line); border-width: 0 0 1px 1px; height: 9rem; }
.plot svg, .strip svg { display: block; width: 100%; height: 100%; }
.plot path { fill: none; stroke: var(--s2); stroke-width: 2; vector-effect: non-scaling-stroke; }
.plot .opened { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
.axis { display: flex; justify-content: space-between; color: var(--soft); font-size: .85rem; }
.map li { display: grid; grid-template-columns: 6rem 1fr 9.5rem 18rem; gap: 0 .8rem; align-items: center;
  padding: .2rem 0; border-bottom: 1px solid var(--line); font-size: .9rem; font-variant-numeric: tabular-nums; }
.strip { height: 1.2rem; background: var(--box); border: 1px solid var(--line); }
.strip path { fill: var(--s2); }
.m1 { opacity: .5; } .m2 { opacity: .65; } .m3 { opacity: .8; }
@media (max-width: 45rem) { .map li { grid-template-columns: 1fr auto; padding: .5rem 0; }
  .strip, .busy { grid-column: 1 / 3; } .strip { order: 1; } .busy { order: 2; }
  table { font-size: .9rem; } tbody th { white-space: normal; } th, td { padding-right: .6rem; } }
"""


def render_page(records: Sequence[Record]) -> str:
    """Return the page: a verdict, the summary, where the time went, and each cell with its experts."""
    model = records[0]["knobs"]["model"]
    made = " (synthetic weights)" if records[0]["synthetic"] else ""
    title = _text(f"switchrun bench: {Path(model).name if model else 'demo'}{made}")
    shared = shared_facts(records)
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="verdict">{_prose(verdict(records))}</p>',
        *_failures(records),
        _table(summary(records)),
        *_times(records),
    ]
    open_cell = True
    for number, record in enumerate(records, 1):
        if record["status"] == "ok" and len(records) == 1:
            parts += _cell(record, shared, "h2")
        elif record["status"] == "ok":
            head = f"<h2>Cell {number}: {_text(label(record))}</h2>"
            parts.append(f"<details{' open' if open_cell else ''}><summary>{head}</summary>")
            parts += [*_cell(record, shared, "h3"), "</details>"]
            open_cell = False
    parts.append(_table(shared))
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _text(value: str) -> str:
    # A figure and its unit are not parted by the end of a line.
    return re.sub(r"(?<=\d) (?=%|[KMGT]iB|GB/s|MB/s|m?s\b)", "&nbsp;", escape(printable(value, 4000)))


def _prose(value: str) -> str:
    """Return a sentence whose options are not parted after their hyphens."""
    return re.sub(r"--[a-z][a-z-]*", r"<code>\g<0></code>", _text(value))


def _failures(records: Sequence[Record]) -> Iterator[str]:
    for number, record in enumerate(records, 1):
        if record["status"] == "failed" and len(records) > 1:
            cell = f"<strong>Cell {number} failed</strong> ({_text(label(record))})"
            yield f'<p class="failed">{cell}: {_prose(failure(record))}</p>'


def _table(section: Section, head: str = "h2") -> str:
    """Return a table that scrolls inside itself where it is too wide."""
    title = _text(section.title)
    lines = [
        f"<{head}>{title}</{head}>",
        f'<div class="scroll" role="region" aria-label="{title}" tabindex="0"><table>',
    ]
    if any(section.head):
        cells = (f"<th{_kind(section, place)} scope=col>{_text(name)}</th>" for place, name in enumerate(section.head))
        lines.append(f"<thead><tr>{''.join(cells)}</tr></thead>")
    lines.append("<tbody>")
    for name, *values in section.rows:
        cells = (f"<td{_kind(section, place)}>{_text(value)}</td>" for place, value in enumerate(values, 1))
        lines.append(f"<tr><th scope=row>{_text(name)}</th>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _kind(section: Section, place: int) -> str:
    return "" if place < section.text_columns else " class=number"


def _times(records: Sequence[Record]) -> Iterator[str]:
    measured = [(number, record) for number, record in enumerate(records, 1) if record["status"] == "ok"]
    if not measured:
        return
    most = max(sum(median(record, name) for name, _ in _STAGES) for _, record in measured)
    keys = (f'<span><i class="key s{place}"></i>{name}</span>' for place, (_, name) in enumerate(_STAGES))
    yield f'<h2>Where the time went</h2>\n<figure>\n<figcaption class="legend">{" ".join(keys)}</figcaption>'
    yield '<ul class="bars">'
    for number, record in measured:
        stages = [(name, median(record, key)) for key, name in _STAGES]
        parts = (
            f'<i class="s{place}" style="width:{100 * size / most:.2f}%"></i>' for place, (_, size) in enumerate(stages)
        )
        words = _text(", ".join(f"{name} {format_seconds(size)}" for name, size in stages))
        cell = f"Cell {number}: {_text(label(record))}" if len(records) > 1 else ""
        bar = f'<div class="bar" aria-hidden="true">{"".join(parts)}</div>'
        yield f'<li>{cell}{bar}<span class="soft">{words}</span></li>'
    yield "</ul>\n</figure>"


def _cell(record: Record, shared: Section, head: str) -> Iterator[str]:
    yield from _memory(record, head)
    yield from _map(record, head)
    for section in cell_sections(record, shared):
        yield _table(section, head)


def _memory(record: Record, head: str) -> Iterator[str]:
    points = record["memory_timeline"]
    if not points:
        return
    end, top = points[-1][0] or 1.0, max(size for _, size in points) * 1.05
    opened = record["metrics"]["open_seconds"]["samples"][0]
    line = "L".join(f"{1000 * age / end:.1f} {100 - 100 * size / top:.2f}" for age, size in points)
    budget = record["plan"]["cpu_budget_bytes"]
    allowed = f" of {format_bytes(budget)} allowed" if budget else ""
    words = _text(f"at most {format_bytes(top / 1.05)}{allowed}; open after {format_seconds(opened)} (dashed)")
    yield f"<{head}>Memory over time</{head}>\n<figure>"
    yield f"<figcaption>The first process, to the end of its first fill: {words}.</figcaption>"
    yield f'<div class="axis"><span>{format_bytes(top)}</span></div>\n<div class="plot">'
    yield f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="Memory: {words}">'
    yield f'<path class="opened" d="M{1000 * opened / end:.1f} 0V100"/><path d="M{line}"/></svg></div>'
    yield f'<div class="axis"><span>0 s</span><span>{format_seconds(end)}</span></div>\n</figure>'


def _map(record: Record, head: str) -> Iterator[str]:
    use, experts = record["expert_use"], record["plan"]["experts_per_layer"]
    most = max((count for layer in use.values() for count in layer.values()), default=0)
    if not most:
        return
    yield (
        f'<{head}>Experts used in the first fill</{head}>\n<p class="soft">Each strip is a layer, from expert 0 at the '
        f"left to expert {experts - 1:,} at the right. A mark is an expert that was used, the stronger the more steps "
        f"used it: at most {format_count(most, 'step')}. Then come the busiest experts, each with its steps.</p>"
    )
    yield '<ul class="map">'
    for name, layer in use.items():
        counts = {int(expert): count for expert, count in layer.items()}
        place, used = name.replace(".", " "), f"{len(counts):,} of {experts:,} used"
        image = f'viewBox="0 0 {experts} 1" preserveAspectRatio="none" role="img" aria-label="{_text(place)}: {used}"'
        strip = f'<div class="strip"><svg {image}>{_marks(counts, most, experts)}</svg></div>'
        busiest = f'<span class="busy soft">{_busiest(counts)}</span>'
        yield f"<li><span>{_text(place)}</span>{strip}<span>{used}</span>{busiest}</li>"
    yield "</ul>"


def _marks(counts: Mapping[int, int], most: int, experts: int) -> str:
    """Return the marks of a layer's experts, wide enough to be seen."""
    width = max(1.0, experts * _LEAST_MARK)
    marks: dict[int, str] = {}
    for expert, count in counts.items():
        strength = -(-_STRENGTHS * count // most)
        left = min(expert, experts - width)
        marks[strength] = f"{marks.get(strength, '')}M{left:g} 0h{width:g}v1h-{width:g}z"
    return "".join(f'<path class="m{strength}" d="{marks[strength]}"/>' for strength in sorted(marks))


def _busiest(counts: Mapping[int, int]) -> str:
    """Name the experts that most steps used, if it was more than one."""
    busiest = sorted(counts.items(), key=lambda each: (-each[1], each[0]))[:_MOST_EXPERTS]
    return ", ".join(f"{expert}&nbsp;({count})" for expert, count in busiest if count > 1) or "each in one step"
