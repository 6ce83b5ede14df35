"""What ``/proc`` tells of a process, without touching it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from entropy_monitor.errors import NoSuchProcessError

STOPPED = "T"
ZOMBIE = "ZX"


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process, at the moment it was looked at."""

    pid: int
    name: str
    state: str
    """One letter, as in ``ps``: R, S, D, T (stopped), t (traced), Z (zombie)."""
    parent: int
    uid: int
    """Effective user: files that the process makes belong to it."""
    gid: int
    inner_pid: int
    """What ``os.getpid()`` says inside, which in a container is another number."""
    inner_uid: int
    """What ``os.getuid()`` says inside."""
    tracer: int
    """The process that traces this one, or 0."""
    shadow_stack: bool
    """Returns are checked by the processor, so that no call can be laid upon the stack from outside."""

    @property
    def root(self) -> Path:
        """The process's own view of the file system."""
        return Path(f"/proc/{self.pid}/root")


def read_process(pid: int) -> Process:
    """Look at a process.

    Args:
        pid: process id, in our own numbering.

    Returns:
        What was found.

    Raises:
        NoSuchProcessError: there is none of this number.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
        real_uid = int(_fields(lines)["Uid"].split()[0])
        inner_uid = _inner_uid(pid, real_uid)
    except (FileNotFoundError, ProcessLookupError):
        raise NoSuchProcessError(
            f"expected a running process; found none with pid {pid}: look the job up with ps or nvidia-smi"
        ) from None
    status = _fields(lines)
    if (leader := int(status["Tgid"])) != pid:
        raise NoSuchProcessError(f"expected a process; found {pid}, a thread of process {leader}: give {leader}")
    return Process(
        pid=pid,
        name=status["Name"],
        state=status["State"][0],
        parent=int(status["PPid"]),
        uid=int(status["Uid"].split()[1]),
        gid=int(status["Gid"].split()[1]),
        inner_pid=int(status.get("NSpid", str(pid)).split()[-1]),
        inner_uid=inner_uid,
        tracer=int(status["TracerPid"]),
        shadow_stack="shstk" in status.get("x86_Thread_features", ""),
    )


def _fields(lines: list[str]) -> dict[str, str]:
    pairs = (line.partition(":") for line in lines)
    return {name: value.strip() for name, _, value in pairs}


def _inner_uid(pid: int, uid: int) -> int:
    """Translate a user of ours into the numbering of the process's user namespace."""
    for line in Path(f"/proc/{pid}/uid_map").read_text(encoding="ascii").splitlines():
        inside, outside, count = map(int, line.split())
        if outside <= uid < outside + count:
            return uid - outside + inside
    return uid


def read_environ(pid: int) -> dict[str, str]:
    """The environment that a process was started with; what it set itself is not seen.

    Returns:
        Names and values.
    """
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", errors="surrogateescape").split("\0")
    return {name: value for name, _, value in (entry.partition("=") for entry in entries) if name}


def executable(pid: int) -> str | None:
    """The program that a process runs.

    Returns:
        Its path, or None for a kernel thread, a zombie, or a process whose program we may not see.
    """
    try:
        return str(Path(f"/proc/{pid}/exe").readlink()).removesuffix(" (deleted)")
    except OSError:
        return None


def temporary_directories(environ: dict[str, str]) -> list[str]:
    """Where ``tempfile`` looks for a temporary directory in a process with this environment, in that order.

    Returns:
        Absolute paths, as the process sees them.
    """
    chosen = [environ.get(name, "") for name in ("TMPDIR", "TEMP", "TMP")]
    return [path for path in [*chosen, "/tmp", "/var/tmp", "/usr/tmp"] if path.startswith("/")]


def blocking_call(pid: int) -> int | None:
    """The system call in which the main thread waits.

    Returns:
        Its number, or None if it computes, or we may not see.
    """
    try:
        number = Path(f"/proc/{pid}/syscall").read_text(encoding="ascii").split()[0]
    except OSError:
        return None
    return int(number) if number.isdecimal() else None


def where_blocked(pid: int) -> str:
    """What the main thread does, for a message.

    Returns:
        A few words.
    """
    call = blocking_call(pid)
    return "its main thread is busy" if call is None else f"its main thread waits in system call {call}"
