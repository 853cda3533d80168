"""Each route belongs to the door of the module that serves it; so no API is silently outside the rules for APIs."""

import sys

import pytest
from werkzeug.routing import Rule

from app import DOORS, app
from web.doors import Door, Doors

RULES = sorted(app.url_map.iter_rules(), key=str)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_route_is_behind_its_own_door(rule: Rule) -> None:
    module = sys.modules[app.view_functions[rule.endpoint].__module__]
    assert DOORS.of(str(rule)) in module.DOORS


def test_every_door_has_a_route() -> None:
    used = {DOORS.of(str(rule)) for rule in RULES}
    assert [door.paths for door in DOORS if door not in used] == [("/api/",)]  # only 404


@pytest.mark.parametrize(
    ("path", "for_programs", "cross_origin", "needs_key", "own_pages"),
    [
        ("/", False, False, False, False),
        ("/nowhere", False, False, False, False),
        ("/page/key", True, False, False, False),
        ("/static/js/chat/main.js", False, False, False, False),
        ("/static", False, False, False, False),
        ("/docs", False, False, False, False),
        ("/docs/swagger-ui.css", False, False, False, False),
        ("/page/keys", False, False, False, False),
        ("/openapi.json", True, True, False, False),
        ("/openapi.json/nowhere", False, False, False, False),
        ("/healthz", True, True, False, False),
        ("/readyz", True, True, False, False),
        ("/readyzz", False, False, False, False),
        ("/api/", True, True, False, False),
        ("/apis/v1/generate", False, False, False, False),
        ("/api/v3/generate", True, True, False, False),
        ("/api/v2/generate", True, True, False, False),
        ("/api/v1/generate", True, True, True, False),
        ("/api/v1/nowhere", True, True, True, False),
        ("/api/v10/generate", True, True, False, False),
        ("/api/v1/state", True, True, True, True),
        ("/api/v1/statex", True, True, True, False),
        ("/api/v1/state/", True, True, True, False),
        ("/api/v1/state/nowhere", True, True, True, False),
        ("/api/v1/stat", True, True, True, False),
        ("/v1/models", True, True, True, False),
        ("/v1/nowhere", True, True, True, False),
        ("/v10/models", False, False, False, False),
        ("/tokenize", True, True, True, False),
        ("/tokenizer", False, False, False, False),
        ("/tokenize/nowhere", False, False, False, False),
    ],
)
def test_doors(path: str, for_programs: bool, cross_origin: bool, needs_key: bool, own_pages: bool) -> None:
    door = DOORS.of(path)
    found = (door.for_programs, door.cross_origin, door.needs_key, door.for_own_pages)
    assert found == (for_programs, cross_origin, needs_key, own_pages)


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1x", "/healthz", "/healthzz", "/openapi-json", "/docs", "/", "/api/v1"]
)
def test_other_sites_pages_may_use_what_their_door_lets_them(path: str) -> None:
    answer = app.test_client().get(path, headers={"Origin": "https://elsewhere.example"})
    assert ("Access-Control-Allow-Origin" in answer.headers) == DOORS.of(path).cross_origin


def test_two_doors_have_no_path_in_common() -> None:
    with pytest.raises(ValueError, match="same path"):
        Doors(Door(("/a", "/b")), Door(("/b",)))
    assert Doors(door := Door(("/a/", "/b"))).of("/a/c") is door
    with pytest.raises(LookupError, match="/c belongs to no door"):
        Doors(Door(("/a",))).of("/c")
