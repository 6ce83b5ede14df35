"""run.py: what it promises to a user with an old Python, a bare Debian, a GPU, a slow network, or no patience.

Set-ups here are real up to the edge: a stub `uv` makes the environment and a stub interpreter stands in for pip, so
that nothing is downloaded and every call is on record.
"""

from __future__ import annotations

import ast
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

RUN = Path(__file__).resolve().parents[1] / "run.py"
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"

# run.py as a program, but without ensurepip and with the GPU that the test says.
DRIVER = """
import importlib.util, os, sys
sys.modules["ensurepip"] = None
spec = importlib.util.spec_from_file_location("run", sys.argv[1])
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)
run.has_nvidia_gpu = lambda: bool(os.environ.get("STUB_GPU"))
sys.exit(run.main(sys.argv[2:]))
"""

STUB_UV = """#!/bin/sh
echo "uv $*" >> "$STUB_LOG"
echo "uv talks on stdout"
for directory; do :; done
mkdir -p "$directory/bin" && cp "$STUB_PYTHON" "$directory/bin/python"
"""

# Answers `-m pip install`: the report of a dry run, the CPU index's absence, a gate to stop at, a failure.
STUB_PYTHON = """#!/bin/sh
echo "$*" >> "$STUB_LOG"
case "$*" in
*--report*)
    while [ "$1" != --report ]; do shift; done
    echo '{"install": [{"metadata": {"version": "'"$STUB_TORCH"'"}}]}' > "$2" ;;
*--dry-run*--index-url*) echo "noise that nobody asked for" >&2; exit "${STUB_INDEX_CODE:-0}" ;;
*--editable*)
    echo "pip talks on stdout"
    if [ -n "$STUB_GATE" ]; then read -r line < "$STUB_GATE"; fi
    exit "${STUB_EDITABLE_CODE:-0}" ;;
esac
"""


class Checkout:
    """A copy of run.py beside small requirement files, with stubs around it."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "checkout"
        self.log = directory / "log"
        self.bin = directory / "bin"
        for folder in (self.root, self.bin):
            folder.mkdir()
        shutil.copy(RUN, self.root)
        (self.root / "pyproject.toml").write_text("")
        (self.root / "constraints.txt").write_text("torch==2.13.0\n")
        write_script(self.bin / "uv", STUB_UV)
        write_script(directory / "python", STUB_PYTHON)
        self.variables = {
            "PATH": f"{self.bin}:{SYSTEM_PATH}",
            "STUB_LOG": str(self.log),
            "STUB_PYTHON": str(directory / "python"),
            "STUB_TORCH": "2.13.0",
        }

    @property
    def stamp(self) -> Path:
        return self.root / ".venv-run" / ".ready"

    def calls(self) -> list[str]:
        """What uv and pip were asked since the last time, without what every call has."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        common = f"-m pip install --disable-pip-version-check --constraint {self.root}/constraints.txt --quiet "
        return [line.removeprefix(common) for line in lines]

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(self.root / "run.py"), *arguments],
            env={**self.variables, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        with self.start(*arguments, **variables) as process:
            stdout, stderr = process.communicate(timeout=30)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def run_in_this_environment(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """run.py of the real checkout, with the environment that the tests run in."""
    variables = {**os.environ, "ENTROPY_MONITOR_VENV": sys.prefix, "PATH": SYSTEM_PATH}
    return subprocess.run(
        [sys.executable, str(RUN), *arguments], env=variables, capture_output=True, text=True, timeout=30, **options
    )


# An old Python, and usage


def test_parses_under_the_grammar_of_python_3_7() -> None:
    ast.parse(RUN.read_text(encoding="utf-8"), feature_version=(3, 7))


def test_imports_the_standard_library_only() -> None:
    tree = ast.parse(RUN.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= set(sys.stdlib_module_names)


def test_an_old_python_is_told_in_one_line() -> None:
    code = "import runpy, sys; sys.version_info = (3, 9, 2); runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", code, str(RUN), "demo"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "expected Python >= 3.11, found 3.9.2; install a newer one" in result.stderr


@pytest.mark.parametrize("arguments", [(), ("dmeo",), ("exec",), ("exec", "--"), ("bench", "nothing_so_named")])
def test_wrong_usage_is_one_line_and_exit_code_2(checkout: Checkout, arguments: tuple[str, ...]) -> None:
    result = checkout.run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("run.py: expected ")
    assert result.stderr.count("\n") == 1
    assert checkout.calls() == []  # a mistake costs no set-up


def test_help_names_every_verb_and_variable(checkout: Checkout) -> None:
    result = checkout.run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    for word in ("demo", "test", "bench", "exec", "ENTROPY_MONITOR_TORCH", "ENTROPY_MONITOR_VENV"):
        assert word in result.stdout


# exec: the command is as if called directly


def test_exec_keeps_directory_streams_and_exit_code(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getcwd(), sys.stdin.read()); print('mine', file=sys.stderr); sys.exit(7)"
    result = run_in_this_environment("exec", "python", "-c", code, cwd=tmp_path, input="typed")
    assert result.returncode == 7
    assert result.stdout == f"{tmp_path} typed\n"
    assert result.stderr == "mine\n"


def test_exec_puts_the_environment_first_on_path() -> None:
    code = "import os, sys; print(sys.executable, os.environ['VIRTUAL_ENV'], os.environ['PATH'])"
    result = run_in_this_environment("exec", "--", "python", "-c", code)
    executable, environment, path = result.stdout.split()
    assert Path(executable).parent == Path(sys.prefix) / "bin"
    assert environment == sys.prefix
    assert path == f"{sys.prefix}/bin:{SYSTEM_PATH}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_exec_is_the_command_for_signals(number: signal.Signals) -> None:
    variables = {**os.environ, "ENTROPY_MONITOR_VENV": sys.prefix}
    command = [sys.executable, str(RUN), "exec", "sh", "-c", "echo $$; read line"]
    with subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        process.send_signal(number)
        assert process.wait(timeout=10) == -number


def test_exec_does_not_pass_on_pythons_deafness_to_sigpipe() -> None:
    # A `yes` that ignores the signal complains of a broken pipe, and a shell cannot undo an inherited ignore.
    result = run_in_this_environment("exec", "sh", "-c", "yes | head -n 1")
    assert (result.stdout, result.stderr) == ("y\n", "")


@pytest.mark.parametrize(("command", "code"), [("no-such-command", 127), (str(RUN.parent / "pyproject.toml"), 126)])
def test_exec_of_what_cannot_run_exits_as_a_shell_does(command: str, code: int) -> None:
    result = run_in_this_environment("exec", command)
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.startswith("run.py: expected a command, found ")
    assert result.stderr.count("\n") == 1


def test_a_given_environment_must_exist(checkout: Checkout, tmp_path: Path) -> None:
    result = checkout.run("exec", "true", ENTROPY_MONITOR_VENV=str(tmp_path / "none"))
    assert result.returncode == 1
    assert "expected a virtual environment in ENTROPY_MONITOR_VENV, found no" in result.stderr
    assert checkout.calls() == []


# The set-up


def test_setup_runs_once_and_keeps_stdout_clean(checkout: Checkout) -> None:
    first = checkout.run("exec", "echo", "hello", STUB_GPU="1")
    assert (first.returncode, first.stdout) == (0, "hello\n")
    assert "uv talks on stdout" in first.stderr
    assert "pip talks on stdout" in first.stderr
    venv = checkout.root / ".venv-run"
    python = getattr(sys, "_base_executable", sys.executable)
    assert checkout.calls() == [
        f"uv venv --quiet --seed --allow-existing --python {python} {venv}",
        "pip hatchling",
        f"--quiet --dry-run --no-deps --report {venv}/torch-report.json torch",
        "torch",
        f"--no-build-isolation --editable {checkout.root}[train,watch,dashboard,test]",
    ]
    second = checkout.run("exec", "echo", "hello")
    assert (second.returncode, second.stdout, second.stderr) == (0, "hello\n", "")
    assert checkout.calls() == []


CPU_INSTALL = "--no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu"
CPU_QUESTION = f"--dry-run --timeout 10 --retries 0 {CPU_INSTALL}"


@pytest.mark.parametrize(
    ("variables", "torch_calls"),
    [
        pytest.param({}, [CPU_QUESTION, CPU_INSTALL], id="no-gpu"),
        pytest.param({"STUB_TORCH": "2.13.0+cu130"}, [CPU_QUESTION, CPU_INSTALL], id="no-gpu-cuda-wheel"),
        pytest.param({"STUB_TORCH": "2.13.0+cpu"}, ["torch"], id="already-cpu"),
        pytest.param({"STUB_INDEX_CODE": "1"}, [CPU_QUESTION, "torch"], id="index-unreachable"),
        pytest.param({"STUB_GPU": "1"}, ["torch"], id="gpu"),
        pytest.param(
            {"STUB_GPU": "1", "ENTROPY_MONITOR_TORCH": "cpu"}, [CPU_QUESTION, CPU_INSTALL], id="gpu-cpu-wanted"
        ),
        pytest.param({"ENTROPY_MONITOR_TORCH": "default"}, ["torch"], id="default-wanted"),
    ],
)
def test_the_build_of_torch_fits_the_host(
    checkout: Checkout, variables: dict[str, str], torch_calls: list[str]
) -> None:
    result = checkout.run("exec", "true", **variables)
    assert result.returncode == 0, result.stderr
    assert checkout.calls()[3:-1] == torch_calls
    assert ("cannot be reached; taking pip's default" in result.stderr) == (variables.get("STUB_INDEX_CODE") == "1")
    assert "noise" not in result.stderr


def test_a_wanted_cpu_build_is_never_replaced_by_another(checkout: Checkout) -> None:
    result = checkout.run("exec", "true", ENTROPY_MONITOR_TORCH="cpu", STUB_INDEX_CODE="1")
    assert result.returncode == 1
    assert "expected torch 2.13.0+cpu at " in result.stderr
    assert not checkout.stamp.exists()


def test_without_torch_only_what_needs_none_is_installed(checkout: Checkout) -> None:
    result = checkout.run("exec", "true", ENTROPY_MONITOR_TORCH="skip")
    assert result.returncode == 0, result.stderr
    assert not any(call.endswith("torch") for call in checkout.calls())
    assert checkout.run("exec", "true").stderr == ""  # and it stays as it was asked for


def test_an_unknown_build_of_torch_is_refused(checkout: Checkout) -> None:
    result = checkout.run("exec", "true", ENTROPY_MONITOR_TORCH="rocm")
    assert result.returncode == 2
    assert "expected ENTROPY_MONITOR_TORCH to be one of cpu, default, skip, found 'rocm'" in result.stderr


def test_changed_requirements_update_the_environment_in_place(checkout: Checkout) -> None:
    checkout.run("exec", "true")
    checkout.calls()
    (checkout.root / "constraints.txt").write_text("torch==2.14.0\n")
    assert checkout.run("exec", "true").returncode == 0
    calls = checkout.calls()
    assert not any(call.startswith("uv ") for call in calls)
    assert calls[-1].endswith("[train,watch,dashboard,test]")


@pytest.mark.parametrize("change", ["moved", "interpreter gone", "other python", "stamp unreadable", "other torch"])
def test_an_environment_that_does_not_fit_is_made_anew(checkout: Checkout, change: str) -> None:
    checkout.run("exec", "true")
    checkout.calls()
    leftover = checkout.stamp.with_name("leftover")
    leftover.touch()
    variables = {}
    if change == "moved":
        moved = checkout.root.with_name("moved")
        checkout.root.rename(moved)
        checkout.root, leftover = moved, moved / ".venv-run" / "leftover"
    elif change == "interpreter gone":
        (checkout.root / ".venv-run/bin/python").unlink()
    elif change == "other python":
        checkout.stamp.write_text(json.dumps({**json.loads(checkout.stamp.read_text()), "python": "cpython-310"}))
    elif change == "stamp unreadable":
        checkout.stamp.write_text("{")
    else:
        variables = {"ENTROPY_MONITOR_TORCH": "default"}
    assert checkout.run("exec", "true", **variables).returncode == 0
    assert checkout.calls()[0].startswith("uv ")
    assert not leftover.exists()


def test_a_failing_pip_is_one_line_of_ours_and_no_stamp(checkout: Checkout) -> None:
    result = checkout.run("exec", "echo", "never", STUB_EDITABLE_CODE="1")
    assert (result.returncode, result.stdout) == (1, "")
    assert "expected pip to install" in result.stderr.splitlines()[-1]
    assert "found exit code 1" in result.stderr.splitlines()[-1]
    assert not checkout.stamp.exists()


# A Python without ensurepip (the tests above have uv for it)


def test_without_ensurepip_uv_and_virtualenv_one_line_says_what_to_install(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = checkout.run("exec", "true", PATH=str(tmp_path / "empty"))
    assert result.returncode == 1
    *_, last = result.stderr.splitlines()
    assert last.startswith("run.py: expected a Python that can make virtual environments, found one without ensurepip")
    assert "apt-get install python3-venv" in last
    assert not checkout.stamp.exists()


def test_virtualenv_serves_where_there_is_no_uv(checkout: Checkout) -> None:
    (checkout.bin / "uv").rename(checkout.bin / "virtualenv")
    (checkout.bin / "virtualenv").write_text(STUB_UV.replace('"uv ', '"virtualenv '))
    assert checkout.run("exec", "true").returncode == 0
    assert checkout.calls()[0].startswith("virtualenv --quiet --python ")


def test_a_failing_tool_is_named(checkout: Checkout) -> None:
    write_script(checkout.bin / "uv", "#!/bin/sh\nexit 3\n")
    result = checkout.run("exec", "true")
    assert result.returncode == 1
    assert "expected uv to make .venv-run, found exit code 3" in result.stderr


# Interruptions and company


class Gate:
    """Holds the stub pip at its last step, and knows when it got there."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self.descriptor = -1

    def wait_for_arrival(self) -> None:
        deadline = time.monotonic() + 20
        while self.descriptor < 0:
            try:
                self.descriptor = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                if error.errno != errno.ENXIO or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def open(self) -> None:
        os.write(self.descriptor, b"\n")
        os.close(self.descriptor)
        self.descriptor = -1


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    made = Gate(tmp_path / "gate")
    yield made
    if made.descriptor >= 0:
        os.close(made.descriptor)


@pytest.mark.parametrize("is_update", [False, True], ids=["first", "update"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_setup_leaves_no_stamp_and_the_next_call_starts_afresh(
    checkout: Checkout, gate: Gate, number: signal.Signals, is_update: bool
) -> None:
    if is_update:
        checkout.run("exec", "true")
        (checkout.root / "constraints.txt").write_text("torch==2.14.0\n")
    with checkout.start("exec", "echo", "never", STUB_GATE=str(gate.path)) as process:
        gate.wait_for_arrival()
        process.send_signal(number)
        if number == signal.SIGINT:  # a terminal would have stopped the stub; we let it finish
            gate.open()
        assert process.wait(timeout=20) != 0
        assert process.stdout is not None
        assert "never" not in process.stdout.read()
    assert not checkout.stamp.exists()
    checkout.calls()
    assert checkout.run("exec", "true").returncode == 0
    assert checkout.calls()[0].startswith("uv ")


def test_a_second_run_waits_for_the_first_and_repeats_nothing(checkout: Checkout, gate: Gate) -> None:
    with checkout.start("exec", "true", STUB_GATE=str(gate.path)) as first:
        gate.wait_for_arrival()
        with checkout.start("exec", "echo", "hello") as second:
            assert second.stderr is not None
            assert "another run.py is setting up .venv-run; waiting for it" in second.stderr.readline()
            gate.open()
            stdout, stderr = second.communicate(timeout=20)
            assert (second.returncode, stdout, stderr) == (0, "hello\n", "")
        first.communicate(timeout=20)
        assert first.returncode == 0
    assert sum(call.startswith("uv ") for call in checkout.calls()) == 1


def test_the_pip_of_a_killed_run_still_keeps_others_out(checkout: Checkout, gate: Gate) -> None:
    with checkout.start("exec", "true", STUB_GATE=str(gate.path)) as first:
        gate.wait_for_arrival()
        first.kill()
        first.wait(timeout=20)
        with checkout.start("exec", "echo", "hello") as second:
            assert second.stderr is not None
            assert "waiting for it" in second.stderr.readline()
            gate.open()
            stdout, _ = second.communicate(timeout=20)
            assert (second.returncode, stdout) == (0, "hello\n")
    assert sum(call.startswith("uv ") for call in checkout.calls()) == 2  # the half-made one was not trusted


# The other verbs, over a stub environment


@pytest.fixture
def stub_environment(tmp_path: Path) -> Path:
    """An environment whose programs only say how and where they were called."""
    directory = tmp_path / "environment" / "bin"
    directory.mkdir(parents=True)
    for name in ("ruff", "pyright", "lint-imports", "python", "entropy-monitor"):
        script = f'#!/bin/sh\necho "{name} $* in $PWD"\ncase "$STUB_FAIL" in *{name}*) exit 5;; esac\n'
        write_script(directory / name, script)
    return directory.parent


def test_test_runs_every_check_from_the_checkout(checkout: Checkout, stub_environment: Path) -> None:
    result = checkout.run("test", ENTROPY_MONITOR_VENV=str(stub_environment))
    python = stub_environment / "bin" / "python"
    assert result.returncode == 0
    assert result.stdout.splitlines() == [
        f"ruff check in {checkout.root}",
        f"ruff format --check in {checkout.root}",
        f"pyright --pythonpath {python} in {checkout.root}",
        f"lint-imports  in {checkout.root}",
        f"python -m pytest in {checkout.root}",
    ]
    assert sum("passed" in line for line in result.stderr.splitlines()) == 5


def test_test_goes_on_after_a_failure_and_fails(checkout: Checkout, stub_environment: Path) -> None:
    result = checkout.run("test", ENTROPY_MONITOR_VENV=str(stub_environment), STUB_FAIL="pyright lint-imports")
    assert result.returncode == 1
    assert len(result.stdout.splitlines()) == 5
    summary = result.stderr.splitlines()[-5:]
    assert ["FAILED (exit code 5)" in line for line in summary] == [False, False, True, True, False]


def test_test_with_arguments_is_pytest_alone(checkout: Checkout, stub_environment: Path) -> None:
    variables = {"ENTROPY_MONITOR_VENV": str(stub_environment), "STUB_FAIL": "python"}
    result = checkout.run("test", "-k", "gapt", **variables)
    assert (result.returncode, result.stderr) == (5, "")
    assert result.stdout == f"python -m pytest -k gapt in {checkout.root}\n"


def test_demo_passes_its_arguments_on(checkout: Checkout, stub_environment: Path) -> None:
    result = checkout.run("demo", "--steps", "3", ENTROPY_MONITOR_VENV=str(stub_environment))
    assert result.stdout == f"entropy-monitor demo --steps 3 in {Path.cwd()}\n"


def test_bench_lists_and_runs(checkout: Checkout, stub_environment: Path) -> None:
    scripts = checkout.root / "benchmarks"
    scripts.mkdir()
    (scripts / "store.py").write_text('"""Frames a second.\n\nMore."""\n')
    (scripts / "_shared.py").write_text("")
    listing = checkout.run("bench")
    assert (listing.returncode, listing.stdout.split(maxsplit=1)) == (0, ["store", "Frames a second.\n"])
    assert checkout.calls() == []
    result = checkout.run("bench", "store", "--quick", ENTROPY_MONITOR_VENV=str(stub_environment))
    assert result.stdout == f"python {scripts}/store.py --quick in {Path.cwd()}\n"
