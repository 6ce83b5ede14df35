"""What a model's blocks hold about the tokens before and after: one stream over the text, no activations kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from entropy_monitor.errors import ConfigError, EntropyMonitorError
from entropy_monitor.estimators import (
    MutualInformation,
    information_bottleneck_bound,
    optimality,
)
from entropy_monitor.ranking.labels import ORDERS, ngram_labels
from entropy_monitor.ranking.listener import Listener
from entropy_monitor.ranking.reason import reason
from entropy_monitor.types import PATCH_LENGTH

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from jaxtyping import Int
    from torch import Tensor

    from entropy_monitor.estimators import Optimality, SoftEntropy


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptions:
    """How a text is shown to the models; the same for all of them, or their figures could not be compared."""

    max_tokens: int = 65536
    block: int = 512
    """Tokens that a model sees at once."""
    batch: int = 8
    """Blocks of text in a forward pass."""
    bins: int = 100
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("block", PATCH_LENGTH), ("batch", 1), ("bins", 2), ("max_tokens", self.block)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise ConfigError(f"expected --{option} of at least {least}; found {getattr(self, name)}: give more")
        if self.block % PATCH_LENGTH:
            raise ConfigError(f"expected --block to be a multiple of {PATCH_LENGTH}; found {self.block}: round it")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its standard error; NaN where undetermined."""

    value: float
    std_error: float

    @property
    def is_known(self) -> bool:
        """Whether value and error are both determined."""
        return math.isfinite(self.value) and math.isfinite(self.std_error)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScore:
    """One residual block; information in nats, by n-gram order from 1."""

    layer: str
    soft_entropy: Estimate
    """Over ``log m``, corrected for the finite sample."""
    input_information: tuple[Estimate, ...]
    """I(X;Z): about the tokens that end here."""
    output_information: tuple[Estimate, ...]
    """I(Y;Z): about the tokens that follow."""
    optimality: Estimate
    num_undetermined: int
    """Tokens whose activation is zero and has no direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScore:
    """A model: means over its blocks."""

    name: str
    num_tokens: int
    soft_entropy: Estimate
    """Over ``log m``, from 0 to 1."""
    input_information: tuple[Estimate, ...]
    output_information: tuple[Estimate, ...]
    optimality: Estimate
    """``I(Y;Z) / I(X;Z)`` of the means over blocks, for n-grams of 1."""
    distance: Estimate
    """From I(Y;Z) up to its bound ``I(X;Z)``, in nats, for n-grams of 1."""
    layers: tuple[LayerScore, ...]


def score_model(
    name: str,
    model: nn.Module,
    taps: Mapping[str, nn.Module],
    ids: Int[Tensor, " t"],
    options: RankOptions,
    advance: Callable[[int], None] = lambda num_tokens: None,
) -> ModelScore:
    """Run a model over a text once and measure its blocks.

    Each block's output goes straight into an accumulator of soft assignments. Consecutive tokens are alike: those of a
    patch of 8 count as drawn together in every standard error. Means over blocks carry the mean of the blocks' standard
    errors, an upper bound: all blocks saw the same tokens.

    Source: arXiv 2604.07569.

    Args:
        name: for the result.
        model: takes ids ``[batch, tokens]``.
        taps: the blocks to observe, by name, in model order.
        ids: the text, ``[t]``; tokens behind the last whole block are seen as outputs only.
        options: how the text is shown.
        advance: told the number of tokens after each forward pass.

    Returns:
        The score.

    Raises:
        ConfigError: the text is shorter than a block, or has ids that the model does not know.
        EntropyMonitorError: the model raises, or a block's output cannot be measured.
    """
    _check_ids(name, model, ids, options.block)
    labels = ngram_labels(ids, options.block)
    blocks_BT = ids[: len(ids) // options.block * options.block].reshape(-1, options.block)
    listener = Listener(options.bins, PATCH_LENGTH)
    model.eval().to(options.device)
    with torch.inference_mode(), listener.attached(taps):
        for batch_BT, first in zip(
            blocks_BT.split(options.batch), range(0, len(blocks_BT), options.batch), strict=True
        ):
            begin = first * options.block
            listener.expect(
                batch_BT, {side: label_N[begin : begin + batch_BT.numel()] for side, label_N in labels.items()}
            )
            _forward(name, model, batch_BT.to(options.device))
            advance(batch_BT.numel())
        informations = {
            layer: {side: accumulator.mutual_information(side) for side in labels}
            for layer, accumulator in listener.accumulators(taps, blocks_BT.numel()).items()
        }
        entropies = {layer: found.entropy_estimate(normalize=True) for layer, found in listener.found.items()}
        missed = {layer: found.num_undetermined for layer, found in listener.found.items()}
    layers = tuple(_layer_score(layer, entropies[layer], informations[layer], missed[layer]) for layer in informations)
    return _model_score(name, blocks_BT.numel(), layers, list(informations.values()))


def _check_ids(name: str, model: nn.Module, ids: Tensor, block: int) -> None:
    if len(ids) < block:
        raise ConfigError(
            f"expected at least one block of {block} tokens for {name}; found {len(ids)}: "
            "give a longer --text or a shorter --block"
        )
    embedding = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    highest = int(ids.max())
    if int(ids.min()) < 0 or (embedding is not None and highest >= embedding.num_embeddings):
        known = "" if embedding is None else f" to {embedding.num_embeddings - 1}"
        raise ConfigError(
            f"expected ids from 0{known} for {name}; found {int(ids.min())} to {highest}: "
            "let the factory return (module, tokenize) with the model's own tokenizer"
        )


def _forward(name: str, model: nn.Module, ids_BT: Tensor) -> None:
    try:
        model(ids_BT)
    except EntropyMonitorError:
        raise
    except Exception as error:  # user code may raise anything
        raise EntropyMonitorError(
            f"expected {name} to take ids of shape {tuple(ids_BT.shape)}; it raised {reason(error)}: "
            "a --block within its context may help"
        ) from error


def _layer_score(
    layer: str, soft_entropy: SoftEntropy, informations: Mapping[str, MutualInformation], num_undetermined: int
) -> LayerScore:
    inputs, outputs = ([informations[f"{side}_{order}"] for order in ORDERS] for side in ("input", "output"))
    return LayerScore(
        layer=layer,
        soft_entropy=_estimate(soft_entropy),
        input_information=tuple(_estimate(information) for information in inputs),
        output_information=tuple(_estimate(information) for information in outputs),
        optimality=_estimate(optimality(inputs[0], outputs[0])),
        num_undetermined=num_undetermined,
    )


def _model_score(
    name: str, num_tokens: int, layers: tuple[LayerScore, ...], informations: list[Mapping[str, MutualInformation]]
) -> ModelScore:
    inputs, outputs = (
        [_mean([found[f"{side}_{order}"] for found in informations]) for order in ORDERS]
        for side in ("input", "output")
    )
    bound = information_bottleneck_bound(inputs[0], output_information=outputs[0])
    error = math.hypot(inputs[0].std_error, outputs[0].std_error)
    return ModelScore(
        name=name,
        num_tokens=num_tokens,
        soft_entropy=_mean_estimate([layer.soft_entropy for layer in layers]),
        input_information=tuple(_estimate(information) for information in inputs),
        output_information=tuple(_estimate(information) for information in outputs),
        optimality=_estimate(optimality(inputs[0], outputs[0])),
        distance=Estimate(float(cast("Tensor", bound.distance)), error),
        layers=layers,
    )


def _mean(informations: list[MutualInformation]) -> MutualInformation:
    """Average over blocks; counts are the same in all."""
    return informations[0]._replace(
        value=torch.stack([information.value for information in informations]).mean(),
        std_error=torch.stack([information.std_error for information in informations]).mean(),
        plug_in=torch.stack([information.plug_in for information in informations]).mean(),
        bias=torch.stack([information.bias for information in informations]).mean(),
    )


def _mean_estimate(figures: list[Estimate]) -> Estimate:
    return Estimate(fmean(figure.value for figure in figures), fmean(figure.std_error for figure in figures))


def _estimate(figure: MutualInformation | Optimality | SoftEntropy) -> Estimate:
    return Estimate(float(figure.value), float(figure.std_error))
