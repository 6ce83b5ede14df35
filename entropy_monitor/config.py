"""Options of the hooks and of the watcher: keyword > ``ENTROPY_MONITOR_*`` > ``./monitor.toml`` > default."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from entropy_monitor.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

Control = Literal["off", "advise", "auto"]
Observe = Literal["training", "probe"]
ENVIRONMENT_PREFIX = "ENTROPY_MONITOR_"
_TABLES = ("hooks", "watch", "gapt")


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorOptions:
    """What the hooks sample, how often, and whether they may steer."""

    every: int = 10
    """A step is sampled when ``step % every == 0``."""
    patches: int = 64
    """Patches of 8 consecutive tokens drawn for each frame, the same for every layer."""
    layers: tuple[str, ...] | None = None
    """Module names or globs; None taps the residual blocks."""
    gradients: bool = True
    weight_alignment: bool = True
    """Compute the weight-space CE-MBE alignment on the trainer's device at sampled steps; needs `gradients`."""
    steer: bool = False
    """Whether commands may change training. Without it every command is rejected: observe-only."""
    steer_layers: tuple[str, ...] | None = None
    """Module names or globs among the tapped layers; None steers the middle half."""
    keep: int = 256
    """Committed frames a rank keeps on disk, rounded up to whole segments of 64."""
    start_step: int = 0
    total_steps: int | None = None
    """Planned optimizer steps, from which the controller takes its patience."""
    max_overhead: float | None = None
    """Share of the training time that observing may take, such as .01: `every` grows until it is kept. None obeys
    `every` exactly, and only shows the cost."""
    loss_scale: float | None = None
    """d(total loss)/d(CE), where it cannot be read off the graph (several loss terms)."""
    exact_alignment_every: int = 0
    """Audit the alignment by autograd on the probe batch when ``step % exact_alignment_every == 0``; 0 never does."""
    observe: Observe = "training"
    """What a frame holds: the training batch's last pass, or a pass on the fixed probe batch at the same parameters."""
    token_dim: int | None = None
    """Sequence axis of the activations; None takes the module's ``batch_first``, else 1."""

    def __post_init__(self) -> None:
        _at_least("every", self.every, 1, "1 samples every step")
        _at_least("patches", self.patches, 2, "a standard error needs two")
        _at_least("keep", self.keep, 1, "the ring keeps whole segments of 64 frames")
        _at_least("start_step", self.start_step, 0, "it counts optimizer steps")
        if self.total_steps is not None:
            _at_least("total_steps", self.total_steps, 1, "leave it out when it is unknown")
        if self.loss_scale is not None and not 0 < self.loss_scale < float("inf"):
            raise ConfigError(f"expected a finite loss_scale > 0; found {self.loss_scale}: leave it out to read it off")
        if self.max_overhead is not None and not 0 < self.max_overhead <= 1:
            raise ConfigError(
                f"expected max_overhead in (0, 1], a share of the training time; found {self.max_overhead}: .01 is 1 %"
            )
        _at_least("exact_alignment_every", self.exact_alignment_every, 0, "0 never audits")
        if self.exact_alignment_every % self.every:
            raise ConfigError(
                f"expected exact_alignment_every to be a multiple of every, {self.every}; found "
                f"{self.exact_alignment_every}: audits travel with frames, choose e.g. {10 * self.every}"
            )
        if self.observe not in get_args(Observe):
            raise ConfigError(f"expected observe training or probe; found {self.observe!r}: correct the value")
        if self.token_dim not in (None, 0, 1):
            raise ConfigError(f"expected token_dim 0 or 1; found {self.token_dim}: leave it out for the module's own")


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOptions:
    """How the watcher joins ranks and what its controller may do."""

    control: Control = "advise"
    join_timeout_s: float = 10.0
    """How long a step waits for the ranks that have not committed it."""

    def __post_init__(self) -> None:
        if self.control not in get_args(Control):
            raise ConfigError(f"expected control off, advise or auto; found {self.control!r}")
        if not 0 <= self.join_timeout_s < float("inf"):
            raise ConfigError(f"expected join_timeout_s >= 0; found {self.join_timeout_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorConfig:
    """Everything that one ``monitor.toml`` can say."""

    run: str | None = None
    hooks: MonitorOptions = field(default_factory=MonitorOptions)
    watch: WatchOptions = field(default_factory=WatchOptions)
    gapt: dict[str, Any] = field(default_factory=dict[str, Any])
    """Keyword arguments of `entropy_monitor.gapt.GateOptions`; the watcher validates them."""


def hooks_disabled() -> bool:
    """Whether ``ENTROPY_MONITOR_MODE`` turns every hook off.

    Returns:
        True when it says so.

    Raises:
        ConfigError: it says something else.
    """
    mode = os.environ.get("ENTROPY_MONITOR_MODE", "").lower()
    if mode not in ("", "disabled"):
        raise ConfigError(f"expected ENTROPY_MONITOR_MODE to be 'disabled' or unset; found {mode!r}: correct it")
    return mode == "disabled"


def load_config(
    *,
    run: str | os.PathLike[str] | None = None,
    hooks: Mapping[str, Any] | None = None,
    watch: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    path: Path | None = None,
) -> MonitorConfig:
    """Merge the four sources.

    Args:
        run: run directory, or None.
        hooks: options given by keyword.
        watch: options given on the command line; None values count as absent.
        environment: the process environment; `os.environ` when None.
        path: the TOML file; ``monitor.toml`` in the working directory, if there is one, when None.

    Returns:
        The merged configuration.

    Raises:
        ConfigError: an option is unknown or wrong; the message names its source.
    """
    variables = os.environ if environment is None else environment
    tables = _read_toml(path or Path("monitor.toml"), must_exist=path is not None)
    return MonitorConfig(
        run=_run_of(run, variables, tables),
        hooks=_merge(MonitorOptions, tables.get("hooks", {}), variables, hooks or {}),
        watch=_merge(WatchOptions, tables.get("watch", {}), variables, _present(watch or {})),
        gapt=dict(tables.get("gapt", {})),
    )


def _run_of(run: object, variables: Mapping[str, str], tables: Mapping[str, Any]) -> str | None:
    chosen = run if run is not None else variables.get(f"{ENVIRONMENT_PREFIX}RUN") or tables.get("run")
    if chosen is not None and not isinstance(chosen, str | os.PathLike):
        raise ConfigError(f"expected run to be a path; found {chosen!r}: name a directory")
    return None if chosen is None else str(os.fspath(chosen))


def _merge(kind: type[Any], table: Mapping[str, Any], variables: Mapping[str, str], given: Mapping[str, Any]) -> Any:
    known = {entry.name: entry.type for entry in fields(kind)}
    from_environment = {
        name: _parse(f"{ENVIRONMENT_PREFIX}{name.upper()}", value, str(annotation))
        for name, annotation in known.items()
        if (value := variables.get(f"{ENVIRONMENT_PREFIX}{name.upper()}")) is not None
    }
    merged: dict[str, Any] = {}
    for source, values in (("file", table), ("environment", from_environment), ("call", given)):
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(
                f"expected options among {', '.join(known)}; found {', '.join(unknown)} (from the {source}): "
                "correct the name"
            )
        merged |= {
            name: _typed(f"{name} (from the {source})", value, str(known[name])) for name, value in values.items()
        }
    return kind(**merged)


def _typed(name: str, value: Any, annotation: str) -> Any:
    """Check a value against the annotation, where TOML and callers may be loose.

    Returns:
        The value, lists as tuples and whole numbers as floats where those are wanted.

    Raises:
        ConfigError: it has another type.
    """
    if annotation.startswith("tuple") and isinstance(value, list | tuple | str):
        value = (value,) if isinstance(value, str) else tuple(value)
        if all(isinstance(entry, str) for entry in value):
            return value
    elif value is None and "None" in annotation:
        return None
    elif annotation.startswith("bool"):
        if isinstance(value, bool):
            return value
    elif annotation.startswith("int"):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif annotation.startswith("float"):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, str):
        return value
    raise ConfigError(f"expected {name} of type {annotation}; found {value!r}: correct the value")


def _parse(source: str, text: str, annotation: str) -> Any:
    try:
        if annotation.startswith("tuple"):
            return tuple(entry.strip() for entry in text.split(",") if entry.strip())
        if annotation.startswith("bool"):
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
        if annotation.startswith("int"):
            return int(text)
        if annotation.startswith("float"):
            return float(text)
    except (ValueError, KeyError):
        raise ConfigError(f"expected {source} of type {annotation}; found {text!r}: correct or unset it") from None
    return text


def _read_toml(path: Path, *, must_exist: bool) -> dict[str, Any]:
    if not must_exist and not path.exists():
        return {}
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"expected a readable TOML file at {path}; {error}") from error
    if unknown := sorted(set(tables) - {"run", *_TABLES}):
        raise ConfigError(f"expected run and tables {', '.join(_TABLES)} in {path}; found {', '.join(unknown)}")
    for name in _TABLES:
        if not isinstance(tables.get(name, {}), dict):
            raise ConfigError(f"expected a table [{name}] in {path}; found {name} = {tables[name]!r}: make it one")
    return tables


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _at_least(name: str, value: int, minimum: int, why: str) -> None:
    if value < minimum:
        raise ConfigError(f"expected {name} >= {minimum}; found {value}: {why}")
