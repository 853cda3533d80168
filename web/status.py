"""Whether the program lives, which models are ready, and who serves them: for load balancers, the pages and people."""

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flask import Blueprint, Response, current_app, g, jsonify, request

from admission.callers import Caller
from errors import ApiError
from generation.drafting import Drafting
from models.loading import ServedModel
from service import Service, get_service
from web.callers import find_caller
from web.doors import Door
from web.openapi import documented
from web.schemas import Failure, Health, Readiness, SwarmReport

if TYPE_CHECKING:
    from swarm.background import Loop
    from swarm.client.routing import ServerView

blueprint = Blueprint("status_api", __name__)
TAG = "State"
DOORS = (
    Door(("/healthz", "/readyz"), quiet=True),
    Door(("/api/v1/state",), needs_key=True, for_own_pages=True, quiet=True),
)


@blueprint.get("/healthz")
@documented(TAG, Health, failure=None)
def healthz() -> Response:
    """200 while the program can answer at all; with how full it is."""
    sessions = get_service(current_app).sessions
    return jsonify(ok=True, sessions={"open": len(sessions), "max": sessions.max_sessions})


@blueprint.get("/readyz")
@documented(TAG, Readiness, failure=None, also=(503,))
def readyz() -> tuple[Response, int]:
    """200 when all models are ready, else 503; either way the states that the caller may know, and the loops' ages.

    Who has no key where one is needed is told no more than the states of the public ones.
    """
    service = get_service(current_app)
    caller = known_caller(service)
    served = service.models.served
    told = [name for name in served if (caller or service.access.stranger).may_use(name)]
    models = {name: readiness(served[name], messages=caller is not None) for name in told}
    ready = not service.ending.is_set() and all(model.status.state == "ready" for model in served.values())
    report = {"ready": ready, "models": models, "others": len(served) - len(told), "loops": ages(service.loops)}
    return jsonify(report), 200 if ready else 503


def known_caller(service: Service) -> Caller | None:
    """Return the caller; None if it lacks a key that it needs."""
    try:
        return find_caller(request, service.access, service.settings, of_page=True)
    except ApiError:
        return None


def ages(loops: list["Loop"]) -> dict[str, float]:
    """Return for each kind of loop the largest age; names of models are left out, for not everybody may know them."""
    found: dict[str, float] = {}
    for loop in loops:
        kind = loop.name.partition(" ")[0]
        found[kind] = round(max(loop.age, found.get(kind, 0.0)), 3)
    return found


def readiness(served: ServedModel, *, messages: bool) -> dict[str, Any]:
    """Return a model's state and what it rests on. Takes no lock: load balancers ask while things hang.

    :param messages: whether to report more of the state than its name
    """
    status, state = served.status, served.model.state if served.model else None
    return {
        "state": status.state,
        "message": status.message if messages else status.state,
        "view_age": round(state.view_age, 3) if state and state.view_age is not None else None,
        "answer_age": round(state.answer_age, 3) if state and state.answer_age is not None else None,
    }


@blueprint.get("/api/v1/state")
@documented(TAG, SwarmReport, failure=Failure)
def swarm_state() -> Response:
    """Which servers hold which blocks of which models, as was read last: asking costs the swarm nothing."""
    service = get_service(current_app)
    sessions = service.sessions
    return jsonify(
        ok=True,
        time=time.time(),
        initial_peers=service.models.initial_peers,
        sessions={"open": len(sessions), "max": sessions.max_sessions},
        models=[
            model_report(served, sessions.drafting)
            for name, served in service.models.served.items()
            if g.caller.may_use(name)
        ],
    )


def model_report(served: ServedModel, drafting: Mapping[str, Drafting] | None) -> dict[str, Any]:
    """Return what is known of a model; null where it is unknown, or not known yet.

    :param drafting: what is known of drafts, by the model's name; None: nothing is drafted
    """
    config, status, model = served.config, served.status, served.model
    return {
        "name": config.name,
        "title": config.shown_title,
        "state": status.state,
        "message": status.message,
        "progress": served.fraction if status.state == "loading" else None,
        "size": config.size or (short_count(model.parameters) if model else None),
        "parameters": model.parameters if model else None,
        "licence": config.licence or None,
        "link": config.link,
        "context_length": model.max_length if model else None,
        "chat": dataclasses.asdict(served.chat) if model else None,
        "num_blocks": model.state.num_blocks if model else None,
        "blocks": model.state.holders() if model else [],
        "drafting": None if drafting is None else drafting_report(served, drafting.get(config.name)),
        "servers": server_reports(model.state.servers()) if model else [],
    }


def drafting_report(served: ServedModel, drafting: Drafting | None) -> dict[str, Any]:
    """Return what drafts for a model's answers, and how well.

    :param drafting: None: there was no answer yet
    """
    model = served.model
    return {
        "model": model.draft_model.name if model and model.draft_model else None,
        "error": served.draft_error,
        "drafted": drafting.drafted if drafting else 0,
        "taken": drafting.taken if drafting else 0,
    }


def server_reports(servers: list["ServerView"]) -> list[dict[str, Any]]:
    """Return them in the order of their blocks, which does not change from one answer to the next."""
    ordered = sorted(servers, key=lambda server: (server.start, server.end, server.peer_id))
    described = [dataclasses.asdict(server) for server in ordered]
    return [{"peer_id": server.pop("peer_id"), "name": server.pop("public_name"), **server} for server in described]


def short_count(count: int) -> str:
    """Write a number of parameters as people say it: 134515008 as 135M, 7069016064 as 7.1B."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if (value := count / size) >= 0.9995:
            return f"{value:.1f}".removesuffix(".0") + unit if value < 9.95 else f"{value:.0f}{unit}"
    return str(count)
