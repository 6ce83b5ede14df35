"""Ranking of saved models by soft entropy, optimality and distance to the bound, on a text (arXiv 2604.07569)."""

from __future__ import annotations

from entropy_monitor.ranking.labels import ngram_labels
from entropy_monitor.ranking.load import LoadedModel, ModelSource, find_source
from entropy_monitor.ranking.order import Rank, rank_scores
from entropy_monitor.ranking.score import Estimate, LayerScore, ModelScore, RankOptions, score_model
from entropy_monitor.ranking.text import TextSample, read_text

__all__ = [
    "Estimate",
    "LayerScore",
    "LoadedModel",
    "ModelScore",
    "ModelSource",
    "Rank",
    "RankOptions",
    "TextSample",
    "find_source",
    "ngram_labels",
    "rank_scores",
    "read_text",
    "score_model",
]
