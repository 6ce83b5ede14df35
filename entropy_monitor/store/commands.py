"""The control channel: numbered commands and one acknowledgement of each rank, all by conditional create.

A command's number is its id and is signed with it, so a copied command file is refused at any other number.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, get_args

from entropy_monitor.store import layout
from entropy_monitor.store.objects import encode_json
from entropy_monitor.types import Acknowledgement, AckStatus, Command, CommandPhase

if TYPE_CHECKING:
    from entropy_monitor.store.objects import Objects

DEFAULT_EXPIRY_S = 300.0
MAX_REASON_LENGTH = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRequest:
    """What somebody wants the trainer to do, before it has a number."""

    phase: CommandPhase
    reason: str
    issued_by: str
    weight: float | None = None
    expires_after_s: float = DEFAULT_EXPIRY_S

    def __post_init__(self) -> None:
        if self.phase not in get_args(CommandPhase):
            raise ValueError(f"expected phase memorize, compress or auto; found {self.phase!r}")
        if not self.reason.strip():
            raise ValueError("expected a reason; found an empty text: say in a few words why the phase is switched")
        if len(self.reason) > MAX_REASON_LENGTH:
            raise ValueError(f"expected a reason of at most {MAX_REASON_LENGTH} characters; found {len(self.reason)}")
        if self.weight is not None and not 0 <= self.weight < float("inf"):
            raise ValueError(f"expected a finite weight >= 0; found {self.weight}: leave it out for the default")
        if not 0 < self.expires_after_s < float("inf"):
            raise ValueError(f"expected an expiry of more than 0 s; found {self.expires_after_s}")


def issue_command(
    objects: Objects, run_id: str, request: CommandRequest, *, now: float | None = None, key: str | None = None
) -> Command:
    """Give a request the next free number, sign it if there is a key, and publish it.

    Args:
        objects: the run's objects.
        run_id: the run's id, part of what is signed.
        request: what to command.
        now: Unix time; the clock's when None.
        key: secret shared with the trainer (``ENTROPY_MONITOR_KEY``).

    Returns:
        The command as stored.
    """
    issued_at = time.time() if now is None else now
    number = last_command(objects) + 1
    while True:
        command = Command(
            command_id=f"{number:08d}",
            phase=request.phase,
            weight=request.weight,
            reason=request.reason.strip(),
            issued_by=request.issued_by,
            issued_at=issued_at,
            expires_after_s=request.expires_after_s,
        )
        if key:
            command = replace(command, signature=sign(command, run_id, key))
        if objects.create_json(layout.command_key(number), asdict(command)):
            return command
        number += 1


def sign(command: Command, run_id: str, key: str) -> str:
    """HMAC-SHA256 over the canonical JSON of all fields but the signature, and the run id.

    Returns:
        The signature, hexadecimal.
    """
    fields = {**asdict(command), "run_id": run_id}
    del fields["signature"]
    return hmac.new(key.encode(), encode_json(fields), hashlib.sha256).hexdigest()


def refusal(command: Command, number: int, run_id: str, key: str | None, now: float) -> tuple[AckStatus, str] | None:
    """Judge a command that was just read.

    Args:
        command: the command.
        number: the number in its file's name.
        run_id: the run it was read from.
        key: the run's secret, or None when it has none.
        now: Unix time.

    Returns:
        None when it may be applied, else the status and detail of the acknowledgement that says why not.
    """
    if command.command_id != f"{number:08d}":
        return "rejected", f"expected command {number:08d}; found {command.command_id}: it was copied"
    if key and command.signature is None:
        return "rejected", "unsigned: this run has a key; set ENTROPY_MONITOR_KEY where the command is sent from"
    if key and not hmac.compare_digest(command.signature or "", sign(command, run_id, key)):
        return "rejected", "bad signature: the sender's ENTROPY_MONITOR_KEY is not this run's"
    if now > command.issued_at + command.expires_after_s:
        late_s = now - command.issued_at - command.expires_after_s
        return "expired", f"delivered {late_s:.1f} s after it expired: send it again"
    return None


def parse_command(value: bytes) -> Command:
    """Read a command's file.

    Returns:
        The command.

    Raises:
        ValueError: it is malformed; the message says where.
    """
    try:
        command = Command(**json.loads(value))
        CommandRequest(
            phase=command.phase,
            reason=command.reason,
            issued_by=command.issued_by,
            weight=command.weight,
            expires_after_s=command.expires_after_s,
        )
        _check_types(command)
    # A deeply nested file ends in a RecursionError, an absurdly long number in an OverflowError.
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"malformed command: {error}") from error
    return command


def _check_types(command: Command) -> None:
    """Refuse what would fail later, where the command is judged, applied or listed.

    Raises:
        TypeError: a field is of another type.
        ValueError: a number is not finite, or an id or a signature is none.
    """
    for name in ("weight", "issued_at", "expires_after_s"):
        value = getattr(command, name)
        if name == "weight" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"expected a number as {name}; found {value!r}")
        if not math.isfinite(float(value)):
            raise ValueError(f"expected a finite {name}; found {value}")
    for name, pattern in (("command_id", r"[0-9]{8,}"), ("issued_by", r"(?s).*"), ("signature", r"[0-9a-f]{64}")):
        value = getattr(command, name)
        if name == "signature" and value is None:
            continue
        if not isinstance(value, str):
            raise TypeError(f"expected a text as {name}; found {value!r}")
        if not re.fullmatch(pattern, value):
            raise ValueError(f"expected {name} like {pattern}; found {value[:80]!r}")


def read_command_bytes(objects: Objects, number: int) -> bytes | None:
    """Read one command's file.

    Returns:
        Its bytes, for `parse_command`; None when there is no command of this number.
    """
    return objects.get(layout.command_key(number))


def list_commands(objects: Objects, first: int = 1) -> list[Command]:
    """Commands from number `first` on; malformed and copied ones are left out (the trainer's answer tells of them).

    Returns:
        The commands, oldest first.
    """
    commands = [read_command(objects, number) for number in command_numbers(objects) if number >= first]
    return [command for command in commands if command is not None]


def read_command(objects: Objects, number: int) -> Command | None:
    """Read one command.

    Returns:
        The command, or None when there is none of this number, or one that is malformed or copied.
    """
    value = read_command_bytes(objects, number)
    try:
        command = None if value is None else parse_command(value)
    except ValueError:
        return None
    return command if command is not None and int(command.command_id) == number else None


def last_command(objects: Objects) -> int:
    """Number of the newest command, 0 when there is none.

    Returns:
        The number.
    """
    return max([0, *command_numbers(objects)])


def command_numbers(objects: Objects) -> list[int]:
    """Numbers of all commands, ascending."""
    return layout.numbers(objects.children("control/commands"), r"(\d{8,})\.json")


def acknowledge(objects: Objects, number: int, ack: Acknowledgement) -> bool:
    """Publish a rank's answer to a command.

    Returns:
        False when this rank has answered before; then the command must not be applied (again).
    """
    return objects.create_json(layout.ack_key(number, ack.rank), asdict(ack))


def read_acknowledgement(objects: Objects, number: int, rank: int) -> Acknowledgement | None:
    """One rank's answer to one command.

    Returns:
        The acknowledgement, or None while there is none that can be read.
    """
    try:
        return Acknowledgement(**(objects.get_json(layout.ack_key(number, rank)) or {}))
    except TypeError:  # absent, damaged, or of another version
        return None


def list_acknowledgements(objects: Objects) -> list[Acknowledgement]:
    """Every acknowledgement.

    Returns:
        The acknowledgements, by command and rank.
    """
    names = (re.fullmatch(r"(\d{8,})\.r(\d{5,})\.json", name) for name in objects.children("control/acks"))
    acks = [read_acknowledgement(objects, int(match[1]), int(match[2])) for match in names if match]
    return [ack for ack in acks if ack is not None]


def acknowledged_numbers(objects: Objects, rank: int) -> set[int]:
    """Commands that a rank has answered.

    Returns:
        Their numbers.
    """
    return set(layout.numbers(objects.children("control/acks"), rf"(\d{{8,}})\.{layout.rank_name(rank)}\.json"))
