"""What the detectors' options must satisfy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from entropy_monitor.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


def check_options(options: object, rules: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse options that are out of range.

    Args:
        options: any object with the named attributes.
        rules: by attribute, whether it is valid, and what was expected in words.

    Raises:
        ConfigError: the first one that is not valid.
    """
    for name, (valid, expected) in rules.items():
        if not valid:
            raise ConfigError(
                f"{name}: expected {expected}, found {getattr(options, name)}: leave it out for the default"
            )
