"""The page /swarm in a browser: the swarm as it is, how it changes, and what is said when nobody answers."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect

from swarm.local import LocalServer, LocalSwarm
from tests.conftest import LiveApp, serve, tiny_server
from tests.support.browser import axe_violations, browser_page
from tests.support.client import call
from tests.support.tiny import make_tiny_bloom

SOON = 60_000  # milliseconds; a server starts within a tenth of that on two idle cores
STATE = "**/api/v1/state"


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that nobody serves but the tests of this module."""
    return make_tiny_bloom(tmp_path_factory.mktemp("models") / "tiny-bloom-of-page", seed=3)


@pytest.fixture(scope="module")
def watching_app(live_app: LiveApp, lonely: Path) -> Iterator[LiveApp]:
    """An app that needs keys and looks at the swarm every moment."""
    settings = dataclasses.replace(
        live_app.service.settings,
        MODELS=(live_app.model_name, str(lonely), "/nowhere/missing-model"),
        API_KEYS=("secret",),
        PAGE="open",
        UPDATE_PERIOD=0.5,
    )
    with serve(settings) as live:
        yield live


@pytest.fixture(scope="module")
def page(watching_app: LiveApp) -> Iterator[Page]:
    with browser_page() as page:
        page.clock.install()
        page.goto(f"{watching_app.url}/swarm")
        yield page


def later(page: Page, *seconds: int) -> None:
    """Let time pass in the page, in steps."""
    for step in seconds:
        page.clock.fast_forward(step * 1000)


@pytest.fixture(autouse=True)
def no_errors(page: Page) -> Iterator[None]:
    errors: list[str] = []

    def note(error: object) -> None:
        errors.append(str(error))

    page.on("pageerror", note)
    yield
    page.remove_listener("pageerror", note)
    assert errors == []


def test_the_swarm_as_it_is(page: Page, watching_app: LiveApp, lonely: Path) -> None:
    whole, waiting, failed = (page.locator(".model").nth(index) for index in range(3))
    expect(whole.locator("h2")).to_have_text("tiny-bloom")
    expect(whole.locator(".state")).to_have_text("Ready")
    expect(whole.locator(".facts")).to_contain_text("2,048 tokens")
    expect(whole.get_by_role("img")).to_have_attribute("aria-label", "Servers per block. 0–3: 1 server.")
    expect(whole.locator(".strip .cell[data-level='1']")).to_have_count(4)

    body = call(watching_app.url, "/api/v1/state", headers={"Authorization": "Bearer secret"})[2]
    peers = [server["peer_id"] for server in body["models"][0]["servers"]]
    rows = whole.get_by_role("table").get_by_role("row")
    expect(rows).to_have_count(1 + len(peers))
    for row, peer, blocks in zip((rows.nth(1), rows.nth(2)), peers, ("0–1", "2–3"), strict=True):
        expect(row.get_by_role("rowheader")).to_have_attribute("title", peer)
        expect(row.get_by_role("rowheader")).to_contain_text(f"…{peer[-6:]}")
        cells = row.get_by_role("cell")
        expect(cells.first).to_have_text(blocks)
        expect(cells.nth(3)).to_have_text("float32")
        expect(cells.last).to_contain_text("ms", timeout=SOON)
    # A server's lane lies below its blocks.
    strip = whole.locator(".strip").bounding_box()
    assert strip and rows.nth(2).evaluate(
        "row => [parseFloat(getComputedStyle(row, '::before').marginLeft), row.getBoundingClientRect().left]"
    ) == [pytest.approx(strip["width"] / 2 + 1, abs=1), pytest.approx(strip["x"], abs=1)]

    expect(waiting.locator(".state")).to_have_text("Blocks missing", timeout=SOON)
    expect(waiting.locator(".detail")).to_have_text("No server holds blocks 0–3. Answers wait until one does.")
    expect(failed.locator(".state")).to_have_text("Does not answer")
    expect(failed.locator(".detail")).to_contain_text("no such directory")
    expect(failed.locator(".map")).to_be_hidden()
    expect(page.locator("#ready-count")).to_have_text("1 of 3")


def test_the_command_that_adds_a_machine(page: Page, swarm: LocalSwarm, lonely: Path) -> None:
    page.get_by_label("Model", exact=True).select_option(str(lonely))
    command = page.locator("#join-command")
    expect(command).to_contain_text(f"swarm.server {lonely}")
    expect(command).to_contain_text(f"--initial-peers {swarm.swarm.initial_peers[0]}")
    expect(page.locator("#join-note")).to_contain_text("the command works here alone")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == command.text_content()


def test_servers_come_and_go_in_place(page: Page, swarm: LocalSwarm, lonely: Path) -> None:
    waiting = page.locator(".model").nth(1)
    expect(waiting.locator(".cell[data-level='0']")).to_have_count(4)
    page.evaluate("for (const node of document.querySelectorAll('.model, .cell, tbody tr')) node.dataset.old = ''")
    old = page.locator("[data-old]").count()
    options = dataclasses.replace(tiny_server(lonely, "1:4"), public_name="attic <b>")
    server = LocalServer(options, swarm.swarm.initial_peers)
    try:
        strip = waiting.get_by_role("img")
        expect(strip).to_have_attribute("aria-label", "Servers per block. 0: none; 1–3: 1 server.", timeout=SOON)
        expect(waiting.locator(".detail")).to_contain_text("No server holds block 0.")
        expect(waiting.get_by_role("rowheader")).to_contain_text("attic <b>")
        expect(page.locator("#join-command")).to_contain_text("--blocks 0:1 ")
        expect(page.locator("#announcer")).to_contain_text("tiny-bloom-of-page: 1 server joined.")
        assert page.locator("[data-old]").count() == old  # nothing was drawn anew
    finally:
        server.close()
    expect(waiting.get_by_role("row")).to_have_count(0, timeout=SOON)
    expect(waiting.locator(".cell[data-level='0']")).to_have_count(4)
    expect(page.locator("#announcer")).to_contain_text("tiny-bloom-of-page: 1 server left.")


def test_an_app_that_cannot_be_reached_is_reported(page: Page) -> None:
    freshness = page.locator("#freshness")
    expect(freshness).to_contain_text("Updated")
    page.route(STATE, lambda route: route.abort())
    later(page, 2)
    expect(freshness).to_contain_text("The app cannot be reached. Below is how it was at")
    expect(freshness).to_contain_text("Next try in 2 seconds.")
    page.get_by_role("button", name="Try now").click()
    expect(freshness).to_contain_text("Next try in 4 seconds.")  # later than after the first failure
    expect(page.locator(".model").first.get_by_role("row")).to_have_count(3)
    page.unroute(STATE)
    page.get_by_role("button", name="Try now").click()
    expect(freshness).to_contain_text("Updated")
    expect(page.locator("#announcer")).to_contain_text("The app can be reached again.")


def test_a_page_that_is_too_old_loads_itself_anew_once(page: Page) -> None:
    refusal = {"ok": False, "error": {"code": "invalid_api_key", "message": "this page is too old: load it again"}}

    def refuse(route: Route) -> None:
        route.fulfill(status=401, json=refusal)

    page.route(STATE, refuse)
    with page.expect_navigation():
        later(page, 2)
    expect(page.locator("#freshness")).to_contain_text("this page is too old: load it again")
    page.evaluate("window.new = true")
    page.get_by_role("button", name="Try now").click()
    expect(page.locator("#freshness")).to_contain_text("Next try in 4 seconds")
    assert page.evaluate("window.new")
    page.unroute(STATE)
    page.get_by_role("button", name="Try now").click()
    expect(page.locator(".model")).to_have_count(3)


def test_nothing_is_asked_while_nobody_looks(page: Page) -> None:
    hide = "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true}); "
    hide += "document.dispatchEvent(new Event('visibilitychange')); }"
    page.evaluate(hide, True)
    page.wait_for_timeout(200)  # for a request that is under way
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    later(page, 2, 2, 60)
    page.wait_for_timeout(200)
    assert asked == []
    with page.expect_request(STATE):
        page.evaluate(hide, False)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100])
def test_accessible_and_no_wider_than_the_window(page: Page, scheme: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 760})
    # Without motion, for colours that are on their way to others are none of these.
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light", reduced_motion="reduce")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert axe_violations(page) == []


def test_a_long_name_in_the_note_is_broken(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 760})
    width = page.evaluate("""() => {
      document.getElementById("join-note").textContent = "SWARM_HOST_MADDRS=/ip4/0.0.0.0/tcp/31330;";
      return document.documentElement.scrollWidth;
    }""")
    assert width <= 360


def test_the_chat_is_a_link_away(page: Page, watching_app: LiveApp) -> None:
    assert page.get_by_role("link", name="Chat").evaluate("link => link.href") == f"{watching_app.url}/"
