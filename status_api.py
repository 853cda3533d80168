"""Whether the program lives, and which models are ready: for load balancers, the page and people."""

from flask import Blueprint, Response, current_app, jsonify

from api_docs import documented
from http_schemas import Health, Readiness
from service import get_service

blueprint = Blueprint("status_api", __name__)
TAG = "State"


@blueprint.get("/healthz")
@documented(TAG, Health, failure=None)
def healthz() -> Response:
    """200 while the program can answer at all; with how full it is."""
    sessions = get_service(current_app).sessions
    return jsonify(ok=True, sessions={"open": len(sessions), "max": sessions.max_sessions})


@blueprint.get("/readyz")
@documented(TAG, Readiness, failure=None, also=(503,))
def readyz() -> tuple[Response, int]:
    """200 when all models are ready, else 503; the state of each either way."""
    service = get_service(current_app)
    models = {
        name: {"state": status.state, "message": status.message} for name, status in service.models.status.items()
    }
    ready = not service.ending.is_set() and all(model["state"] == "ready" for model in models.values())
    return jsonify(ready=ready, models=models), 200 if ready else 503
