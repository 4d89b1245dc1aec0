"""`/openapi.json`: the routes and the fields of their bodies, made of what checks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from switchrun import __version__
from switchrun.serve import completions
from switchrun.serve.calls import FIELDS, Field

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["kind", "message", "hint"],
            "properties": {
                "kind": {"type": "string"},
                "message": {"type": "string"},
                "hint": {"type": "string"},
                "id": {"type": "string", "description": "Of a bug: the server's log has it."},
            },
        }
    },
}
_REFUSALS = {
    "400": "The body is no JSON object.",
    "401": "The token is missing or wrong.",
    "403": "The request comes from a page of another server.",
    "413": "The body is too large.",
    "422": "A field or text is wrong, or more is asked for than memory was reserved for.",
    "429": "The queue is full; Retry-After says when to try again.",
    "500": "A bug, or a file that is damaged.",
    "503": "The model is still being opened, or the server is closing.",
}
_POSTS = {
    "/v1/fill": ("Fill the sentinels of texts.", FIELDS["fill"]),
    "/v1/generate": ("Answer texts with a fine-tuned model.", FIELDS["generate"]),
    "/v1/score": ("Say how likely fillings are.", FIELDS["score"]),
    "/v1/completions": ("Complete a prompt, in OpenAI's shape.", completions.FIELDS),
}
_GETS = {
    "/v1/models": "The model that is served.",
    "/health": "Whether the server is alive.",
    "/ready": "Whether it takes requests; 503 if not.",
    "/metrics": "Counts in Prometheus' text format.",
    "/openapi.json": "This document.",
    "/": "A page to try the model.",
}


def document() -> dict[str, Any]:
    """Return the OpenAPI document of the server."""
    error = {"$ref": "#/components/schemas/Error"}
    refusals = {
        status: {"description": text, "content": {"application/json": {"schema": error}}}
        for status, text in _REFUSALS.items()
    }
    done = {"200": {"description": "The answer."}}
    paths: dict[str, Any] = {}
    for path, (summary, fields) in _POSTS.items():
        body = {"required": True, "content": {"application/json": {"schema": _schema(fields)}}}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": done | refusals}}
    for path, summary in _GETS.items():
        paths[path] = {"get": {"summary": summary, "responses": done}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "switchrun", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _schema(fields: Mapping[str, Field]) -> dict[str, Any]:
    properties = {
        name: {"type": field.type, "description": field.description} | ({"items": field.items} if field.items else {})
        for name, field in fields.items()
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}
