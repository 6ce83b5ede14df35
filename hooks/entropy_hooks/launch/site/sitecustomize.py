"""Is imported by every Python process of a launched job, as its folder stands first in ``PYTHONPATH``.

It starts the bootstrap, takes its folder off ``sys.path``, and then is the `sitecustomize` it shadows, or none.
"""

from __future__ import annotations  # older Pythons come by here, too

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_folder = Path(__file__).resolve().parent


def _start() -> None:
    spec = importlib.util.spec_from_file_location("_entropy_bootstrap", _folder.parent / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    bootstrap = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    bootstrap.start()


def _shadowed() -> importlib.machinery.ModuleSpec | None:
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _folder]
    return importlib.machinery.PathFinder.find_spec("sitecustomize")


try:
    _start()
except Exception as error:  # the job goes on
    print(f"entropy-monitor: not observing this process: {type(error).__name__}: {error}", file=sys.stderr)
_spec = _shadowed()
if _spec is None or _spec.loader is None:
    # What `site` takes for "there is none"; a later import of it is looked for afresh.
    raise ImportError("no sitecustomize beside that of entropy-monitor", name="sitecustomize")
_module = importlib.util.module_from_spec(_spec)
sys.modules["sitecustomize"] = _module
_spec.loader.exec_module(_module)
