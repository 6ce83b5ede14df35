"""What every monitor costs the training thread: one run, interleaved, peers included.

GPT 6 x 256 on one torch thread, 25 capture points. Each contender's block of steps stands between two bare blocks;
printed are medians over rounds of the added time, with quartiles and the standard error of the median. The peers are
used where they are installed: ``run.py exec pip install tensorboard wandb delve``.

``--device cuda`` measures GPT-2 124M on a GPU instead, ``--memory`` whether memory stays constant over 10,000 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from _blocks import Block, Estimate, as_record, interleave, measure, overhead, sampled_step_overhead
from _breakdown import breakdown
from _contenders import CONTENDERS, Contender, ours
from _gpt import Job, Size
from _memory import memory

KEEP = 256
"""Frames that retention leaves, by default."""
LINES = {
    "ours, with weight-space alignment, every 10": 1.0,
    "ours, with gradients, every 1": 3.0,
}
"""Percent of the training thread's CPU time that must not be passed."""

SAMPLED = {
    "with gradients": {"weight_alignment": False},
    "with weight-space alignment": {},
}

Pairs = Mapping[str, Sequence[tuple[Block, tuple[Block, Block]]]]


def usable(job: Job, contenders: Sequence[Contender], directory: Path) -> tuple[list[Contender], dict[str, str]]:
    """Try each contender on a few steps; those that cannot run are named with the reason."""
    works, missing = [], {}
    for contender in contenders:
        if not contender.installed:
            missing[contender.name] = f"not installed: pip install {contender.needs}"
            continue
        try:
            measure(job, contender, directory / "trial", 1)
        except Exception as error:
            if contender.kind != "peer":
                raise
            missing[contender.name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[
                :200
            ]
        else:
            works.append(contender)
    return works, missing


def table(contenders: Sequence[Contender], pairs: Pairs, missing: Mapping[str, str]) -> str:
    """The figures as markdown; `x ours` compares with ours of the same period with everything on."""
    thread = {name: overhead(found, "thread") for name, found in pairs.items()}
    lines = [
        "| monitor | training thread CPU % (quartiles) | s.e. | x ours | process CPU % | wall % | MB a step | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for contender in contenders:
        found = pairs[contender.name]
        own = thread.get(f"ours, with weight-space alignment, every {contender.every}")
        mine = thread[contender.name]
        ratio = f"{mine.median / own.median:.1f}" if own and own.median > 0 and contender.kind == "peer" else ""
        process, wall = overhead(found, "process"), overhead(found, "wall")
        megabytes = statistics.median(block.megabytes for block, _ in found)
        notes = []
        if contender.kind == "ours":
            notes.append(f"ring of {KEEP} frames: {KEEP * megabytes * contender.every / 1e3:.1f} GB")
        if dropped := sum(block.dropped for block, _ in found):
            notes.append(f"{dropped} frames dropped")
        quartiles = f"({mine.low:+.2f}, {mine.high:+.2f})"
        lines.append(
            f"| {contender.name} | {mine.median:+.2f} {quartiles} | {mine.standard_error:.2f} | {ratio} | "
            f"{process.median:+.1f} | {wall.median:+.1f} | {megabytes:.2f} | {'; '.join(notes)} |"
        )
    lines += [f"| {name} | {reason} | | | | | | |" for name, reason in missing.items()]
    return "\n".join(lines)


def verdicts(contenders: Sequence[Contender], pairs: Pairs, sampled: Mapping[str, Estimate]) -> list[tuple[str, str]]:
    """Each promise with what was found; "unresolved" where the noise decides."""
    thread = {name: overhead(found, "thread") for name, found in pairs.items()}
    found: list[tuple[str, str]] = []
    for name, line in LINES.items():
        if name in thread:
            found.append((f"{name}: below {line:g} %", _judge(thread[name], line)))
    for every in (10, 1):
        peers = [contender for contender in contenders if contender.kind == "peer" and contender.every == every]
        name = f"ours, with weight-space alignment, every {every}"
        if peers and name in thread:
            least = min(peers, key=lambda peer: thread[peer.name].median)
            claim = f"{name}: below the cheapest peer of that period, {least.name}"
            found.append((claim, _judge(thread[name], thread[least.name].median, thread[least.name].standard_error)))
    found += [
        (f"a sampled step, {name}, against its unsampled neighbours: below {line:g} %", _judge(sampled[name], line))
        for name, line in (("with weight-space alignment", 10.0), ("with gradients", 3.0))
    ]
    alignment = [f"ours, with {what}, every 1" for what in ("weight-space alignment", "gradients")]
    if all(name in thread for name in alignment):
        own = thread[alignment[0]].median - thread[alignment[1]].median
        found.append(("weight-space alignment's own cost at every 1", f"{own:+.2f} % of the training thread"))
    return found


def _judge(estimate: Estimate, line: float, line_error: float = 0.0) -> str:
    error = (estimate.standard_error**2 + line_error**2) ** 0.5
    away = abs(estimate.median - line) > 2 * error
    word = ("kept" if estimate.median < line else "BROKEN") if away else "unresolved: within two standard errors"
    return f"{estimate.median:+.2f} +- {estimate.standard_error:.2f} % against {line:.2f} %: {word}"


def compare(given: argparse.Namespace) -> int:
    torch.set_num_threads(given.threads)
    job = Job(Size())
    begun = time.strftime("%Y-%m-%dT%H:%M:%S")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for _ in range(3):
            job.step()
        wanted = [
            contender
            for contender in CONTENDERS
            if given.only in contender.name or contender.name == "nothing (the noise)"
        ]
        contenders, missing = usable(job, wanted, directory)
        pairs: defaultdict[str, list[tuple[Block, tuple[Block, Block]]]] = defaultdict(list)
        records = []
        for index, contender, block, neighbours in interleave(
            job, contenders, directory, given.rounds, given.steps, given.bare_steps
        ):
            pairs[contender].append((block, neighbours))
            records.append(as_record(index, contender, block, neighbours))
            if given.verbose:
                print(index, contender, overhead([(block, neighbours)], "thread").median, file=sys.stderr, flush=True)
        bare = [block.thread for found in pairs.values() for _, neighbours in found for block in neighbours]
        print(
            f"torch {torch.__version__}, {given.threads} thread(s), load {os.getloadavg()[0]:.1f}; "
            f"{given.rounds} rounds; a bare step: {1e3 * statistics.median(bare):.0f} ms of CPU (sd of blocks "
            f"{100 * statistics.pstdev(bare) / statistics.mean(bare):.1f} %)\n"
        )
        print(table(contenders, pairs, missing), flush=True)
        record = {"begun": begun, "torch": torch.__version__, "threads": given.threads}
        record |= {"blocks": records, "missing": missing}
        save(given.json, record)
        sampled = {
            name: sampled_step_overhead(job, ours(every=5, **options), directory / "sampled", given.periods)
            for name, options in SAMPLED.items()
        }
        record |= {"sampled": {name: asdict(estimate) for name, estimate in sampled.items()}}
        save(given.json, record)
        parts = breakdown(job, directory / "breakdown", 10)
        save(given.json, record | {"breakdown_ms": parts})
    print("\n| promise | found |\n|---|---|")
    judged = verdicts(contenders, pairs, sampled)
    for claim, found in judged:
        print(f"| {claim} | {found} |")
    print("\n| a sampled step of ours, all on: training thread | ms | % of a bare step |\n|---|---|---|")
    for part, milliseconds in parts.items():
        print(f"| {part} | {milliseconds:.2f} | {milliseconds / 10 / statistics.median(bare):.2f} |")
    return 1 if any("BROKEN" in found for _, found in judged) else 0


def save(path: Path | None, record: object) -> None:
    if path is not None:
        path.write_text(json.dumps(record, indent=1))


def on_gpu(given: argparse.Namespace) -> int:
    from _cuda import measure as measure_on_gpu

    if not torch.cuda.is_available():
        print("expected a CUDA device; found none: run this benchmark on a machine with one", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n| GPT-2 124M | found | |\n|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for compiled in (False, True):
            for every in (10, 1):
                rows += (part := measure_on_gpu(Path(name), given.rounds, given.steps, every, compiled))
                for label, found, kept in part:
                    print(f"| {label} | {found} | {'' if kept else 'BROKEN'} |", flush=True)
    save(given.json, {"device": torch.cuda.get_device_name(), "rows": rows})
    return 0 if all(kept for *_, kept in rows) else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py bench overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="steps of a block, up to a multiple of its period")
    parser.add_argument("--bare-steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the training job")
    parser.add_argument("--only", default="", help="contenders with this in their name")
    parser.add_argument("--json", type=Path, help="write the raw figures there")
    parser.add_argument("--verbose", action="store_true", help="each block as it is measured")
    parser.add_argument("--periods", type=int, default=40, help="sampled steps compared with their neighbours")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--memory", action="store_true", help="memory over a long run, instead of time")
    parser.add_argument("--memory-steps", type=int, default=10_000)
    given = parser.parse_args()
    if given.memory:
        grows, samples = memory(given.memory_steps, given.device)
        save(given.json, samples)
        return grows
    return on_gpu(given) if given.device == "cuda" else compare(given)


if __name__ == "__main__":
    sys.exit(main())
