"""`import entropy_hooks` must not make a training job pay for what only the watcher and the dashboard need."""

from __future__ import annotations

from .scripts import finish, start

HEAVY = ("scipy", "pandas", "streamlit", "watchdog", "altair", "zarr", "xarray")
# The training helpers of the prelude are ours, too: they import the hooks and the store, nothing heavier.
SCRIPT = """
import importlib
for name in sys.argv[1].split():
    importlib.import_module(name)
report(loaded=sorted({name.partition(".")[0] for name in sys.modules}))
"""


def loaded(*also: str) -> set[str]:
    return set(finish(start(SCRIPT, " ".join(("entropy_hooks", *also))))[0]["loaded"])


def test_import_is_light() -> None:
    found = loaded()
    assert {"entropy_hooks", "torch", "tensorstore"} <= found
    assert not found & set(HEAVY)


def test_the_check_can_fail() -> None:
    assert loaded(*HEAVY) >= set(HEAVY)
