#!/usr/bin/env python3
"""One command from a fresh checkout: makes the project's environment on first use, then runs inside it.

    python3 run.py demo [ARGS]        entropy-monitor demo: train a small GPT, watch it, show it
    python3 run.py test               what CI runs: ruff, pyright, lint-imports, pytest
    python3 run.py test PYTEST_ARGS   pytest alone, with these arguments
    python3 run.py bench [NAME ARGS]  benchmarks/NAME.py; without a name, the list of them
    python3 run.py exec CMD...        any command, in your directory, with the environment first on PATH

The environment is .venv-run in the checkout. It needs Python >= 3.11 and pip's own configuration, nothing else, and
is made anew only when pyproject.toml, constraints.txt or the Python version changes.

    ENTROPY_MONITOR_TORCH  cpu: PyTorch's CPU build; default: whatever pip takes; skip: no torch (dashboard only).
                           Unset: the CPU build on Linux without an NVIDIA GPU (0.2 GB, not 3), else pip's default.
    ENTROPY_MONITOR_VENV   a virtual environment to use as it is; run.py then sets nothing up.
"""

# Standard library only, and Python 3.7 grammar: an old Python must get as far as saying that it is too old.
from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if sys.platform != "win32":
    import fcntl
if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from typing import IO, NoReturn

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv-run"
STAMP = VENV / ".ready"
LOCK = VENV / ".lock"
CONSTRAINTS = ROOT / "constraints.txt"
REQUIREMENT_FILES = (ROOT / "pyproject.toml", CONSTRAINTS)
OLDEST_PYTHON = (3, 11)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
TORCH_CHOICES = ("cpu", "default", "skip")


def main(arguments: Sequence[str]) -> int:
    """Run one verb; returns the exit code (`exec`-like verbs replace this process and never return)."""
    if sys.version_info < OLDEST_PYTHON:
        found = ".".join(str(part) for part in sys.version_info[:3])
        fail(f"expected Python >= 3.11, found {found}; install a newer one and call it by name: python3.11 run.py", 2)
    verb, rest = (arguments[0], list(arguments[1:])) if arguments else ("", [])
    if verb in ("-h", "--help", "help"):
        print((__doc__ or "").strip())
        return 0
    verbs = {"demo": run_demo, "test": run_tests, "bench": run_benchmark, "exec": run_command}
    if verb not in verbs:
        fail(f"expected one of {', '.join(verbs)}, found {verb or 'nothing'}; see python3 run.py --help", 2)
    return verbs[verb](rest)


def run_demo(arguments: list[str]) -> int:
    """`entropy-monitor demo`."""
    replace_process(environment(), ["entropy-monitor", "demo", *arguments])


def run_command(arguments: list[str]) -> int:
    """Any command, in the caller's directory."""
    command = arguments[1:] if arguments[:1] == ["--"] else arguments
    if not command:
        fail("expected a command after exec, found none; for example: python3 run.py exec entropy-monitor doctor", 2)
    replace_process(environment(), command)


def run_benchmark(arguments: list[str]) -> int:
    """`benchmarks/NAME.py`, or the list of them with each one's first line of documentation."""
    scripts = {path.stem: path for path in sorted((ROOT / "benchmarks").glob("[!_]*.py"))}
    if not arguments:
        for name, path in scripts.items():
            documentation = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            print(f"{name:24} {documentation.partition(chr(10))[0]}".rstrip())
        return 0
    if arguments[0] not in scripts:
        fail(f"expected a benchmark ({', '.join(scripts) or 'there are none'}), found {arguments[0]!r}; name one", 2)
    venv = environment()
    replace_process(venv, [str(python_of(venv)), str(scripts[arguments[0]]), *arguments[1:]])


def run_tests(arguments: list[str]) -> int:
    """Every check from the checkout's directory, all of them even when one fails; with arguments, pytest alone."""
    venv = environment()
    python = str(python_of(venv))
    os.chdir(ROOT)
    if arguments:
        replace_process(venv, [python, "-m", "pytest", *arguments])
    checks = {
        "ruff check": ["ruff", "check"],
        "ruff format": ["ruff", "format", "--check"],
        "pyright": ["pyright", "--pythonpath", python],
        "lint-imports": ["lint-imports"],
        "pytest": [python, "-m", "pytest"],
    }
    with sigterm_unwinds():
        outcomes = [run_check(name, command, environment_variables(venv)) for name, command in checks.items()]
    for line, _ in outcomes:
        say(line)
    return 0 if all(passed for _, passed in outcomes) else 1


def run_check(name: str, command: list[str], variables: dict[str, str]) -> tuple[str, bool]:
    """One check's summary line and whether it passed."""
    say(f"{name} ...")
    began = time.monotonic()
    code = run_child([shutil.which(command[0], path=variables["PATH"]) or command[0], *command[1:]], variables)
    verdict = "passed" if code == 0 else f"FAILED (exit code {code})"
    return f"{name:13} {time.monotonic() - began:6.1f} s  {verdict}", code == 0


def environment() -> Path:
    """The directory of an environment that is ready, setting it up first where it is not."""
    given = os.environ.get("ENTROPY_MONITOR_VENV")
    if given:
        venv = Path(given).absolute()
        if not python_of(venv).exists():
            fail(f"expected a virtual environment in ENTROPY_MONITOR_VENV, found no {python_of(venv)}; unset it")
        return venv
    if torch_choice() not in (None, *TORCH_CHOICES):
        fail(f"expected ENTROPY_MONITOR_TORCH to be one of {', '.join(TORCH_CHOICES)}, found {torch_choice()!r}", 2)
    if not is_ready():
        with sigterm_unwinds(), setup_lock():
            if not is_ready():  # the holder we waited for may have done it
                set_up()
    return VENV


def is_ready() -> bool:
    """Whether the environment is what the requirement files ask for."""
    stamp = reusable_stamp()
    return stamp is not None and stamp.get("requirements") == requirements_hash()


def reusable_stamp() -> dict[str, str] | None:
    """The stamp of a finished set-up that fits this Python and this place; None says: start from nothing."""
    try:
        stamp: dict[str, str] = json.loads(STAMP.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    # A copied or moved checkout carries scripts that start the old one's Python; an upgraded Python leaves dead links.
    here = {
        "python": sys.implementation.cache_tag,
        "checkout": str(ROOT),
        "torch": torch_choice() or stamp.get("torch"),
    }
    return stamp if {**stamp, **here} == stamp and python_of(VENV).exists() else None


def requirements_hash() -> str:
    """Changes whenever what is to be installed does."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in REQUIREMENT_FILES)).hexdigest()


def torch_choice() -> str | None:
    """What the user said about torch, if anything."""
    return os.environ.get("ENTROPY_MONITOR_TORCH") or None


def set_up() -> None:
    """Make or update the environment. Only the last line makes it count, so an interruption leaves none."""
    began = time.monotonic()
    stamp = reusable_stamp()
    choice = torch_choice() or (stamp["torch"] if stamp else "auto")
    requirements = requirements_hash()
    STAMP.unlink(missing_ok=True)
    if stamp is None:
        with step(f"making {VENV.name} with Python {sys.version.split()[0]}"):
            clear(VENV)
            make_venv()
    with step("pip and the build tool"):
        # A pinned pip, because older ones download the whole of torch to learn its version.
        pip("pip", "hatchling")
    if choice != "skip":
        install_torch(choice)
    extras = "dashboard,test" if choice == "skip" else "train,watch,dashboard,test"
    with step(f"entropy-monitor[{extras}]"):
        pip("--no-build-isolation", "--editable", f"{ROOT}[{extras}]")
    made = {"python": sys.implementation.cache_tag, "checkout": str(ROOT), "torch": choice}
    partial = STAMP.with_name(".ready.partial")
    partial.write_text(json.dumps({**made, "requirements": requirements}), encoding="utf-8")
    partial.replace(STAMP)
    say(f"{VENV.name} is ready ({time.monotonic() - began:.0f} s); the next call starts at once")


def clear(directory: Path) -> None:
    """Empty the directory of all but the lock that we hold."""
    for path in directory.iterdir():
        if path == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def make_venv() -> None:
    """An environment with pip, by the first means that this Python has."""
    # run.py may itself run in the environment that is being replaced: build on the Python beneath it.
    python = getattr(sys, "_base_executable", None) or sys.executable
    if importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"):
        command = [python, "-m", "venv", str(VENV)]
    elif shutil.which("uv"):
        command = ["uv", "venv", "--quiet", "--seed", "--allow-existing", "--python", python, str(VENV)]
    elif shutil.which("virtualenv"):
        command = ["virtualenv", "--quiet", "--python", python, str(VENV)]
    else:
        fail(
            "expected a Python that can make virtual environments, found one without ensurepip, and neither uv nor "
            "virtualenv; install one of them (Debian, Ubuntu: apt-get install python3-venv)"
        )
    code = run_child(command, stdout=sys.stderr)
    if code != 0:
        fail(f"expected {Path(command[0]).name} to make {VENV.name}, found exit code {code}; its own words are above")


def install_torch(choice: str) -> None:
    """The torch that fits the host, as a step of its own so that nothing later decides its build."""
    version = torch_version_pip_would_take()
    if version is None:
        return  # an update, and the torch that is there will do
    arguments = ["torch"]
    if wants_cpu_build(version, choice):
        version, arguments = cpu_build(version, choice)
    with step(f"torch {version}"):
        pip(*arguments)


def cpu_build(version: str, choice: str) -> tuple[str, list[str]]:
    """The CPU build of this version and pip's arguments for it, or pip's default where that cannot be had."""
    build = f"{version.partition('+')[0]}+cpu"
    # No dependencies from there: that index does not have them all in the versions that we pin.
    arguments = ["--no-deps", "--index-url", CPU_INDEX, f"torch=={build}"]
    with step("asking PyTorch's CPU index"):
        code = pip_exit_code("--dry-run", "--timeout", "10", "--retries", "0", *arguments, silent=True)
    if code == 0:
        return build, arguments
    if choice == "cpu":
        fail(f"expected torch {build} at {CPU_INDEX}, found that pip cannot get it; check the network or pip's proxy")
    say(f"PyTorch's CPU index cannot be reached; taking pip's default build, torch {version}")
    return version, ["torch"]


def torch_version_pip_would_take() -> str | None:
    """The version and build (such as 2.13.0+cpu) that pip's configuration leads to; None where one is installed."""
    report = VENV / "torch-report.json"
    with step("asking pip which torch it would take"):
        pip("--quiet", "--dry-run", "--no-deps", "--report", str(report), "torch")
    installs = json.loads(report.read_text(encoding="utf-8"))["install"]
    report.unlink()
    return installs[0]["metadata"]["version"] if installs else None


def wants_cpu_build(version: str, choice: str) -> bool:
    """Whether to ask PyTorch's CPU index, given what pip would take by itself."""
    if "+cpu" in version or choice == "default" or sys.platform == "darwin":
        return False
    return choice == "cpu" or (sys.platform == "linux" and not has_nvidia_gpu())


def has_nvidia_gpu() -> bool:
    """Whether an NVIDIA driver is there, by any of its traces."""
    return bool(shutil.which("nvidia-smi")) or any(
        Path(trace).exists() for trace in ("/dev/nvidia0", "/proc/driver/nvidia", "/usr/lib/wsl/lib/nvidia-smi")
    )


def pip(*arguments: str) -> None:
    """`pip install` under the constraints, by the user's own pip configuration; a failure ends run.py."""
    code = pip_exit_code(*arguments)
    if code != 0:
        fail(
            f"expected pip to install {arguments[-1]}, found exit code {code}; its own words are above "
            "(network, proxy or index: see `python3 -m pip config list`), then call run.py again"
        )


def pip_exit_code(*arguments: str, silent: bool = False) -> int:
    """`pip install` under the constraints."""
    common = ["-m", "pip", "install", "--disable-pip-version-check", "--constraint", str(CONSTRAINTS)]
    brief = [] if sys.stderr.isatty() else ["--quiet"]  # progress bars are for people
    # PIP_USER=1 (shared clusters set it) would have pip refuse to install into a virtual environment.
    variables = {**os.environ, "PIP_USER": "0"}
    sinks = (subprocess.DEVNULL, subprocess.DEVNULL) if silent else (sys.stderr, None)
    return run_child([str(python_of(VENV)), *common, *brief, *arguments], variables, *sinks)


def run_child(
    command: list[str],
    variables: dict[str, str] | None = None,
    stdout: int | IO[str] | None = None,
    stderr: int | IO[str] | None = None,
) -> int:
    """Run to the end and return the exit code; end it with us."""
    # Descriptors stay open in the child: it holds the lock with us, so a killed run.py does not free it too early.
    with subprocess.Popen(command, env=variables, close_fds=False, stdout=stdout, stderr=stderr) as child:
        try:
            return child.wait()
        except KeyboardInterrupt:  # the terminal told the child as well
            child.wait()
            raise
        except SystemExit:
            child.terminate()
            child.wait()
            raise


def replace_process(venv: Path, command: list[str]) -> NoReturn:
    """Become the command: the same directory, streams and process id, so that signals and exit code are its own."""
    variables = environment_variables(venv)
    if os.name == "nt":  # there, exec would return to the shell at once
        program = shutil.which(command[0], path=variables["PATH"]) or command[0]
        sys.exit(run_child([program, *command[1:]], variables))
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores these, and exec would pass that on
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, variables)
    except FileNotFoundError:
        fail(f"expected a command, found no {command[0]!r} in the environment or on PATH; check its spelling", 127)
    except PermissionError:
        fail(f"expected a command, found that {command[0]!r} may not be executed; check its mode", 126)


def environment_variables(venv: Path) -> dict[str, str]:
    """What activating the environment would set."""
    variables = {**os.environ, "VIRTUAL_ENV": str(venv)}
    variables["PATH"] = os.pathsep.join((str(python_of(venv).parent), os.environ.get("PATH", os.defpath)))
    variables.pop("PYTHONHOME", None)
    return variables


def python_of(venv: Path) -> Path:
    """The environment's interpreter."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


@contextlib.contextmanager
def setup_lock() -> Generator[None]:
    """Hold the environment's lock, waiting for whoever has it."""
    VENV.mkdir(exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(str(LOCK), os.O_RDWR | os.O_CREAT, 0o666)
    os.set_inheritable(descriptor, True)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another run.py is setting up {VENV.name}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            say(f"this file system has no locks ({error.strerror}); run no second run.py during the set-up")
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def sigterm_unwinds() -> Generator[None]:
    """Make SIGTERM unwind like Ctrl-C does, so that it reaches the child too."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def step(title: str) -> Generator[None]:
    """Say what is being done, and then how long it took."""
    say(f"{title} ...")
    began = time.monotonic()
    yield
    say(f"{title}: {time.monotonic() - began:.1f} s")


def say(message: str) -> None:
    """A line of our own, always to stderr: stdout belongs to the command."""
    print(f"run.py: {message}", file=sys.stderr, flush=True)


def fail(message: str, code: int = 1) -> NoReturn:
    """One line, and out."""
    say(message)
    sys.exit(code)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        say("interrupted; an unfinished set-up starts afresh the next time")
        sys.exit(130)
