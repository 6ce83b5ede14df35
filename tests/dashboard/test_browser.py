"""The real server, a real browser, and a thread that plays the trainer through the store.

Started by the command line that `entropy-monitor dashboard` uses.
"""

from __future__ import annotations

import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Browser, Page, expect

from entropy_dashboard import server
from entropy_monitor.store import acknowledge, list_acknowledgements, list_commands
from entropy_monitor.types import Acknowledgement

from ..chromium import launched
from .synthetic_run import SyntheticRun

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.browser

TOKEN = "sesame"
PATIENCE_MS = 20_000
HOSTILE = "<img src=x onerror=alert(1)> ![i](http://x.example/i.png) loss spike"


class PlayedTrainer(threading.Thread):
    """Trains, beats and obeys, as a trainer with `steer=True` does."""

    def __init__(self, run: SyntheticRun) -> None:
        super().__init__(daemon=True)
        self.made = run
        self._stop_event = threading.Event()

    def run(self) -> None:
        answered = 0
        while not self._stop_event.wait(0.3):
            for command in list_commands(self.made.run.objects, answered + 1):
                answered = int(command.command_id)
                self.made.phase = command.phase if command.phase != "auto" else self.made.phase
                step = self.made.step
                ack = Acknowledgement(command_id=command.command_id, rank=0, step=step, status="applied", detail="")
                acknowledge(self.made.run.objects, answered, ack)
            self.made.train(20)
            self.made.heartbeats()

    def stop(self) -> None:
        self._stop_event.set()
        self.join()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlayedTrainer]:
    made = SyntheticRun(tmp_path_factory.mktemp("runs") / "e2e", num_layers=6)
    made.train(400)
    made.event(100, "alert", HOSTILE)
    made.heartbeats()
    played = PlayedTrainer(made)
    played.start()
    yield played
    played.stop()


@pytest.fixture(scope="module")
def url(trainer: PlayedTrainer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **server.environment(trainer.made.path.parent),
        "ENTROPY_MONITOR_OPERATOR_TOKEN": TOKEN,
        "ENTROPY_MONITOR_REFRESH_S": "0.5",
    }
    log: Path = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(server.command(port=port), env=environment, stdout=output, stderr=output)
        try:
            _wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/_stcore/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as opened:
        yield opened


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """A fresh session on the Live page, whose console and requests are judged in the end."""
    opened = browser.new_page(viewport={"width": 1440, "height": 1000})
    opened.set_default_timeout(PATIENCE_MS)
    errors: list[str] = []
    outside: list[str] = []
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("dialog", lambda dialog: (errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    opened.on("request", lambda request: _note_outside(request.url, url, outside))
    opened.goto(f"{url}/?run=e2e")
    expect(opened.locator(".st-key-chart_entropy canvas")).to_be_visible(timeout=PATIENCE_MS)
    yield opened
    opened.close()
    assert errors == []
    assert outside == []


def _note_outside(requested: str, url: str, outside: list[str]) -> None:
    if not requested.startswith((url, url.replace("http", "ws"), "data:", "blob:")):
        outside.append(requested)


def badge(page: Page, words: str):
    return page.locator(".st-key-badges").get_by_text(re.compile(words))


def test_a_command_makes_its_round(page: Page, trainer: PlayedTrainer):
    objects = trainer.made.run.objects
    before = len(list_commands(objects))
    compress = page.locator(".st-key-command_compress button")
    expect(compress).to_be_disabled()
    page.locator(".st-key-unlock button").click()
    page.locator(".st-key-operator_name_field input").fill("ada")
    page.locator(".st-key-operator_token_field input").fill("wrong")
    page.locator(".st-key-operator_token_field input").press("Enter")
    expect(page.get_by_text("That is not the token")).to_be_visible(timeout=PATIENCE_MS)
    page.locator(".st-key-operator_token_field input").fill(TOKEN)
    page.locator(".st-key-operator_token_field input").press("Enter")
    expect(compress).to_be_enabled(timeout=PATIENCE_MS)
    compress.click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible(timeout=PATIENCE_MS)
    page.locator(".st-key-send button").click()
    expect(dialog.get_by_text("Give a reason")).to_be_visible(timeout=PATIENCE_MS)
    assert len(list_commands(objects)) == before
    page.locator(".st-key-reason input").fill("entropy plateau")
    page.locator(".st-key-weight input").fill("0.05")
    page.locator(".st-key-send button").click()
    expect(dialog).to_be_hidden(timeout=PATIENCE_MS)
    last = page.locator(".st-key-last_command")
    expect(last.get_by_text(re.compile(r"applied at step [\d,]+ by rank 0"))).to_be_visible(timeout=PATIENCE_MS)
    expect(badge(page, "Phase: compress")).to_be_visible(timeout=PATIENCE_MS)
    command = list_commands(objects)[-1]
    assert (command.phase, command.weight, command.reason) == ("compress", 0.05, "entropy plateau")
    assert any(ack.command_id == command.command_id for ack in list_acknowledgements(objects))


def test_charts_change_while_rows_arrive(page: Page):
    for key in ("chart_loss", "chart_entropy", "chart_alignment"):
        canvas = page.locator(f".st-key-{key} canvas")
        expect(canvas).to_be_visible(timeout=PATIENCE_MS)
        canvas.evaluate("(canvas) => { window.before = canvas.toDataURL(); }")
        changed = "(key) => document.querySelector(`.st-key-${key} canvas`).toDataURL() !== window.before"
        page.wait_for_function(changed, arg=key, timeout=PATIENCE_MS)


def test_charts_keep_their_canvas(page: Page):
    """A remounted chart would flicker with every refresh."""
    canvas = page.locator(".st-key-chart_loss canvas")
    canvas.evaluate("(canvas) => { window.kept = canvas; window.before = canvas.toDataURL(); }")
    page.wait_for_function("() => window.kept.toDataURL() !== window.before", timeout=PATIENCE_MS)
    assert page.evaluate("() => window.kept.isConnected")


def test_text_from_a_run_stays_text(page: Page):
    expect(page.locator(".st-key-events").get_by_text("<img src=x onerror=alert(1)>")).to_be_visible(
        timeout=PATIENCE_MS
    )
    assert page.locator(".st-key-events img").count() == 0


def test_a_phone_shows_everything_without_sideways_scrolling(page: Page):
    page.set_viewport_size({"width": 390, "height": 844})
    expect(page.locator(".st-key-chart_alignment canvas")).to_be_visible(timeout=PATIENCE_MS)
    narrow = "() => document.querySelector('.stMain').scrollWidth <= 390 && document.body.scrollWidth <= 390"
    page.wait_for_function(narrow, timeout=PATIENCE_MS)
    overflowing = page.evaluate(
        "() => [...document.querySelectorAll('.stMain canvas, .stMain button, .stMain [data-testid=stMetric]')]"
        ".filter((e) => e.offsetParent && e.getBoundingClientRect().right > 391).length"
    )
    assert overflowing == 0
    page.locator(".st-key-command_compress").scroll_into_view_if_needed()
    expect(page.locator(".st-key-command_compress button")).to_be_visible()


def test_the_page_stands_still_when_live_is_off(page: Page):
    page.locator(".st-key-live label").first.click()
    unchanged_for_two_seconds = """() => {
        const text = document.querySelector('.st-key-badges').innerText;
        if (text !== window.seen) { window.seen = text; window.since = Date.now(); }
        return Date.now() - window.since > 2000;
    }"""
    page.wait_for_function(unchanged_for_two_seconds, timeout=PATIENCE_MS)


def test_a_dark_page_starts_with_its_layers_chosen(browser: Browser, url: str, trainer: PlayedTrainer):
    """A dark viewer's first run is cut short when the theme becomes known; the choice must survive that."""
    opened = browser.new_page(viewport={"width": 1440, "height": 1000}, color_scheme="dark")
    opened.goto(url)
    expect(opened.locator(".st-key-chart_alignment canvas")).to_be_visible(timeout=PATIENCE_MS)
    chosen = opened.locator(".st-key-oscillation").get_by_test_id("stMultiSelect")
    for name in ("h.1", "h.3", "h.5"):
        expect(chosen).to_contain_text(name, timeout=PATIENCE_MS)
    opened.close()
