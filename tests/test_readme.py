"""The README's tree and the folders agree."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def readme_tree() -> list[str]:
    """Paths in the README's tree, children joined to the folder above them."""
    block = re.search(r"## The house\n\n```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    paths, parent = [], ""
    for line in block[1].splitlines():
        name, indented = line.split()[0], line.startswith("  ")
        paths.append(parent + name if indented else name)
        parent = parent if indented else name
    return paths


def test_everything_in_the_tree_exists_as_what_it_is_shown():
    for path in readme_tree():
        found = ROOT / path
        assert found.is_dir() if path.endswith("/") else found.is_file(), path


def test_every_part_of_the_core_and_every_top_level_folder_is_in_the_tree():
    shown = {path.rstrip("/") for path in readme_tree()}
    core = [path for path in (ROOT / "entropy_monitor").iterdir() if not path.name.startswith(("_", "."))]
    expected = {f"entropy_monitor/{path.name}" for path in core if path.suffix in {".py", ""}}
    assert expected <= shown
    tracked = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))}
    tracked -= {"runs", "dist", "build", "node_modules"}
    assert tracked <= {path.split("/")[0] for path in shown}


def test_the_picture_is_there():
    assert (ROOT / "docs" / "live.png").stat().st_size > 10_000
