"""Which forward and backward pass of an optimizer step is the one to observe: the last micro-batch."""

from __future__ import annotations


class MicroBatches:
    """Counts the passes between two optimizer steps.

    A frame holds the k-th backward pass, k being the number of passes before the previous optimizer step. Until k is
    known every pass is captured and the last one stays. A step that GradScaler skips leaves 2k passes behind: each
    k-th is captured, and k stays.
    """

    def __init__(self) -> None:
        self._calls: list[bool] = []
        """Calls of the model that are on the stack: whether each is a training pass."""
        self.in_backward = False
        """Inside a backward pass that follows such a forward pass."""
        self.expected: int | None = None
        self.count = 0
        """Backward passes since the last optimizer step."""
        self._forward_pending = False

    @property
    def in_forward(self) -> bool:
        """Inside a training forward pass of the model, and not in a backward pass that it runs itself."""
        return bool(self._calls) and self._calls[-1] and not self.in_backward

    def enter_forward(self, *, with_gradients: bool) -> bool:
        """The model is called.

        Returns:
            Whether it is a training pass: with gradients, and no checkpoint that runs the model again for a backward.
        """
        training = with_gradients and not self.in_backward
        self._calls.append(training)
        self._forward_pending |= training
        return training

    def enter_part(self, *, with_gradients: bool) -> None:
        """A part of the model is called: by the model, or by itself where the loop never calls the whole."""
        if self._calls:
            self._calls.append(self._calls[-1])  # a checkpointed part runs without gradients
        else:
            self.enter_forward(with_gradients=with_gradients)

    def leave_forward(self) -> None:
        """That call has ended, with or without an exception."""
        if self._calls:
            self._calls.pop()

    def is_last(self) -> bool:
        """Whether the pass under way, or about to begin, is the one to keep.

        Returns:
            True also while k is unknown.
        """
        return self.expected is None or self.count % self.expected == self.expected - 1

    def enter_backward(self) -> bool:
        """A backward pass begins somewhere in the process.

        Returns:
            Whether it is ours: our model ran forward since its last backward pass.
        """
        self.in_backward = self._forward_pending
        return self.in_backward

    def leave_backward(self) -> None:
        """The backward pass has ended."""
        if self.in_backward:
            self.count += 1
        self.in_backward = False
        self._forward_pending = self.in_forward  # one call may run several (manual optimization)

    def step(self) -> None:
        """The optimizer has stepped."""
        count, self.count = self.count, 0
        if count and (self.expected is None or count % self.expected):
            self.expected = count
