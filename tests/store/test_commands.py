"""The control channel: numbered once, applied at most once, refused with a reason."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_monitor.store import (
    CommandRequest,
    acknowledge,
    acknowledged_numbers,
    create_run,
    issue_command,
    last_command,
    list_acknowledgements,
    list_commands,
    parse_command,
    read_acknowledgement,
    read_command_bytes,
    read_status,
    refusal,
)
from entropy_monitor.store.layout import command_key
from entropy_monitor.types import Acknowledgement, Command

if TYPE_CHECKING:
    from pathlib import Path

KEY = "a secret"
REQUEST = CommandRequest(phase="compress", reason="CE has stalled", issued_by="cli:ada", weight=0.1)

VALID = {
    "command_id": "00000001",
    "phase": "compress",
    "weight": 0.1,
    "reason": "why",
    "issued_by": "cli:ada",
    "issued_at": 100.0,
    "expires_after_s": 300.0,
    "signature": None,
}


def encoded(**changes: Any) -> bytes:
    return json.dumps({**VALID, **changes}).encode()


NASTY = {
    "nothing": b"",
    "no json": b"{",
    "no utf-8": b"\xff\xfe{}",
    "null": b"null",
    "a number": b"1",
    "a list": b"[]",
    "a text": b'"compress"',
    "an empty object": b"{}",
    "deeply nested": b"[" * 200_000,
    "a deeply nested field": b'{"phase":' * 100_000,
    "an endless number": b'{"weight": ' + b"9" * 5000 + b"}",
    "a field too many": encoded(sudo=True),
    "another phase": encoded(phase="explode"),
    "a phase list": encoded(phase=["compress"]),
    "phase null": encoded(phase=None),
    "weight text": encoded(weight="0.1"),
    "weight true": encoded(weight=True),
    "weight list": encoded(weight=[0.1]),
    "weight negative": encoded(weight=-0.1),
    "weight nan": encoded(weight=float("nan")),
    "weight infinite": encoded(weight=float("inf")),
    "weight huge": encoded(weight=10**400),
    "issued_at text": encoded(issued_at="100.0"),
    "issued_at null": encoded(issued_at=None),
    "issued_at nan": encoded(issued_at=float("nan")),
    "issued_at infinite": encoded(issued_at=float("inf")),
    "issued_at huge": encoded(issued_at=10**400),
    "issued_at true": encoded(issued_at=True),
    "expiry text": encoded(expires_after_s="300"),
    "expiry zero": encoded(expires_after_s=0),
    "expiry negative": encoded(expires_after_s=-1),
    "expiry nan": encoded(expires_after_s=float("nan")),
    "expiry huge": encoded(expires_after_s=10**400),
    "reason empty": encoded(reason="  "),
    "reason number": encoded(reason=5),
    "reason long": encoded(reason="x" * 301),
    "issued_by number": encoded(issued_by=5),
    "issued_by null": encoded(issued_by=None),
    "id number": encoded(command_id=1),
    "id text": encoded(command_id="x"),
    "id short": encoded(command_id="1"),
    "id in other digits": encoded(command_id="٠٠٠٠٠٠٠١"),
    "signature number": encoded(signature=5),
    "signature accented": encoded(signature="é" * 64),
    "signature half a surrogate": encoded(signature="\ud800"),
    "signature short": encoded(signature="ab"),
}


@pytest.mark.parametrize("name", NASTY)
def test_a_malformed_command_is_refused_in_one_line_and_blocks_nobody(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"^malformed command: ") as caught:
        parse_command(NASTY[name])
    assert type(caught.value) is ValueError
    run = create_run(tmp_path)
    run.objects.put(command_key(1), NASTY[name])
    second = issue_command(run.objects, run.run_id, REQUEST)
    assert second.command_id == "00000002"
    assert list_commands(run.objects) == [second]
    assert read_status(run).commands_pending == 1


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists), st.sampled_from(sorted(VALID)))
def test_no_value_in_no_field_ends_in_another_exception(value: Any, field: str) -> None:
    """Whatever is parsed can also be judged, with a key and without."""
    try:
        command = parse_command(encoded(**{field: value}))
    except ValueError:
        return
    for key in (None, KEY):
        refused = refusal(command, 1, "run", key, 150.0)
        assert refused is None or refused[0] in {"rejected", "expired"}


def test_a_command_is_stored_as_it_was_issued(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    command = issue_command(run.objects, run.run_id, replace(REQUEST, reason="  CE has stalled \n"), now=12.5)
    assert asdict(command) == {
        **VALID,
        "reason": "CE has stalled",
        "issued_at": 12.5,
    }
    value = read_command_bytes(run.objects, 1)
    assert value is not None
    assert parse_command(value) == command
    assert run.commands() == list_commands(run.objects) == [command]
    assert read_command_bytes(run.objects, 2) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"phase": "explode"}, "memorize, compress or auto"),
        ({"reason": " "}, "expected a reason"),
        ({"reason": "x" * 301}, "at most 300"),
        ({"weight": -1.0}, "finite weight"),
        ({"weight": float("nan")}, "finite weight"),
        ({"expires_after_s": 0.0}, "expiry"),
        ({"expires_after_s": float("inf")}, "expiry"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_written(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CommandRequest(**{**asdict(REQUEST), **changes})


# ---- judging ---------------------------------------------------------------------------------------------------------


def issued(tmp_path: Path, key: str | None = None) -> tuple[Command, str]:
    """A command read back from its file, and its run's id."""
    run = create_run(tmp_path)
    issue_command(run.objects, run.run_id, REQUEST, now=100.0, key=key)
    value = read_command_bytes(run.objects, 1)
    assert value is not None
    return parse_command(value), run.run_id


@pytest.mark.parametrize("key", [None, KEY])
def test_a_command_expires_exactly_when_it_says(tmp_path: Path, key: str | None) -> None:
    command, run_id = issued(tmp_path, key)
    assert refusal(command, 1, run_id, key, 400.0) is None
    assert refusal(command, 1, run_id, key, 0.0) is None  # the clocks disagree: not our business
    status, detail = refusal(command, 1, run_id, key, 402.5) or ("", "")
    assert (status, detail) == ("expired", "delivered 2.5 s after it expired: send it again")


def test_a_run_with_a_key_takes_signed_commands_only(tmp_path: Path) -> None:
    command, run_id = issued(tmp_path, KEY)
    assert refusal(command, 1, run_id, KEY, 100.0) is None
    for forged, words in (
        (replace(command, signature=None), "unsigned"),
        (replace(command, signature="0" * 64), "bad signature"),
    ):
        status, detail = refusal(forged, 1, run_id, KEY, 100.0) or ("", "")
        assert status == "rejected"
        assert words in detail
    assert refusal(command, 1, run_id, "another key", 100.0) is not None
    assert refusal(command, 1, run_id, None, 100.0) is None  # a run without a key does not look


@pytest.mark.parametrize(
    "change",
    [
        {"phase": "memorize"},
        {"weight": 0.2},
        {"weight": None},
        {"reason": "CE has stalled."},
        {"issued_by": "cli:eve"},
        {"issued_at": 101.0},
        {"expires_after_s": 1e6},
    ],
)
def test_no_field_can_be_tampered_with(tmp_path: Path, change: dict[str, Any]) -> None:
    command, run_id = issued(tmp_path, KEY)
    refused = refusal(replace(command, **change), 1, run_id, KEY, 100.0)
    assert refused == ("rejected", "bad signature: the sender's ENTROPY_MONITOR_KEY is not this run's")


def test_a_command_copied_to_another_number_or_run_is_refused_and_not_listed(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    command = issue_command(run.objects, run.run_id, REQUEST, now=100.0, key=KEY)
    value = read_command_bytes(run.objects, 1)
    assert value is not None
    run.objects.put(command_key(2), value)
    refused = refusal(parse_command(value), 2, run.run_id, KEY, 100.0)
    assert refused == ("rejected", "expected command 00000002; found 00000001: it was copied")
    assert list_commands(run.objects) == [command]
    assert refusal(replace(command, command_id="00000002"), 2, run.run_id, KEY, 100.0) is not None
    assert refusal(command, 1, "another run", KEY, 100.0) is not None


# ---- concurrency -----------------------------------------------------------------------------------------------------

ISSUER = """
import sys
from entropy_monitor.store import CommandRequest, issue_command, open_run
run = open_run(sys.argv[1])
request = CommandRequest(phase="compress", reason="storm", issued_by=f"issuer:{sys.argv[2]}")
print("ready", flush=True)
sys.stdin.readline()
for _ in range(25):
    print(issue_command(run.objects, run.run_id, request).command_id)
"""

ANSWERER = """
import sys
from entropy_monitor.store import acknowledge, open_run
from entropy_monitor.types import Acknowledgement
run = open_run(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(1, 101):
    for rank in range(2):
        ack = Acknowledgement(command_id=f"{number:08d}", rank=rank, step=1, status="applied", detail=sys.argv[2])
        if acknowledge(run.objects, number, ack):
            print(number, rank)
"""


def all_at_once(script: str, run_dir: Path, count: int) -> list[list[str]]:
    """Run a script in several real processes that begin together; returns what each printed."""
    command = [sys.executable, "-c", script, str(run_dir)]
    processes = [
        subprocess.Popen([*command, str(index)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for index in range(count)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outputs = [[] for _ in processes]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for index, process in enumerate(processes):
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        outputs[index] = output.split("\n")[:-1]
    return outputs


def test_eight_processes_never_give_two_commands_one_number(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    outputs = all_at_once(ISSUER, tmp_path, 8)
    ids = [int(number) for output in outputs for number in output]
    assert sorted(ids) == list(range(1, 201))
    for index, output in enumerate(outputs):
        assert output == sorted(output)
        stored = [
            command.command_id for command in list_commands(run.objects) if command.issued_by == f"issuer:{index}"
        ]
        assert stored == output
    assert last_command(run.objects) == 200


def test_four_processes_answer_each_command_once_for_each_rank(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    outputs = all_at_once(ANSWERER, tmp_path, 4)
    won = [tuple(map(int, line.split())) for output in outputs for line in output]
    assert sorted(won) == [(number, rank) for number in range(1, 101) for rank in range(2)]
    acks = {(int(ack.command_id), ack.rank): int(ack.detail) for ack in list_acknowledgements(run.objects)}
    assert acks == {
        key: index for index, output in enumerate(outputs) for key in [tuple(map(int, o.split())) for o in output]
    }


def test_the_first_answer_stands(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    command = issue_command(run.objects, run.run_id, REQUEST)
    first = Acknowledgement(command_id=command.command_id, rank=1, step=5, status="applied", detail="compress")
    assert acknowledge(run.objects, 1, first)
    assert not acknowledge(run.objects, 1, replace(first, step=6, status="rejected"))
    assert read_acknowledgement(run.objects, 1, 1) == first
    assert read_acknowledgement(run.objects, 1, 0) is None
    assert run.acknowledgements() == [first]
    assert (acknowledged_numbers(run.objects, 1), acknowledged_numbers(run.objects, 0)) == ({1}, set())


def test_an_unanswered_command_is_visible_until_it_expires(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    issue_command(run.objects, run.run_id, REQUEST, now=time.time())
    issue_command(run.objects, run.run_id, REQUEST, now=time.time() - 1000)
    assert read_status(run).commands_pending == 1
    assert read_status(run, now=time.time() + 1000).commands_pending == 0
