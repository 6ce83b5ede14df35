"""Whether a compiled model can be run again without a trace, and what has been found out about it on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entropy_hooks.contained import storage_of
from entropy_hooks.undisturbed import is_sharded
from entropy_hooks.user_hooks import hooks_everywhere
from entropy_hooks.writes import shared_parameters

if TYPE_CHECKING:
    from torch import nn

    from entropy_hooks.contained import ReachedOutError
    from entropy_hooks.faults import Faults
    from entropy_hooks.writes import Writes


class Fitness:
    """Of one model; counts why a pass is not observed."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self.written: set[str] = set()
        """Parameters that the model's own code writes to."""
        self.thorough = True
        """The next pass is watched for writes that leave no other trace than the values."""
        self._unfit: str | None = None
        """Why no pass of this model will be run again."""

    def allows(self, model: nn.Module) -> bool:
        """Ask, before a pass, whether it may be run again.

        Returns:
            False with the reason counted.
        """
        why = self._unfit
        if why is None and is_sharded(model):
            why = "a model that is compiled; found one that is also sharded, which no rank can run by itself"
        if why is None and hooks_everywhere():
            why = "no global module hooks beside a compiled model; found some, which a replay would call again"
        if why is not None:
            self.tell(why)
        return why is None

    def learn(self, writes: Writes) -> bool:
        """A pass has run: which parameters has it written to?

        Returns:
            Whether any is new: a twin that shares it is not the model any more.
        """
        self.thorough = False
        new = writes.found() - self.written
        if new:
            self._tell_written(min(new))
            self.written |= new
        return bool(new)

    def reached_out(self, model: nn.Module, error: ReachedOutError) -> None:
        """Nothing has been done; what would have been is not tried again."""
        shared = {storage_of(parameter): name for name, parameter in shared_parameters(model)}
        name = None if error.storage is None else shared.get(error.storage)
        if name is None or name in self.written:
            self.give_up(f"a compiled model that a copy of it leaves alone; found that it {error}")
            return
        self._tell_written(name)
        self.written.add(name)
        self.thorough = True  # it writes to more than this one, probably

    def give_up(self, expected_and_found: str) -> None:
        """This model is not run again."""
        self._unfit = expected_and_found
        self.tell(expected_and_found)

    def tell(self, expected_and_found: str) -> None:
        """Count a pass that is not observed."""
        self._faults.count("not_observed", f"expected {expected_and_found} (or give observe='probe')")

    def _tell_written(self, name: str) -> None:
        self.tell(f"parameters that forward leaves alone; found {name} written to: one of the next is observed")
