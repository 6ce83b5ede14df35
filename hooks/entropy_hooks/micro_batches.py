"""Which forward and backward pass of an optimizer step is the one to observe: the last micro-batch."""

from __future__ import annotations


class MicroBatches:
    """Counts the passes between two optimizer steps.

    A frame holds the k-th backward pass, k being the number of passes before the previous optimizer step. Until k is
    known every pass is captured and the last one stays. A step that GradScaler skips leaves 2k passes behind: each
    k-th is captured, and k stays.
    """

    def __init__(self) -> None:
        self.in_forward = False
        """Inside a training forward pass of the root module."""
        self.in_backward = False
        """Inside a backward pass that follows such a forward pass."""
        self.expected: int | None = None
        self.count = 0
        """Backward passes since the last optimizer step."""
        self._forward_pending = False

    def enter_forward(self) -> None:
        """The root module's forward begins, with gradients enabled."""
        self.in_forward, self._forward_pending = True, True

    def leave_forward(self) -> None:
        """The root module's forward has ended, with or without an exception."""
        self.in_forward = False

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
        self.in_backward = self._forward_pending = False

    def step(self) -> None:
        """The optimizer has stepped."""
        count, self.count = self.count, 0
        if count and (self.expected is None or count % self.expected):
            self.expected = count
