"""Global hooks of ours run inside whatever `torch.compile` compiles: a whole optimizer step, say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch._compile import _disable_dynamo  # pyright: ignore[reportPrivateUsage]

if TYPE_CHECKING:
    from collections.abc import Callable


def untraced(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that dynamo calls, and neither traces nor compiles: traced, it would end in an error of dynamo's own.

    Args:
        hook: any callable.

    Returns:
        What to install; dynamo breaks its graph there.
    """
    # What torch gives its own hooks; unlike `torch.compiler.disable` it does not import dynamo before the first call.
    return _disable_dynamo(lambda *arguments: hook(*arguments))
