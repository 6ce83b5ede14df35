"""Entering a running, unmodified Python process: standard library only, nothing of ours but the errors."""

from __future__ import annotations

from entropy_monitor.injection.protocol import Reply, Request
from entropy_monitor.injection.ranks import Rank, find_ranks
from entropy_monitor.injection.send import METHODS, Method, Route, choose_route, send

__all__ = ["METHODS", "Method", "Rank", "Reply", "Request", "Route", "choose_route", "find_ranks", "send"]
