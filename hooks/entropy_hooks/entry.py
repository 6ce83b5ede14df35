"""Where the user's code enters the model: seen from eager code, whatever has been compiled.

Nothing of ours is ever placed inside a compiled graph. A hook on a block that was compiled would be ignored, one that
was there before would become part of the graph, and either might cost a recompilation.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from typing import TYPE_CHECKING, Any

from entropy_hooks.compiled import IN_PLACE, compiled_original, is_compiled_in_place
from entropy_hooks.taps import wrappers

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from entropy_hooks.guard import Guarded
    from entropy_hooks.target import Target


class Entry:
    """Calls `enter` before and `leave` after the model runs, until `remove`."""

    def __init__(self, target: Target, enter: Guarded, leave: Guarded) -> None:
        self._target, self._enter, self._leave = target, enter, leave
        self._handles: list[RemovableHandle] = []
        self._restore: Callable[[], None] | None = None
        self.compiled = is_compiled(target.called, target.model)
        """All or a part of the model runs as a compiled graph."""
        self._place(target.called)

    def look_again(self) -> bool:
        """The model was not seen where it was expected: it may have been compiled since.

        Returns:
            Whether it has been, and is now entered elsewhere.
        """
        model, called = self._target.model, self._target.called
        outer = compiled_wrapper(model)
        if outer is None and not is_compiled(called, model):
            return False
        self.remove()
        self.compiled = True
        self._place(called if outer is None else outer)
        return True

    def remove(self) -> None:
        """Take everything away; the modules' dictionaries are as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._restore is not None:
            self._restore()
            self._restore = None

    def _place(self, called: nn.Module) -> None:
        if is_compiled_in_place(called):
            self._wrap_compiled_call(called)
            return
        # A wrapper that the user bypasses, or one that we were not given: whichever is called begins the pass.
        modules = [called] if self.compiled else list(dict.fromkeys([called, self._target.model]))
        for module in modules:
            self._handles.append(module.register_forward_pre_hook(self._enter.on(module), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave.on(module), always_call=True))

    def _wrap_compiled_call(self, module: nn.Module) -> None:
        """``module.compile()`` has put the hooks of the module itself inside the compiled region: stand around it."""
        original: Any = vars(module)[IN_PLACE]
        enter, leave = self._enter.on(module), self._leave.on(module)
        owner = weakref.ref(module)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            enter(owner(), args, kwargs)
            try:
                output = original(*args, **kwargs)
            except BaseException:
                leave(owner(), args, None)  # as torch tells a forward hook that is always called
                raise
            leave(owner(), args, output)
            return output

        setattr(module, IN_PLACE, call)
        self._restore = functools.partial(_unwrap_compiled_call, owner, weakref.ref(call))


def _unwrap_compiled_call(module: Callable[[], nn.Module | None], ours: Callable[[], Any]) -> None:
    found, call = module(), ours()
    if found is not None and call is not None and vars(found).get(IN_PLACE) is call:
        setattr(found, IN_PLACE, call.__wrapped__)
    # else the module is gone, or somebody has compiled it anew or wrapped ours


def is_compiled(called: nn.Module, model: nn.Module) -> bool:
    """Whether a wrapper, the model or a part of it is compiled.

    Returns:
        True or False.
    """
    if "torch._dynamo" not in sys.modules:  # nothing can be compiled before it is imported
        return False
    return any(
        is_compiled_in_place(module) or compiled_original(module) is not None
        for module in (*wrappers(called), *model.modules())
    )


def compiled_wrapper(model: nn.Module) -> nn.Module | None:
    """The `torch.compile(model)` that somebody keeps elsewhere, found among all objects of the process.

    Takes 0.1 s for a million objects, in which nothing else runs: it is asked only where a model is not seen to run.

    Returns:
        The wrapper, or None.
    """
    if "torch._dynamo" not in sys.modules:
        return None
    return next((found for found in gc.get_objects() if compiled_original(found) is model), None)
