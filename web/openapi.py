"""The OpenAPI document of all HTTP routes, made from the code, and a page to read and try it: /openapi.json, /docs."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import flask_swagger_ui
from flask import Blueprint, Flask, Response, current_app, jsonify, make_response, render_template, send_from_directory
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from werkzeug.routing import Rule

from errors import ROOT
from web.doors import Door

blueprint = Blueprint("api_docs", __name__)
DOORS = (Door(("/openapi.json",)), Door(("/docs", "/docs/"), for_programs=False, cross_origin=False))

View = TypeVar("View", bound=Callable[..., Any])
WEBSOCKET_API = ROOT / "docs" / "websocket-api.md"
SWAGGER_FILES = Path(flask_swagger_ui.__file__).parent / "dist"
# Swagger UI makes markup from strings.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)
REF = "#/components/schemas/{model}"
# What any route that needs a model may answer beside 200, and what that says.
STATUSES = {
    400: "A parameter is wrong.",
    401: "An API key is needed, or this one is not known.",
    403: "The model is not served to this caller, or pages of this origin may not use the app.",
    404: "No such model or session.",
    409: "The session was opened for another model.",
    413: "The body is too large.",
    415: "The body is of no kind that is read here.",
    421: "The app does not go by the name it was asked by.",
    422: "Longer than the model or the session allows.",
    429: "Too many requests, tokens, sessions or answers at a time; Retry-After says when to come again.",
    499: "The client has hung up: nobody reads this.",
    500: "A fault of the server.",
    503: "The model is not ready, its blocks are missing, or the swarm is full.",
    504: "The swarm took too long.",
}


@dataclass(frozen=True)
class Operation:
    """What the document says of a route beside its path, methods and docstring."""

    tag: str
    request: type[BaseModel] | None
    response: type[BaseModel]
    failure: type[BaseModel] | None  # None: the route cannot fail
    streams: bool  # whether the answer may be server-sent events
    forms: bool  # whether parameters may come as form and in the query string as well
    also: tuple[int, ...]  # statuses with the body of success


def documented(
    tag: str,
    response: type[BaseModel],
    *,
    request: type[BaseModel] | None = None,
    failure: type[BaseModel] | None,
    streams: bool = False,
    forms: bool = False,
    also: tuple[int, ...] = (),
) -> Callable[[View], View]:
    """Describe a route for the document."""

    def mark(view: View) -> View:
        view.operation = Operation(tag, request, response, failure, streams, forms, also)  # type: ignore[attr-defined]
        return view

    return mark


@blueprint.get("/openapi.json")
def openapi() -> Response:
    """The document."""
    return jsonify(document(current_app._get_current_object()))  # type: ignore[attr-defined]


@blueprint.get("/docs")
def docs() -> Response:
    """A page to read and try it."""
    response = make_response(render_template("docs.html"))
    response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
    return response


@blueprint.get("/docs/<path:name>")
def docs_file(name: str) -> Response:
    """A file of Swagger UI."""
    return send_from_directory(SWAGGER_FILES, name, max_age=3600)


@cache
def document(app: Flask) -> dict[str, Any]:
    """Build the document of an app's routes."""
    rules = [rule for rule in app.url_map.iter_rules() if operation_of(app, rule) is not None]
    models: dict[type[BaseModel], str] = {}
    for rule in rules:
        operation = operation_of(app, rule)
        assert operation is not None
        for model in (operation.request, operation.response, operation.failure):
            if model is not None:
                models[model] = "validation" if model is operation.request else "serialization"
    _, definitions = models_json_schema(list(models.items()), ref_template=REF)  # type: ignore[arg-type]
    paths: dict[str, Any] = {}
    for rule in sorted(rules, key=lambda rule: rule.rule):
        operation = operation_of(app, rule)
        assert operation is not None
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            described = describe_route(app, rule, method, operation, definitions["$defs"])
            paths.setdefault(path, {})[method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Petals Chat",
            "version": "1",
            "description": "Very large language models that run on a swarm of computers.\n\n" + websocket_section(),
        },
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "Where keys are needed."}},
        },
    }


def operation_of(app: Flask, rule: Rule) -> Operation | None:
    return getattr(app.view_functions[rule.endpoint], "operation", None)


def describe_route(app: Flask, rule: Rule, method: str, operation: Operation, schemas: dict[str, Any]) -> Any:
    view = app.view_functions[rule.endpoint]
    described: dict[str, Any] = {
        "tags": [operation.tag],
        "operationId": f"{method.lower()}_{view.__name__}",
        "summary": (inspect.getdoc(view) or "").split("\n")[0],
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in sorted(rule.arguments)
        ],
        "responses": responses(operation),
    }
    if operation.failure is not None:
        described["security"] = [{}, {"key": []}]
    if operation.request is not None and method == "GET":
        described["parameters"] += query_parameters(schemas[operation.request.__name__])
    elif operation.request is not None:
        schema = {"schema": reference(operation.request)}
        kinds = ["application/json", *(["application/x-www-form-urlencoded"] if operation.forms else [])]
        described["requestBody"] = {"required": True, "content": {kind: schema for kind in kinds}}
    return described


def query_parameters(schema: dict[str, Any]) -> list[dict[str, Any]]:
    required = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, "schema": field}
        for name, field in schema["properties"].items()
    ]


def responses(operation: Operation) -> dict[str, Any]:
    success: dict[str, Any] = {"application/json": {"schema": reference(operation.response)}}
    if operation.streams:
        events = "data: lines with chunks of the answer, then [DONE]; with `stream`."
        success["text/event-stream"] = {"schema": {"type": "string", "description": events}}
    found = {str(status): {"description": "Success.", "content": success} for status in (200, *operation.also)}
    if operation.failure is not None:
        body = {"application/json": {"schema": reference(operation.failure)}}
        for status, words in STATUSES.items():
            found[str(status)] = {"description": words, "content": body}
    return found


def reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF.format(model=model.__name__)}


def websocket_section() -> str:
    """Return the document of the WebSocket protocol, for which OpenAPI has no words.

    Its title is a section here. Its links lead to files that are not served, so only their words are kept.
    """
    text = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", WEBSOCKET_API.read_text())
    return re.sub("^#", "##", text, flags=re.MULTILINE)
