"""`/v1/completions` in OpenAI's shape: `prompt` and `suffix` are a text with one sentinel between them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from switchrun.errors import InputError, UsageError
from switchrun.model.records import Alternative, FillResult, GenerationOptions, Span
from switchrun.model.sentinels import check_sentinels, sentinel
from switchrun.serve.answers import error_record, sent
from switchrun.serve.calls import MOST_INPUTS, Call, Field, check_characters, checked, read_object
from switchrun.serve.scheduler import Event, ResultEvent, Ticket, TokenEvent

if TYPE_CHECKING:
    from switchrun.model.session import Session

FIELDS: Mapping[str, Field] = {
    "model": Field("string", "Ignored: the server has one model."),
    "prompt": Field("string", "The text before the gap, or a list of such texts."),
    "suffix": Field("string", "The text after the gap."),
    "max_tokens": Field("integer", "Most tokens to generate."),
    "temperature": Field("number", "0, as by default, takes the likeliest tokens; more draws them."),
    "top_p": Field("number", "Draw from the likeliest tokens that together have this probability."),
    "n": Field("integer", "So many completions of each prompt."),
    "seed": Field("integer", "The same seed draws the same."),
    "stream": Field("boolean", "Send events as the work goes on, and [DONE] at the end."),
    "user": Field("string", "Ignored."),
}


class CompletionAnswer:
    """Answers with a completion object, or with pieces of text.

    Raises:
        BodyError: The body is no JSON object in UTF-8.
        UsageError: A field is unknown, missing, or of another type or value than it may have.
        InputError: The only prompt cannot be completed.
    """

    def __init__(self, body: bytes, session: Session) -> None:
        self.call = _call(body)
        self._session = session
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": session.checkpoint.id,
        }
        #: What was sent of each prompt's text.
        self._sent: dict[int, str] = {}

    def document(self, results: Mapping[int, ResultEvent]) -> Any:
        """Return the completion object.

        Raises:
            InputError: One of several prompts cannot be completed.
        """
        choices: list[dict[str, Any]] = []
        prompt_tokens = completion_tokens = 0
        for number in range(len(self.call.inputs)):
            result = results[number].result
            if isinstance(result, Exception):
                raise result
            assert isinstance(result, FillResult)
            prompt_tokens += result.tokens.input
            for each in result.alternatives or (result,):
                completion_tokens += len(each.output_ids) - 1
                choices.append(_choice(len(choices), _gap(each.spans), each.finish_reason))
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        return {**self._head, "choices": choices, "usage": usage | {"total_tokens": sum(usage.values())}}

    def events(self, ticket: Ticket, event: Event) -> Iterator[str]:
        """Write what is new of a prompt's text."""
        if isinstance(event, TokenEvent):
            text = _gap(self._session.spans_of(ticket.encoded(event.id), event.ids))
            if new := self._new(event.id, text):
                yield self._piece(event.id, new, None)
        elif isinstance(event, ResultEvent):
            if isinstance(event.result, Exception):
                yield sent(None, {"error": error_record(event.result)})
                return
            assert isinstance(event.result, FillResult)
            several: Sequence[FillResult | Alternative] = event.result.alternatives or (event.result,)
            for number, each in enumerate(several):
                text = _gap(each.spans)
                new = self._new(event.id, text) if len(several) == 1 else text
                yield self._piece(event.id * len(several) + number, new, each.finish_reason)

    def end(self) -> str:
        """Write OpenAI's mark for the end."""
        return "data: [DONE]\n\n"

    def _new(self, number: int, text: str) -> str:
        """Return what a text has that was not sent; half a character may still change, so it waits."""
        before = self._sent.get(number, "")
        stable = text.rstrip("\N{REPLACEMENT CHARACTER}")
        if not stable.startswith(before):
            return ""
        self._sent[number] = stable
        return stable[len(before) :]

    def _piece(self, index: int, text: str, finish_reason: str | None) -> str:
        return sent(None, {**self._head, "choices": [_choice(index, text, finish_reason)]})


def _call(body: bytes) -> Call:
    raw = read_object(body)
    prompts = raw.pop("prompt", None)
    single = isinstance(prompts, str)
    if single:
        prompts = [prompts]
    if not isinstance(prompts, list) or not prompts or not all(isinstance(each, str) for each in prompts):
        raise UsageError("prompt: it must be a string, or a list of strings", option="prompt")
    if len(prompts) > MOST_INPUTS:
        raise UsageError(f"prompt: at most {MOST_INPUTS} may be in a request", option="prompt")
    given = checked(raw, FIELDS)
    options = {"max_new_tokens": given["max_tokens"]} if "max_tokens" in given else {}
    if given.get("temperature", 0) != 0:
        options |= {"sample": True} | {name: given[name] for name in ("temperature", "top_p", "seed") if name in given}
    if given.get("n", 1) != 1:
        options["alternatives"] = given["n"]
    GenerationOptions(**options)
    texts = [f"{prompt}{sentinel(0)}{given.get('suffix', '')}" for prompt in prompts]
    inputs: list[str | InputError] = []
    for text in texts:
        try:
            check_characters(text)
            if check_sentinels(text) > 1:
                raise InputError("the prompt has sentinels of its own", "send it to /v1/fill")
            inputs.append(text)
        except InputError as error:
            if single:
                raise
            inputs.append(error)
    return Call("fill", tuple(inputs), tuple(texts), single, options, stream=bool(given.get("stream", False)))


def _gap(spans: tuple[Span, ...]) -> str:
    return spans[0].text or ""


def _choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
