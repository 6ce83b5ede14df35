"""Finding out, from nothing but two optimizer steps, which model and which optimizers train in this process."""

from entropy_hooks.discovery.choice import Found, choose
from entropy_hooks.discovery.search import Search
from entropy_hooks.discovery.seen import Seen, Stepped

__all__ = ["Found", "Search", "Seen", "Stepped", "choose"]
