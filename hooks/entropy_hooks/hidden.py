"""All modules of a model, with those that it hides from torch: a teacher in a list, lest it be saved or trained."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

OWN_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Those that every module has."""
_PLAIN = frozenset({int, float, bool, str, type(None)})


def all_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Look into attributes, and into the containers among them.

    Args:
        model: any module.

    Returns:
        Each module once, by where it was found; the model's own first, in its order.

    >>> model = nn.Linear(2, 2)
    >>> model.teachers = [nn.Sequential(nn.ReLU())]
    >>> list(all_modules(model))
    ['', 'teachers.0', 'teachers.0.0']
    """
    found = dict(model.named_modules())
    seen = set(map(id, found.values()))
    ahead = deque(found.items())
    while ahead:
        path, module = ahead.popleft()
        for name, value in vars(module).items():
            if type(value) in _PLAIN or name in OWN_ATTRIBUTES:  # as nearly all are: a model may have thousands
                continue
            for place, hidden in _modules_in(value):
                if id(hidden) in seen:
                    continue
                for inner, each in hidden.named_modules(prefix=_joined(path, name, place)):
                    if id(each) not in seen:
                        seen.add(id(each))
                        found[inner] = each
                        ahead.append((inner, each))
    return found


def _modules_in(value: Any) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield "", value
    elif isinstance(value, list | tuple | deque):
        yield from ((str(index), entry) for index, entry in enumerate(value) if isinstance(entry, nn.Module))
    elif isinstance(value, dict):
        yield from ((str(key), entry) for key, entry in value.items() if isinstance(entry, nn.Module))


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))
