"""Operators by name: one file per algorithm, one line here per operator. Loads no torch.

Packages add others by entry points of the group ``mergesearch.operators``.
"""

from __future__ import annotations

from collections.abc import Mapping

from mergesearch.merging.errors import RecipeError, did_you_mean
from mergesearch.merging.extensions.references import is_reference
from mergesearch.merging.extensions.table import Table
from mergesearch.merging.foreign.shown import shown
from mergesearch.merging.operators.average import AVERAGE
from mergesearch.merging.operators.base import IDENTITIES, Basis, Operator
from mergesearch.merging.operators.blend import MEMBERS, blend_of
from mergesearch.merging.operators.breadcrumbs import BREADCRUMBS
from mergesearch.merging.operators.concrete import CONCRETE
from mergesearch.merging.operators.consensus import CONSENSUS
from mergesearch.merging.operators.custom import as_operator
from mergesearch.merging.operators.dare import DARE, DARE_TIES
from mergesearch.merging.operators.della import DELLA, DELLA_LINEAR
from mergesearch.merging.operators.doge import DOGE
from mergesearch.merging.operators.dop import DOP
from mergesearch.merging.operators.emr import EMR
from mergesearch.merging.operators.fisher import FISHER
from mergesearch.merging.operators.iso import ISO_C, ISO_CTS
from mergesearch.merging.operators.knots import KNOTS
from mergesearch.merging.operators.layer_swap import LAYER_SWAP
from mergesearch.merging.operators.lines import LINES
from mergesearch.merging.operators.localize_and_stitch import LOCALIZE_AND_STITCH
from mergesearch.merging.operators.lora_sparse import LORA_SPARSE
from mergesearch.merging.operators.magmax import MAGMAX
from mergesearch.merging.operators.model_stock import MODEL_STOCK
from mergesearch.merging.operators.opcm import OPCM
from mergesearch.merging.operators.opcm_add import OPCM_ADD
from mergesearch.merging.operators.optmerge import OPTMERGE
from mergesearch.merging.operators.pcb import PCB
from mergesearch.merging.operators.pleas import PLEAS
from mergesearch.merging.operators.regmean import REGMEAN
from mergesearch.merging.operators.regmean_pp import REGMEAN_PP
from mergesearch.merging.operators.sce import SCE
from mergesearch.merging.operators.slerp import SLERP
from mergesearch.merging.operators.stack import STACK
from mergesearch.merging.operators.svc import SVC
from mergesearch.merging.operators.task_arithmetic import TASK_ARITHMETIC
from mergesearch.merging.operators.ties import TIES
from mergesearch.merging.operators.tsv import TSV
from mergesearch.merging.operators.varm import VARM
from mergesearch.merging.operators.widen import WIDEN
from mergesearch.merging.operators.wudi import WUDI
from mergesearch.merging.tensors.source import Factors, Options, TensorSource

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
    LOCALIZE_AND_STITCH,
    LORA_SPARSE,
    MAGMAX,
    PCB,
    SCE,
    TIES,
    # spectral
    DOGE,
    DOP,
    ISO_C,
    ISO_CTS,
    KNOTS,
    OPCM,
    OPCM_ADD,
    OPTMERGE,
    SVC,
    TSV,
    WUDI,
    # column
    WIDEN,
    # data
    FISHER,
    PLEAS,
    REGMEAN,
    REGMEAN_PP,
    # learned
    CONCRETE,
)

_SINGLE: Mapping[str, Operator] = {operator.name: operator for operator in _ALL}

#: ``blend`` has the others as members, those of plug-ins among them.
BLEND = blend_of(Table("operators", _SINGLE, as_operator))

OPERATORS: Table[Operator] = Table("operators", {**_SINGLE, BLEND.name: BLEND}, as_operator)


def members_of(options: Options) -> list[Operator]:
    """The members of a blend, the leader first; its defaults where options name none."""
    return [OPERATORS[name] for name in options.get("members", MEMBERS)]


def get_operator(name: str) -> Operator:
    """The operator called ``name``.

    Raises:
        RecipeError: If there is none; the message lists the known names and the closest.
    """
    if name in OPERATORS:
        return OPERATORS[name]
    if is_reference(name):
        raise RecipeError(
            f"operator: expected an operator that this process knows, received {shown(name)}; a "
            "study with allow_code: true may name one of a module, and a program may give one"
        )
    raise RecipeError(
        f"operator: expected an operator, received {shown(name)}; {did_you_mean(name, OPERATORS)}"
    )
