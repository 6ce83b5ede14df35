"""The whole loop with nothing played: demo, real browser, real trainer, and nothing left running."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect

from entropy_monitor import open_run

from .chromium import PATIENCE_MS, launched

TOKEN = "sesame-of-the-test"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes_naming(text: str) -> list[str]:
    """Command lines of living processes that hold a text in their arguments or their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = ((entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()).decode(errors="replace")
            except OSError:
                continue
            if text in line:
                found.append(line)
    return found


def until(true, what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_operator_switches_the_phase_of_the_demo_in_the_browser(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROPY_MONITOR_OPERATOR_TOKEN", TOKEN)
    run, port = tmp_path / "demo", free_port()
    arguments = ["demo", "--steps", "5000", "--run", str(run), "--port", str(port)]
    with (tmp_path / "out").open("w") as output:
        demo = subprocess.Popen([sys.executable, "-m", "entropy_monitor", *arguments], stdout=output, stderr=output)
    try:
        until(lambda: (run / "store.zarr/metrics/s000000/source/c.0.0").exists(), "the first metrics")
        with launched() as browser:
            page = browser.new_page(viewport={"width": 1440, "height": 1000})
            page.set_default_timeout(PATIENCE_MS)
            until(lambda: _opens(page, f"http://127.0.0.1:{port}"), "the dashboard")
            chart = page.locator(".st-key-chart_entropy canvas")
            expect(chart).to_be_visible(timeout=PATIENCE_MS)
            page.locator(".st-key-unlock button").click()
            page.locator(".st-key-operator_token_field input").fill(TOKEN)
            page.locator(".st-key-operator_token_field input").press("Enter")
            compress = page.locator(".st-key-command_compress button")
            expect(compress).to_be_enabled(timeout=PATIENCE_MS)
            chart.evaluate("(canvas) => { window.before = canvas.toDataURL(); }")
            compress.click()
            page.locator(".st-key-reason input").fill("to see it fall")
            page.locator(".st-key-send button").click()
            answer = page.locator(".st-key-last_command").get_by_text(re.compile(r"applied at step [\d,]+ by rank 0"))
            expect(answer).to_be_visible(timeout=PATIENCE_MS)
            expect(page.locator(".st-key-badges").get_by_text("Phase: compress")).to_be_visible(timeout=PATIENCE_MS)
            changed = "() => document.querySelector('.st-key-chart_entropy canvas').toDataURL() !== window.before"
            page.wait_for_function(changed, timeout=PATIENCE_MS)
        opened = open_run(run)
        command = opened.commands()[-1]
        assert (command.phase, command.reason) == ("compress", "to see it fall")
        assert command.signature is not None
        answers = [ack for ack in opened.acknowledgements() if ack.command_id == command.command_id]
        assert [ack.status for ack in answers] == ["applied"]
    finally:
        demo.send_signal(signal.SIGINT)
        code = demo.wait(60)
    assert code == 0, (tmp_path / "out").read_text()
    assert processes_naming(str(run)) == []


def _opens(page, url: str) -> bool:
    try:
        page.goto(url)
    except Exception:
        return False
    return True
