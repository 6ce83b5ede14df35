"""The text that a target is made to run."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_monitor.injection.plan import ADDRESS_MARK, SIZE_MARK

if TYPE_CHECKING:
    from entropy_monitor.injection.protocol import Request

# The main thread does as little as can be: it starts a thread. What is raised there can only come from a signal handler
# of the target's that ran in between, and is raised again a moment later, when our code is gone. No name is bound, as
# this runs in __main__; and threading is imported here, because it takes the thread that imports it for the main one.
_MAIN = """\
try:
    __import__("threading")
    __import__("_thread").start_new_thread(__import__("builtins").exec, ({outer!a}, {{"TEXT": {text!a}, "PLAN": {{
        "request": {request!a}, "answers": {answers!a}, "paths": {paths!a}, "address": {address}, "size": {size}}}}}))
except BaseException:
    if issubclass(__import__("sys").exc_info()[0], KeyboardInterrupt) or __import__("sys").exc_info()[2].tb_next:
        __import__("_thread").start_new_thread(__import__("builtins").exec, ({again!a}, {{
            "kind": __import__("sys").exc_info()[0], "thread": __import__("_thread").get_ident()}}))
"""
# Where not even the standard library can be imported, the answer is written with what every Python has loaded.
_OUTER = """\
try:
    inner = {"__name__": "entropy_monitor_request"}
    exec(TEXT, inner)
    inner["start"](PLAN)
except BaseException as error:
    import os
    said = ascii(f"{type(error).__name__}: {error}").replace(chr(92), "/").replace(chr(34), "'")
    try:
        file = os.open(PLAN["answers"] + "/reply.json.part", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(file, b'{"ok": false, "message": "%s"}\\n' % said.encode())
        os.close(file)
        os.rename(PLAN["answers"] + "/reply.json.part", PLAN["answers"] + "/reply.json")
    except OSError:
        pass
"""
_AGAIN = """\
import ctypes, time
time.sleep(0.002)
ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))
"""


def stub(request: Request, answers: str, paths: list[str], *, mapped: bool) -> str:
    """Write the code that carries out a request in a target.

    Args:
        request: what is asked.
        answers: directory for the answer, as the target sees it.
        paths: directories in which the hooks may be found, as the target sees them.
        mapped: the code is brought in by a memory mapping, which it then frees; the marks for its address and size
            have been left in the text.

    Returns:
        Python source, ASCII only.
    """
    text = files("entropy_monitor.injection").joinpath("injected.py").read_text(encoding="ascii")
    return _MAIN.format(
        outer=_OUTER,
        text=text,
        request=request,
        answers=answers,
        paths=paths,
        again=_AGAIN,
        address=ADDRESS_MARK if mapped else 0,
        size=SIZE_MARK if mapped else 0,
    )


def package_paths(minor: tuple[int, int]) -> list[str]:
    """Directories from which a target of another environment may import the hooks, and what they need.

    Args:
        minor: the target's Python; extension modules of another one than ours would not load there.

    Returns:
        Absolute paths: where our own packages lie, then our site-packages.
    """
    specs = [importlib.util.find_spec(name) for name in ("entropy_hooks", "entropy_monitor")]
    origins = [Path(spec.origin).resolve().parents[1] for spec in specs if spec and spec.origin]
    site = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")]
    if minor != sys.version_info[:2]:
        return _unique([path for path in origins if path not in site])
    return _unique([*origins, *site])


def _unique(paths: list[Path]) -> list[str]:
    return list(dict.fromkeys(map(str, paths)))
