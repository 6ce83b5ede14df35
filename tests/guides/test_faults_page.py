"""docs/faults.md names every kind of fault that the code can count, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COUNTING = {"count", "fault", "_give_up", "_on_fault", "on_fault"}


def kinds_in(*folders: str) -> set[str]:
    """First arguments of calls that count, keys of tables of faults, and subscripts of such tables."""
    found: set[str] = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            literals: list[ast.expr | None] = []
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                literals += node.args[:1] if name in COUNTING else []
                tables = [word.value for word in node.keywords if word.arg == "faults"]
                tables += node.args[:1] if name == "fault" else []
                literals += [key for table in tables if isinstance(table, ast.Dict) for key in table.keys]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("faults"):
                literals.append(node.slice)
            found |= {
                literal.value
                for literal in literals
                if isinstance(literal, ast.Constant) and isinstance(literal.value, str)
            }
    return found


def kinds_on(section: str) -> list[str]:
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \|", text.split(f"## {section}\n")[1].split("\n## ")[0], re.M)
    return [kind for row in rows for kind in re.findall(r"`(\w+)`", row)]


def test_each_kind_is_explained_once() -> None:
    for section, folder in (("In the trainer", "hooks"), ("In the watcher", "entropy_monitor/watcher")):
        explained, counted = kinds_on(section), kinds_in(folder)
        assert len(counted) > 10
        assert sorted(explained) == sorted(set(explained))
        assert set(explained) == counted
