"""The live page in a real browser, over a server with simulated traffic."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest

from tests.server.observe.browser import Browser, missing, until
from tests.server.observe.scripted_server import ADMIN_KEY, ScriptedServer

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

# How many of the canvas's points have about this colour.
COUNT_COLOR = """
const canvas = document.querySelector(arguments[0]);
const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
const probe = copy.getContext("2d", { willReadFrequently: true });
probe.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(arguments[1]);
probe.fillRect(0, 0, 1, 1);
const wanted = probe.getImageData(0, 0, 1, 1).data;
probe.clearRect(0, 0, 1, 1);
probe.drawImage(canvas, 0, 0);
const data = probe.getImageData(0, 0, canvas.width, canvas.height).data;
let count = 0;
for (let at = 0; at < data.length; at += 4)
  if ([0, 1, 2].every((part) => Math.abs(data[at + part] - wanted[part]) < 3) && data[at + 3] > 250) count += 1;
return count;
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def serve(browser: Browser) -> Iterator[Callable[..., ScriptedServer]]:
    """Start a server and go to its page; afterwards nothing may have gone wrong in the page."""
    servers = []

    def start(**options: object) -> ScriptedServer:
        server = ScriptedServer(**options)  # type: ignore[arg-type]
        servers.append(server)
        browser.go(server.start())
        return server

    yield start
    browser.run("sessionStorage.clear()")
    complaints = [line for line in browser.log() if "Failed to load resource" not in line]
    browser.go("about:blank")
    for server in servers:
        server.stop()
    assert complaints == []


def text_is(browser: Browser, selector: str, text: str) -> None:
    until(lambda: browser.text(selector) == text, f"{selector} to say {text!r}")


def text_has(browser: Browser, selector: str, text: str) -> None:
    until(lambda: text in browser.text(selector), f"{selector} to have {text!r} in it")


def use_key(browser: Browser, key: str) -> None:
    browser.type("#key", key)
    browser.click("#key-form button")


def test_a_busy_minute_is_shown_in_both_colours_with_its_numbers(browser: Browser, serve: Callable) -> None:
    server = serve(past=60.0)
    text_is(browser, "#status-text", "ready")
    assert browser.text("#model") == server.observatory.model_name
    assert browser.text("#policy-chip") == "threshold · 256 tokens"
    assert "SP 4" in browser.text("#mode-legend")
    until(lambda: browser.run(COUNT_COLOR, "#band", "--sp") > 500, "sequence parallel steps in the band")
    until(lambda: browser.run(COUNT_COLOR, "#band", "--tp") > 500, "tensor parallel steps in the band")
    assert browser.run(COUNT_COLOR, "#band", "--mixed") == 0
    tiles = browser.text("#tiles")
    assert "tok/s" in tiles
    assert "p50" in tiles
    assert "finished" in browser.text("#outcomes")
    assert "all to all" in browser.text("#times")


def test_drafts_are_shown_where_tokens_are_drafted(browser: Browser, serve: Callable) -> None:
    serve(past=30.0)
    text_is(browser, "#status-text", "ready")
    assert not browser.run("return byId('drafts').checkVisibility() || byId('chart-drafts').checkVisibility()")
    serve(past=30.0, drafts=4)
    until(lambda: browser.run("return byId('drafts').checkVisibility()"), "the panel")
    text_has(browser, "#drafts-note", "50 % of")
    assert browser.text("#positions").split() == ["token", "1", "100", "%", "token", "2", "100", "%"]
    until(lambda: browser.run(COUNT_COLOR, "#chart-drafts canvas", "--three") > 20, "the line of drafted tokens")
    shown = "drafted per step 4.0 output per step 3.0"
    until(lambda: browser.text("#chart-drafts .legend").split() == shown.split(), shown)


def test_rows_that_the_page_has_are_not_sent_again_and_time_goes_on(browser: Browser, serve: Callable) -> None:
    serve(past=60.0)
    text_is(browser, "#status-text", "ready")
    first = browser.run("return [store.steps.at(-1)[0], [...store.band.rows.keys()].at(-1), store.series.length]")
    until(lambda: browser.run("return store.steps.at(-1)[0]") > first[0] + 20, "new steps")
    until(lambda: browser.run("return [...store.band.rows.keys()].at(-1)") > first[1] + 8, "new rows of the band")
    steps = browser.run("return store.steps.map((step) => step[0])")
    assert steps == list(range(steps[0], steps[-1] + 1))
    sizes = browser.run("return performance.getEntriesByType('resource').map((entry) => entry.encodedBodySize)")
    assert sizes[0] > 5 * min(sizes) > 0


def test_the_time_shown_can_be_chosen(browser: Browser, serve: Callable) -> None:
    serve(past=400.0)
    text_is(browser, "#status-text", "ready")
    browser.click("#range label:nth-of-type(3)")
    until(lambda: browser.run("return store.data.seconds") == 300, "five minutes")
    assert browser.run("return store.band.rows.size") > 500
    browser.click("#range label:nth-of-type(1)")
    until(lambda: browser.run("return store.data.seconds") == 60, "one minute")
    oldest = browser.run("return store.data.now - store.band.rows.keys().next().value * store.band.width")
    assert oldest < 64


def test_the_mouse_shows_the_values_under_it(browser: Browser, serve: Callable) -> None:
    serve(past=60.0)
    text_is(browser, "#status-text", "ready")
    browser.point_at("#band", 300, 0)
    text_has(browser, "#tip", "steps ended")
    browser.point_at("#steps", 300, 0)
    text_has(browser, "#tip", "decode tokens")
    browser.point_at("#chart-inter-token canvas", 100, 0)
    text_has(browser, "#tip", "p99")
    browser.point_at("h1", 0, 0)
    until(lambda: not browser.run("return tip.box.checkVisibility()"), "the tooltip to go")


def test_an_admin_changes_the_policy_and_sees_its_effect(browser: Browser, serve: Callable) -> None:
    server = serve(past=20.0)
    text_is(browser, "#status-text", "ready")
    use_key(browser, ADMIN_KEY)
    until(lambda: browser.run("return byId('policy-form').checkVisibility()"), "the form")
    assert browser.run("return byId('policy-threshold').value") == "256"
    browser.click("#policy-choices label:first-of-type")  # static
    browser.run("byId('policy-mode').value = '[4,1]'")
    browser.click("#policy-form button[type=submit]")
    text_is(browser, "#admin-message", "Changed to static.")
    assert server.requests == [{"name": "static", "settings": {"mode": [4, 1]}}]
    text_is(browser, "#policy-chip", "static · SP 4")
    until(lambda: browser.run("return store.steps.slice(-20).every((step) => step[3] === 0)"), "steps in SP 4 alone")
    browser.click("#policy-choices label:last-of-type")  # threshold
    browser.type("#policy-threshold", "1024")
    browser.click("#policy-form button[type=submit]")
    text_is(browser, "#policy-chip", "threshold · 1,024 tokens")
    assert browser.run("return JSON.stringify([localStorage.length, document.cookie])") == '[0,""]'


def test_the_servers_reason_is_shown_when_a_policy_is_refused(browser: Browser, serve: Callable) -> None:
    serve(past=5.0)
    text_is(browser, "#status-text", "ready")
    use_key(browser, ADMIN_KEY)
    until(lambda: browser.run("return byId('policy-form').checkVisibility()"), "the form")
    browser.run("byId('policy-threshold').removeAttribute('min')")
    browser.type("#policy-threshold", "-1")
    browser.click("#policy-form button[type=submit]")
    text_has(browser, "#admin-message", "policy.threshold_tokens -1 is not a token count")


def test_a_wrong_key_gives_no_access_and_is_not_kept(browser: Browser, serve: Callable) -> None:
    serve(past=5.0)
    text_is(browser, "#status-text", "ready")
    use_key(browser, "guess")
    text_has(browser, "#admin-message", "the admin key is missing or wrong")
    assert not browser.run("return byId('policy-form').checkVisibility()")
    assert ADMIN_KEY not in browser.run("return JSON.stringify(sessionStorage)")
    assert browser.run("return sessionStorage.getItem('ulysses-infer-admin-key')") is None


def test_draining_takes_two_clicks(browser: Browser, serve: Callable) -> None:
    server = serve(past=5.0)
    text_is(browser, "#status-text", "ready")
    use_key(browser, ADMIN_KEY)
    until(lambda: browser.run("return byId('policy-form').checkVisibility()"), "the form")
    browser.click("#drain")
    text_is(browser, "#drain", "Really drain?")
    assert not server.drained
    browser.click("#drain")
    text_has(browser, "#status-text", "draining")
    assert server.drained


def test_a_server_with_a_key_shows_its_data_to_those_who_have_it(browser: Browser, serve: Callable) -> None:
    serve(past=5.0, api_key="clients-key")
    text_is(browser, "#status-text", "key required")
    use_key(browser, "clients-key")
    text_is(browser, "#status-text", "ready")
    text_is(browser, "#policy-chip", "threshold · 256 tokens")


def test_a_dead_engine_and_an_unreachable_server_are_distinguished(browser: Browser, serve: Callable) -> None:
    server = serve(past=5.0)
    text_is(browser, "#status-text", "ready")
    server.observatory.on_dead("rank 2 was killed by signal 9")
    text_is(browser, "#status-text", "dead")
    text_has(browser, "#notice", "rank 2 was killed by signal 9")
    server.stop()
    text_is(browser, "#status-text", "connection lost")


def test_names_with_markup_in_them_stay_text(browser: Browser, serve: Callable) -> None:
    name = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    server = serve(past=1.0, model=name)
    text_is(browser, "#model", name)
    server.observatory.on_dead("<b>bold</b>")
    text_has(browser, "#notice", "<b>bold</b>")
    assert browser.run("return document.querySelectorAll('img').length") == 0


def test_the_page_sends_requests_to_its_own_server_only(browser: Browser, serve: Callable) -> None:
    serve(past=1.0)
    text_is(browser, "#status-text", "ready")
    names = browser.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    origin = browser.run("return location.origin")
    assert names
    assert all(name.startswith(origin) for name in names)


def test_both_colour_schemes_are_drawn(browser: Browser, serve: Callable) -> None:
    serve(past=10.0)
    text_is(browser, "#status-text", "ready")
    shades = {}
    for scheme in ("dark", "light"):
        browser.prefer(color_scheme=scheme)
        time.sleep(0.2)
        color = browser.run("return getComputedStyle(document.body).backgroundColor")
        shades[scheme] = json.loads(color.replace("rgb(", "[").replace(")", "]"))[0]
        until(lambda: browser.run(COUNT_COLOR, "#band", "--tp") > 50, "the band in the scheme's colours")
    assert shades["dark"] < 40 < 200 < shades["light"]
