"""Kill storm: trainers, watcher or both die by SIGKILL again and again; no frame is lost, no command applied twice.

Two ranks train with steering allowed, a watcher measures, a commander commands, and an independent observer lists and
reads every commit. Prints what happened; exits 1 on any violation.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path


def main() -> int:
    from _storm import Storm

    parser = argparse.ArgumentParser(prog="run.py bench kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, help="repeats the decisions of a storm, not the moments they fall into")
    parser.add_argument("--keep-run", type=Path, help="leave the run there; a temporary folder by default")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    print(f"{given.kills} kills, seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        directory = given.keep_run or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        report = Storm(directory, seed).run(given.kills)
    print("\n".join(report.lines()))
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
