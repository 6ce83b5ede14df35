"""The server's command line: hardened, and closed to others without a token."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from entropy_dashboard import server
from entropy_dashboard.settings import RUNS_DIR
from entropy_dashboard.theme import STREAMLIT_THEME
from entropy_monitor.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def flags(*args, **kwargs) -> list[str]:
    return server.command(*args, **kwargs)[5:]


def test_the_command_line_is_hardened(runs):
    found = flags(port=8777)
    for flag in (
        "--server.address=127.0.0.1",
        "--server.port=8777",
        "--server.headless=true",
        "--server.enableXsrfProtection=true",
        "--server.enableCORS=true",
        "--server.fileWatcherType=none",
        "--server.enableAgentApi=false",
        "--server.enableStaticServing=false",
        "--browser.gatherUsageStats=false",
        "--client.showErrorDetails=none",
        "--client.toolbarMode=viewer",
        "--runner.magicEnabled=false",
        "--server.allowedHosts=127.0.0.1",
        "--server.allowedHosts=localhost",
        "--server.allowedHosts=::1",
    ):
        assert flag in found
    assert "--server.allowedHosts=*" not in found


def test_every_flag_is_an_option_of_the_installed_streamlit(runs):
    from streamlit import config

    known = config.get_config_options()
    assert {flag[2:].split("=")[0] for flag in flags()} <= set(known)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_addresses_need_a_token(runs, monkeypatch, address):
    with pytest.raises(ConfigError, match=r"expected ENTROPY_MONITOR_OPERATOR_TOKEN .*; found none .*: set it"):
        server.command(address)
    monkeypatch.setenv("ENTROPY_MONITOR_OPERATOR_TOKEN", "sesame")
    assert f"--server.address={address}" in flags(address)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_none(runs, address):
    assert f"--server.address={address}" in flags(address)


def test_allowed_hosts_follow_the_address(runs, monkeypatch):
    monkeypatch.setenv("ENTROPY_MONITOR_OPERATOR_TOKEN", "sesame")
    assert not any("allowedHosts" in flag for flag in flags("0.0.0.0"))
    assert "--server.allowedHosts=192.168.1.5" in flags("192.168.1.5")
    monkeypatch.setenv("ENTROPY_MONITOR_ALLOWED_HOSTS", "train.example.org, other")
    assert {"--server.allowedHosts=train.example.org", "--server.allowedHosts=other"} <= set(flags("0.0.0.0"))


def test_the_token_is_not_on_the_command_line(runs, monkeypatch):
    monkeypatch.setenv("ENTROPY_MONITOR_OPERATOR_TOKEN", "sesame")
    assert "sesame" not in " ".join(server.command())


def test_the_environment_names_the_runs_absolutely(runs, monkeypatch):
    monkeypatch.chdir(runs)
    environment = server.environment("here")
    assert environment["ENTROPY_MONITOR_RUNS_DIR"] == str(runs / "here")
    code = "import entropy_dashboard, entropy_monitor"
    assert subprocess.run([sys.executable, "-c", code], env=environment, cwd=runs, check=False).returncode == 0


def test_a_checkout_started_by_hand_is_hardened_alike():
    """`streamlit run dashboard/app.py` takes its options from the file beside it."""
    with (ROOT / "dashboard/.streamlit/config.toml").open("rb") as file:
        options = flatten(tomllib.load(file))
    assert options == {
        "server.address": server.DEFAULT_ADDRESS,
        "server.allowedHosts": ["localhost", "127.0.0.1", "::1"],
        "server.headless": True,
        **server.HARDENING,
        **STREAMLIT_THEME,
    }


def flatten(table: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in table.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def become(code: str, runs: Path) -> str:
    """A program that serves, where the server is a line of Python."""
    return (
        "from entropy_dashboard import server\n"
        f"server.command = lambda *_, **__: [{sys.executable!r}, '-c', {code!r}]\n"
        f"server.serve({str(runs)!r})"
    )


def test_serve_becomes_the_server_so_that_nothing_is_left_when_it_is_stopped(runs):
    report = f"import os; print(os.getpid(), os.environ[{RUNS_DIR!r}]); raise SystemExit(3)"
    process = subprocess.Popen([sys.executable, "-c", become(report, runs)], stdout=subprocess.PIPE, text=True)
    said = process.communicate()[0].split()
    assert said == [str(process.pid), str(runs)]
    assert process.returncode == 3
