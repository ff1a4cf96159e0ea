"""Imports what merging and scoring need, once for all processes of a protocol."""

from __future__ import annotations

import datasets
import torch
import transformers
from transformers.models.auto import image_processing_auto, modeling_auto

from mergesearch.evaluators.spec import evaluators
from mergesearch.merging.kernels import spans_numba
from mergesearch.merging.models import loading
from mergesearch.search.plan import planning
from mergesearch.search.workers import worker

LOADED = (
    datasets,
    torch,
    transformers,
    image_processing_auto,
    modeling_auto,
    evaluators,
    spans_numba,
    loading,
    planning,
    worker,
)
