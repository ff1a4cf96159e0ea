"""Operators by name: one file per family, one line here per member. Loads no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from merging.errors import RecipeError
from merging.operators.average import AVERAGE
from merging.operators.base import IDENTITIES, Basis, Factors, Operator, Options, TensorSource
from merging.operators.breadcrumbs import BREADCRUMBS
from merging.operators.concrete import CONCRETE
from merging.operators.consensus import CONSENSUS
from merging.operators.dare import DARE, DARE_TIES
from merging.operators.della import DELLA, DELLA_LINEAR
from merging.operators.doge import DOGE
from merging.operators.emr import EMR
from merging.operators.fisher import FISHER
from merging.operators.iso import ISO_C, ISO_CTS
from merging.operators.knots import KNOTS
from merging.operators.layer_swap import LAYER_SWAP
from merging.operators.lines import LINES
from merging.operators.lora_sparse import LORA_SPARSE
from merging.operators.model_stock import MODEL_STOCK
from merging.operators.opcm import OPCM
from merging.operators.optmerge import OPTMERGE
from merging.operators.pcb import PCB
from merging.operators.regmean import REGMEAN
from merging.operators.regmean_pp import REGMEAN_PP
from merging.operators.sce import SCE
from merging.operators.slerp import SLERP
from merging.operators.stack import STACK
from merging.operators.task_arithmetic import TASK_ARITHMETIC
from merging.operators.ties import TIES
from merging.operators.tsv import TSV
from merging.operators.varm import VARM
from merging.operators.widen import WIDEN
from merging.operators.wudi import WUDI

__all__ = [
    "IDENTITIES",
    "OPERATORS",
    "Basis",
    "Factors",
    "Operator",
    "Options",
    "TensorSource",
    "get_operator",
]

_ALL = (
    # linear
    AVERAGE,
    LAYER_SWAP,
    LINES,
    MODEL_STOCK,
    SLERP,
    STACK,
    TASK_ARITHMETIC,
    VARM,
    # sparse
    BREADCRUMBS,
    CONSENSUS,
    DARE,
    DARE_TIES,
    DELLA,
    DELLA_LINEAR,
    EMR,
    LORA_SPARSE,
    PCB,
    SCE,
    TIES,
    # spectral
    DOGE,
    ISO_C,
    ISO_CTS,
    KNOTS,
    OPCM,
    OPTMERGE,
    TSV,
    WUDI,
    # column
    WIDEN,
    # data
    FISHER,
    REGMEAN,
    REGMEAN_PP,
    # learned
    CONCRETE,
)

OPERATORS: Mapping[str, Operator] = {operator.name: operator for operator in _ALL}


def get_operator(name: str) -> Operator:
    """The operator called ``name``.

    Raises:
        RecipeError: If there is none; the message lists the known names and the closest.
    """
    if name in OPERATORS:
        return OPERATORS[name]
    close = difflib.get_close_matches(name, OPERATORS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise RecipeError(f"operator: expected one of {sorted(OPERATORS)}, received {name!r}{hint}")
