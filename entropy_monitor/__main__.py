"""The command line: ``entropy-monitor VERB`` or ``python -m entropy_monitor VERB``."""

from __future__ import annotations

import sys


def main() -> int:
    """Run one command.

    Returns:
        0 done, 1 failed, 2 usage, 3 no such run.
    """
    from entropy_monitor.cli import run_command

    return run_command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
