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
    assert [door.prefixes for door in DOORS if door not in used] == [("/api/",)]  # only 404


@pytest.mark.parametrize(
    ("path", "for_programs", "cross_origin", "needs_key", "own_pages"),
    [
        ("/", False, False, False, False),
        ("/nowhere", False, False, False, False),
        ("/page/key", True, False, False, False),
        ("/static/js/chat/main.js", False, False, False, False),
        ("/docs", False, False, False, False),
        ("/openapi.json", True, True, False, False),
        ("/healthz", True, True, False, False),
        ("/readyz", True, True, False, False),
        ("/api/v3/generate", True, True, False, False),
        ("/api/v2/generate", True, True, False, False),
        ("/api/v1/generate", True, True, True, False),
        ("/api/v1/nowhere", True, True, True, False),
        ("/api/v1/state", True, True, True, True),
        ("/v1/models", True, True, True, False),
        ("/v1/nowhere", True, True, True, False),
        ("/tokenize", True, True, True, False),
    ],
)
def test_doors(path: str, for_programs: bool, cross_origin: bool, needs_key: bool, own_pages: bool) -> None:
    door = DOORS.of(path)
    found = (door.for_programs, door.cross_origin, door.needs_key, door.for_own_pages)
    assert found == (for_programs, cross_origin, needs_key, own_pages)


def test_two_doors_have_no_prefix_in_common() -> None:
    with pytest.raises(ValueError, match="same prefix"):
        Doors(Door(("/a", "/b")), Door(("/b",)))
    with pytest.raises(LookupError, match="/c belongs to no door"):
        Doors(Door(("/a",))).of("/c")
