"""A kill storm: real trainers, a real watcher and a commander, killed with SIGKILL at random moments and restarted.

What is written is made verifiable. The model's activations are a function of the step alone, so that any mixture of two
frames, and any frame that is half of something else, shows; and each rank keeps a log of its own, appended before and
after the acknowledgements that the store promises.
"""

from .storm import Storm

__all__ = ["Storm"]
