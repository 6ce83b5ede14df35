"""A twin runs contained: an operation that would write to what it does not own, or talk to other ranks, is refused.

A copy of a model still reaches whatever its code reaches by name: a module's global, a class attribute, the parameters
it shares, the process group. To run its forward once more would write there once more. Each operation is therefore
looked at before it runs, so that one that is refused has done nothing.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode  # pyright: ignore

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from typing import Self

_Result = TypeVar("_Result")

_COLLECTIVES = frozenset({"c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd", "symm_mem"})
"""Namespaces of operations in which all ranks take part."""
_FROM_PYTHON = "aten::lift_fresh"
"""What `torch.tensor` calls with what it has made; by its schema a view of something older."""


class ReachedOutError(RuntimeError):
    """What runs contained would have changed something outside; it has not."""

    def __init__(self, what: str, storage: int | None = None) -> None:
        super().__init__(what)
        self.storage = storage
        """Of the tensor that would have been written to, see `storage_of`."""


class Contained(TorchDispatchMode):
    """Within, tensors may be written to that were made within, this time or an earlier one."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._exempt, self._refuses = False, True
        self._own: dict[int, StorageWeakRef] = {}
        """By address. While there is a weak reference to it, nothing else is given the address."""
        self._generators: list[tuple[torch.Generator, torch.Tensor]] = []
        """Of the user's, that were drawn from: with their state before."""

    @contextlib.contextmanager
    def owning(self) -> Generator[None]:
        """Within, nothing is refused, and what is made is its own."""
        self._refuses = False
        try:
            with self:
                yield
        finally:
            self._refuses = True

    def exempt(self, ours: Callable[..., _Result]) -> Callable[..., _Result]:
        """Let something of ours run without being looked at.

        Args:
            ours: any callable.

        Returns:
            What does the same.
        """

        def call(*args: Any) -> _Result:
            before, self._exempt = self._exempt, True
            try:
                return ours(*args)
            finally:
                self._exempt = before

        return call

    def own(self, *tensors: torch.Tensor) -> None:
        """Allow writes to these too."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._own[storage_of(tensor)] = StorageWeakRef(storage)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # else torch has dynamo stand around each operation, for half the cost
        return False

    # Only the thread's own stack: `TorchDispatchMode` also tells the whole process, and what another thread has
    # compiled would run eagerly meanwhile.
    def __enter__(self) -> Self:
        _push_mode(self)
        return self

    def __exit__(self, *error: object) -> None:
        _pop_mode()
        while self._generators:
            generator, state = self._generators.pop()
            generator.set_state(state)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        effects = _NONE if self._exempt else _effects(func)
        if effects.special and self._refuses:
            self._check(func, effects, args, kwargs)
        output = func(*args, **kwargs)
        if effects.fresh and (not effects.is_lift or output.untyped_storage().resizable()):
            self.own(*(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)))
        return output

    def _check(self, func: OpOverload, effects: _Effects, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if effects.collective and _has_other_ranks():
            raise ReachedOutError(f"calls {func}, in which all ranks take part")
        for tensor in effects.written(args, kwargs):
            if storage_of(tensor) not in self._own:
                raise ReachedOutError(f"writes to a tensor outside it ({func})", storage_of(tensor))
        if isinstance(generator := kwargs.get("generator"), torch.Generator):
            self._keep(generator)

    def _keep(self, generator: torch.Generator) -> None:
        if not any(generator is kept for kept, _ in self._generators):
            self._generators.append((generator, generator.get_state()))


def storage_of(tensor: torch.Tensor) -> int:
    """What tells the memory of a tensor from all other memory, as long as it lives.

    Returns:
        The same for a tensor and its views.
    """
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


@dataclass(frozen=True, slots=True)
class _Effects:
    collective: bool
    writes: tuple[tuple[int, str], ...]
    """Position and name of each argument that is written to."""
    special: bool
    """It writes, draws random numbers or is collective."""
    fresh: bool
    """All that it returns is new."""
    is_lift: bool = False
    """It is what `torch.tensor` and `torch.from_numpy` end with; the memory of an array cannot be resized."""

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
        for position, name in self.writes:
            value = args[position] if position < len(args) else kwargs.get(name)
            for leaf in value if isinstance(value, list | tuple) else (value,):
                if isinstance(leaf, torch.Tensor):
                    yield leaf


_NONE = _Effects(collective=False, writes=(), special=False, fresh=False)


@functools.cache
def _effects(operation: Any) -> _Effects:
    if not isinstance(operation, OpOverload):  # of a higher order: what it runs comes by itself
        return _NONE
    schema: Any = operation._schema  # pyright: ignore[reportPrivateUsage]
    writes = [
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    collective = operation.namespace in _COLLECTIVES
    draws = any(argument.name == "generator" for argument in schema.arguments)
    fresh = all(returned.alias_info is None for returned in schema.returns)
    return _Effects(
        collective=collective,
        writes=tuple(writes),
        special=collective or draws or bool(writes),
        fresh=bool(schema.returns) and (fresh or schema.name == _FROM_PYTHON),
        is_lift=schema.name == _FROM_PYTHON,
    )


def _has_other_ranks() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
