"""What a request asks for, read from JSON and checked: the fields of each route, and what is wrong with a body."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from switchrun.checkpoint.files import parse_json
from switchrun.errors import InputError, SwitchrunError, UsageError, printable
from switchrun.model.records import GenerationOptions
from switchrun.model.sentinels import Filling, check_sentinels, replace_blanks

Task = Literal["fill", "generate", "score"]

#: So many inputs a request may have, and so many bytes its body.
MOST_INPUTS = 1024
MOST_BODY_BYTES = 4 * 1024**2
HALF = "the text has half of a character, which no UTF-8 text can have"
#: Fields that decide how text is drawn; without `sample` they would do nothing.
_DRAWING = ("temperature", "top_p", "top_k", "seed")


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a body: its JSON type, and what it means. `items` is the type of an array's items."""

    type: Literal["string", "integer", "number", "boolean", "array"]
    description: str
    items: Mapping[str, Any] | None = None


_TEXT = Field("string", "One text; its answer is an object.")
_TEXTS = Field("array", "Several texts; their answers are a list under `results`.", {"type": "string"})
_GENERATION = {
    "max_new_tokens": Field("integer", "Most tokens to generate for an input."),
    "num_beams": Field("integer", "Beams of the search; 1 is greedy."),
    "sample": Field("boolean", "Draw tokens instead of taking the likeliest."),
    "temperature": Field("number", "Divides the logits before drawing. Only with sample."),
    "top_p": Field("number", "Draw from the likeliest tokens that together have this probability. Only with sample."),
    "top_k": Field("integer", "Draw from this many likeliest tokens; 0 is all. Only with sample."),
    "seed": Field("integer", "The same seed draws the same. Only with sample."),
    "explain": Field("boolean", "Say which expert each token went to, in each layer, under `routing`."),
}
_STREAM = Field("boolean", "Send events as the work goes on: stage, token, result, error.")
_FILLING = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "spans": {"type": "array", "items": {"type": "string"}}},
    "required": ["text", "spans"],
    "additionalProperties": False,
}

#: The fields of each route's body.
FIELDS: Mapping[Task, Mapping[str, Field]] = {
    "fill": {
        "text": _TEXT,
        "texts": _TEXTS,
        "blank": Field("string", "Take this mark, like ___, for the next sentinel."),
        "alternatives": Field("integer", "So many answers for each input, best first, with log-probabilities."),
        **_GENERATION,
        "stream": _STREAM,
    },
    "generate": {
        "text": _TEXT,
        "texts": _TEXTS,
        "prefix": Field("string", "Put this before each text."),
        **_GENERATION,
        "stream": _STREAM,
    },
    "score": {
        "text": Field("string", "A text with sentinels; `spans` says what to score in their places."),
        "spans": Field("array", "A span for each sentinel of `text`.", {"type": "string"}),
        "fillings": Field("array", "Several texts with their spans; the scores are a list under `results`.", _FILLING),
        "stream": _STREAM,
    },
}


class BodyError(SwitchrunError):
    """A body that is no JSON object."""

    kind = "body"


@dataclass(frozen=True, slots=True)
class Call:
    """What one request asks for.

    Attributes:
        task: What to do with each input.
        inputs: Texts, or fillings to be scored; an error for one that cannot be worked on.
        shown: The inputs as records show them.
        single: Whether the answer is an object, and not a list.
        options: How to generate; for `generate` the changes to the model's own settings.
        prefix: What to put before each text.
        stream: Whether to send events.
    """

    task: Task
    inputs: tuple[str | Filling | InputError, ...]
    shown: tuple[str, ...]
    single: bool
    options: Mapping[str, Any]
    prefix: str = ""
    stream: bool = False


def parse(task: Task, body: bytes) -> Call:
    """Read the body of a request.

    Raises:
        BodyError: It is no JSON object in UTF-8.
        UsageError: A field is unknown, missing, or of another type or value than it may have.
        InputError: The only input cannot be worked on.
    """
    given = checked(read_object(body), FIELDS[task])
    options = {name: given[name] for name in (*_GENERATION, "alternatives") if name in given}
    drawing = [name for name in _DRAWING if name in options]
    if (drawing and options.get("sample") is False) or (drawing and task == "fill" and not options.get("sample")):
        raise UsageError(f"{drawing[0]}: it does nothing without sample", "set sample to true", option=drawing[0])
    GenerationOptions(**options)
    single, raw = _inputs(task, given)
    inputs: list[str | Filling | InputError] = []
    shown = []
    for each in raw:
        shown.append(each if isinstance(each, str) else each["text"])
        try:
            inputs.append(_input(task, each, given))
        except InputError as error:
            if single:
                raise
            inputs.append(error)
            continue
        if task == "fill":
            shown[-1] = str(inputs[-1])
    return Call(
        task, tuple(inputs), tuple(shown), single, options, given.get("prefix", ""), bool(given.get("stream", False))
    )


def read_object(body: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        BodyError: It is none.
    """
    try:
        found = parse_json(body, parse_constant=no_number)
    except ValueError as error:
        words = "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"no JSON: {printable(error, 200)}"
        raise BodyError(f"the body is {words}", 'send an object, like {"text": "A <extra_id_0> walks in."}') from error
    if not isinstance(found, dict):
        raise BodyError("the body is no JSON object", 'send one, like {"text": "A <extra_id_0> walks in."}')
    return found


def checked(given: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return the fields that have a value, each of its type; null is as if it was not there.

    Raises:
        UsageError: One is unknown, or of another type.
    """
    found = {}
    for name, value in given.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            shown = printable(name, 100)
            raise UsageError(f"{shown}: there is no such field", f"did you mean {near[0]}?" if near else "")
        if value is None:
            continue
        if not _is(value, fields[name].type):
            raise UsageError(f"{name}: it must be {_A[fields[name].type]}", option=name)
        found[name] = value
    return found


_A = {
    "string": "a string",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
}


def _is(value: Any, kind: str) -> bool:
    kinds: dict[str, tuple[type, ...]] = {
        "string": (str,),
        "integer": (int,),
        "number": (int, float),
        "boolean": (bool,),
        "array": (list,),
    }
    return isinstance(value, kinds[kind]) and (kind == "boolean" or not isinstance(value, bool))


def no_number(name: str) -> Any:
    """Refuse NaN and its like, which json takes for numbers."""
    raise ValueError(f"{name} is no number")


def check_characters(text: str) -> None:
    """Raise InputError for a text that no UTF-8 text can be."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(HALF) from error


def _inputs(task: Task, given: Mapping[str, Any]) -> tuple[bool, Sequence[Any]]:
    """Return whether there is a single input, and all of them, of the right type."""
    one, many = "text", "fillings" if task == "score" else "texts"
    if (one in given) == (many in given):
        raise UsageError(f"{one}: there must be either {one} or {many}", option=one)
    if task == "score":
        if ("spans" in given) != (one in given):
            raise UsageError("spans: it belongs to text, a span for each of its sentinels", option="spans")
        raw = given.get(many, [{name: given.get(name) for name in ("text", "spans")}])
        wrong = next((each for each in raw if not _is_filling(each)), None)
        must = "an object with text and spans, a list of strings"
    else:
        raw = given.get(many, [given.get(one)])
        wrong = next((each for each in raw if not isinstance(each, str)), None)
        must = "a string"
    if wrong is not None:
        raise UsageError(f"{many}: {printable(repr(wrong), 100)} is not {must}", option=many)
    if len(raw) > MOST_INPUTS:
        raise UsageError(f"{many}: there are {len(raw)}, and at most {MOST_INPUTS} may be in a request", option=many)
    return one in given, raw


def _is_filling(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"text", "spans"}
        and isinstance(value["text"], str)
        and isinstance(value["spans"], list)
        and all(isinstance(span, str) for span in value["spans"])
    )


def _input(task: Task, raw: Any, given: Mapping[str, Any]) -> str | Filling:
    """Return what to work on.

    Raises:
        InputError: It cannot be worked on.
    """
    for text in (raw, given.get("prefix", "")) if isinstance(raw, str) else (raw["text"], *raw["spans"]):
        check_characters(text)
    if not isinstance(raw, str):
        return Filling(raw["text"], raw["spans"])
    text = str(raw)
    if task == "fill":
        if "blank" in given:
            text = replace_blanks(text, given["blank"])
        check_sentinels(text)
    return text
