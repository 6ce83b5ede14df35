"""``entropy-monitor rank``: saved models, ordered by what they keep of a text."""

from __future__ import annotations

import json
import math
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from entropy_monitor.errors import ConfigError, EntropyMonitorError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from entropy_monitor.ranking import Estimate, ModelScore, ModelSource, Rank, RankOptions, TextSample

_PIPE_WIDTH = 200


def rank(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Hugging Face directories, or package.module:factory or file.py:factory; @FILE adds a checkpoint."
        ),
    ],
    text: Annotated[Path, typer.Option(help="The text to rank on.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens of the text to use.")] = 65536,
    block: Annotated[int, typer.Option(help="Tokens that a model sees at once; within its context.")] = 512,
    batch: Annotated[int, typer.Option(help="Blocks in a forward pass.")] = 8,
    bins: Annotated[int, typer.Option(help="Reference directions of soft entropy.")] = 100,
    layers: Annotated[
        list[str] | None, typer.Option(help="Modules to observe, names or globs; the residual blocks by default.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device; the GPU if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Rank saved models by optimality on a text; what the errors cannot tell apart is tied."""
    try:
        from entropy_monitor.ranking import RankOptions, find_source, rank_scores, read_text
    except ImportError as error:
        raise ConfigError(f"ranking needs {error.name}: pip install 'entropy-monitor[watch]'") from error
    options = RankOptions(max_tokens=max_tokens, block=block, batch=batch, bins=bins, device=_device(device))
    sample = read_text(text, max_tokens)
    # What models and factories print is none of the result.
    with redirect_stdout(sys.stderr):
        sources = [find_source(name) for name in models]
        scores, alike = _score_all(sources, sample, layers, options)
    ranks = rank_scores(scores)
    if as_json:
        typer.echo(json.dumps(_without_nan(_summary(ranks, options, text, alike))))
        return
    _show(ranks, alike)


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # the meta device has tensors, but no numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"expected a device that torch can use; found {name} ({reason}): cpu always works") from error
    return name


def _score_all(
    sources: list[ModelSource], sample: TextSample, layers: list[str] | None, options: RankOptions
) -> tuple[list[ModelScore], bool]:
    """One model after the other, so that only one is in memory; also whether all read the text as the same ids."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn())
    scores: list[ModelScore] = []
    first_ids: Tensor | None = None
    alike = True
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for source in sources:
            task = progress.add_task(f"{source.name}: loading", total=None)
            loaded = source.load()
            ids = sample.tokens(loaded.tokenize)
            progress.update(task, description=source.name, total=len(ids))
            advance: Callable[[int], None] = lambda count, task=task: progress.advance(task, count)  # noqa: E731
            scores.append(_score(source.name, loaded.model, ids, layers, options, advance))
            alike = alike and (first_ids is None or ids.equal(first_ids))
            first_ids = ids
    return scores, alike


def _score(
    name: str,
    model: nn.Module,
    ids: Tensor,
    layers: list[str] | None,
    options: RankOptions,
    advance: Callable[[int], None],
) -> ModelScore:
    from entropy_hooks.taps import find_taps
    from entropy_monitor.ranking import score_model
    from entropy_monitor.ranking.reason import reason

    taps = find_taps(model, layers)
    if layers is None and taps == dict(model.named_children()):
        raise ConfigError(
            f"expected residual blocks in {name}, a ModuleList of one class; found none in {type(model).__name__}: "
            "name the modules to observe with --layers"
        )
    try:
        return score_model(name, model, taps, ids, options, advance)
    except RuntimeError as error:  # memory and device
        raise EntropyMonitorError(f"expected to measure {name}; {reason(error)}: a smaller --batch may help") from error


def _summary(ranks: list[Rank], options: RankOptions, text: Path, alike: bool) -> dict[str, Any]:
    return {
        "text": str(text),
        "options": asdict(options),
        "units": {"soft_entropy": "fraction of ln bins", "information and distance": "nats", "optimality": "ratio"},
        "same_tokens": alike,
        "models": [{"rank": found.position, "tied": found.tied, **asdict(found.score)} for found in ranks],
    }


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: undetermined is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _show(ranks: list[Rank], alike: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for head in ("rank", "model", "H/ln m", "I(X;Z)", "I(Y;Z)", "optimality", "to bound", "tokens"):
        table.add_column(head, overflow="fold")
    for found in ranks:
        score = found.score
        position = "-" if found.position is None else f"{found.position}{' tied' if found.tied else ''}"
        table.add_row(
            position,
            score.name,
            _figure(score.soft_entropy),
            _orders(score.input_information),
            _orders(score.output_information),
            _figure(score.optimality),
            _figure(score.distance),
            str(score.num_tokens),
        )
    # Rich takes 80 columns where there is no terminal; a pipe has no edge at which lines must be folded.
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    console.print(table)
    console.print("I in nats, about the 1/2/3 tokens up to here (X) and from the next (Y); means over blocks")
    console.print("± is one standard error; those of I are in --json")
    if not alike:
        console.print("The models read the text as different tokens: their information is about different things.")


def _orders(estimates: tuple[Estimate, ...]) -> str:
    if not any(estimate.is_known for estimate in estimates):
        return "undetermined"
    return "/".join(f"{estimate.value:.3f}" if estimate.is_known else "-" for estimate in estimates)


def _figure(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ± {estimate.std_error:.3f}" if estimate.is_known else "undetermined"
