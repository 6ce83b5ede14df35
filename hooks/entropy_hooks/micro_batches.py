"""Which forward and backward pass of an optimizer step is the one to observe: the last micro-batch."""

from __future__ import annotations

_WATCHFUL_STEPS = 16
"""Steps after an uneven one (the rest of an epoch) in which every pass is captured, and the last one stays."""


class MicroBatches:
    """Counts the passes between two optimizer steps.

    A frame holds the k-th backward pass, k being the number of passes before the previous optimizer step. Until k is
    known, and for some steps after it has changed, every pass is captured and the last one stays. A step that
    GradScaler skips leaves 2k passes behind: each k-th is captured, and k stays.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[int, bool]] = []
        """Calls that are on the stack: whose, and whether each is a training pass."""
        self.in_backward = False
        """Inside a backward pass through such a forward pass."""
        self._counts = False
        """That backward pass is the first one of its forward pass."""
        self.expected: int | None = None
        self.count = 0
        """Backward passes since the last optimizer step."""
        self._begun = 0
        """Forward passes since the last optimizer step."""
        self._watchful = 0

    @property
    def in_forward(self) -> bool:
        """Inside a training forward pass of the model, and not in a backward pass that it runs itself."""
        return bool(self._calls) and self._calls[-1][1] and not self.in_backward

    @property
    def num_calls(self) -> int:
        """Calls on the stack: of the model, of what wraps it, or of its parts."""
        return len(self._calls)

    def enter_forward(self, called: object, *, with_gradients: bool) -> bool:
        """The model is called.

        Returns:
            Whether it is a training pass: with gradients, and no checkpoint that runs the model again for a backward.
        """
        self._forget(called)
        training = with_gradients and not self.in_backward
        self._calls.append((id(called), training))
        return training

    def enter_part(self, called: object, *, with_gradients: bool) -> bool:
        """A part of the model is called: by the model, or by itself where the loop never calls the whole.

        Returns:
            Whether it belongs to a training pass.
        """
        self._forget(called)
        if not self._calls:
            return self.enter_forward(called, with_gradients=with_gradients)
        training = self._calls[-1][1]  # a checkpointed part runs without gradients
        self._calls.append((id(called), training))
        return training

    def leave_forward(self, called: object) -> None:
        """That call has ended, with or without an exception."""
        self._forget(called)

    def _forget(self, called: object) -> None:
        """Take a call off the stack, and what it had called: a KeyboardInterrupt leaves no forward hook a chance."""
        depth = next((depth for depth, (who, _) in enumerate(self._calls) if who == id(called)), None)
        if depth is not None:
            del self._calls[depth:]

    def is_last(self) -> bool:
        """Whether the pass under way, or about to begin, is one to keep.

        Returns:
            True also while k is unknown.
        """
        if self.expected is None or self._watchful:
            return True
        # By either count: a loop may run all its forward passes first, and some of them never backward.
        return self.expected - 1 in (self.count % self.expected, (self._begun - 1) % self.expected)

    def begin(self) -> None:
        """A training pass begins."""
        self._begun += 1

    @property
    def ended_early(self) -> bool:
        """Fewer passes than expected have led to the step: which was to be the last one could not be known."""
        return self.expected is not None and 0 < self.count < self.expected

    def enter_backward(self, *, again: bool) -> None:
        """A backward pass has reached our model.

        Args:
            again: the same forward pass as an earlier one has; it is no micro-batch of its own.
        """
        self.in_backward = True
        self._counts |= not again

    def leave_backward(self) -> None:
        """The backward pass has ended."""
        self.count += self._counts
        self.in_backward = self._counts = False

    def step(self) -> None:
        """The optimizer has stepped."""
        count, self.count, self._begun = self.count, 0, 0
        self._watchful = max(0, self._watchful - 1)
        if count and self.expected is not None and count % self.expected:
            self._watchful = _WATCHFUL_STEPS
        if count and (self.expected is None or self._watchful or count % self.expected):
            self.expected = count
