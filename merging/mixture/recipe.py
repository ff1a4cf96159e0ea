"""Recipes of one model: a base without experts, an operator on its mixture, hyperparameters.

::

    base: models/mixtral
    operator: mc_smoe
    hyperparameters:
      experts: 4
      calibration:
        data: items
        model_class: AutoModelForCausalLM
        inputs: {input_ids: input_ids, attention_mask: attention_mask}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesearch.merging.checkpoints.locations import absolute_path, is_hub_name, short_name
from mergesearch.merging.errors import RecipeError, did_you_mean
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.shown import name_shown, shown
from mergesearch.merging.foreign.yaml_text import read_yaml
from mergesearch.merging.mixture.operators import (
    MIXTURE_OPERATORS,
    MixtureOperator,
    MixtureOptions,
)
from mergesearch.merging.models.calibration_spec import absolute, refuse_calibration
from mergesearch.merging.tensors.layout import Layout

#: Keys of a recipe; ``fingerprint`` is that of the base, and written with every model.
KEYS = ("base", "operator", "hyperparameters", "fingerprint", "exported")


@dataclass(frozen=True)
class MixtureRecipe:
    """How one mixture is made smaller.

    Attributes:
        name: Of the base, for tables.
        base: Its path.
        operator: What is done.
        options: Its hyperparameters.
        fingerprint: Of the base's weights; empty where it is not known.
    """

    name: str
    base: str
    operator: MixtureOperator
    options: MixtureOptions
    fingerprint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The recipe as it is written."""
        known = {"fingerprint": self.fingerprint} if self.fingerprint else {}
        return {
            "base": self.base,
            **known,
            "operator": self.operator.name,
            "hyperparameters": self.options.model_dump(),
        }


def is_mixture_recipe(path: Path) -> bool:
    """Whether a file is a recipe of one model: its operator is one of those on mixtures.

    Files that cannot be read are left to those who read recipes.
    """
    try:
        data = read_yaml(path, RecipeError)
    except RecipeError:
        return False
    name = data.get("operator") if isinstance(data, dict) else None
    return isinstance(name, str) and name in MIXTURE_OPERATORS


def load_mixture_recipe(path: Path) -> MixtureRecipe:
    """Read a recipe of one model; its relative paths start at its folder.

    Raises:
        RecipeError: If it is malformed, or its calibration is.
    """
    where = name_shown(str(path), 200)
    node = Node(read_yaml(path, RecipeError, what="a readable recipe file"), where, RecipeError)
    data = node.mapping()
    if "experts" in data:
        raise RecipeError(
            f"{where}: experts: expected none, as operator {shown(data.get('operator'))} makes one "
            "mixture smaller, received some; put their number under hyperparameters"
        )
    odd = next((key for key in data if key not in KEYS), None)
    if odd is not None:
        raise RecipeError(f"{where}: unknown key {shown(odd)}; {did_you_mean(odd, KEYS)}")
    operator = get_mixture_operator(node.at("operator").text())
    base = _located(node.at("base").text(), path.parent)
    given = absolute(node.get("hyperparameters", {}).mapping(), path.parent)
    try:
        options = parse_options(operator, given)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    fingerprint = node.get("fingerprint", "").text()
    return MixtureRecipe(short_name(base), base, operator, options, fingerprint)


def _located(base: str, folder: Path) -> str:
    full = absolute_path(base, folder)
    missing = full == base and not is_hub_name(base)  # messages say where it was looked for
    return os.path.abspath(folder / Path(base).expanduser()) if missing else full


def get_mixture_operator(name: str) -> MixtureOperator:
    """The operator of a name.

    Raises:
        RecipeError: If there is none.
    """
    if name not in MIXTURE_OPERATORS:
        raise RecipeError(
            f"operator: expected one on mixtures, received {shown(name)}; "
            f"{did_you_mean(name, MIXTURE_OPERATORS)}"
        )
    return MIXTURE_OPERATORS[name]


def parse_options(operator: MixtureOperator, given: Mapping[str, Any]) -> MixtureOptions:
    """Hyperparameters, checked before any weight is read.

    Raises:
        RecipeError: In one line.
    """
    from pydantic import ValidationError

    try:
        options = operator.options.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(name_shown(str(part)) for part in first["loc"])
        raise RecipeError(
            f"operator {operator.name}: hyperparameters.{path}: {first['msg']}, received "
            f"{shown(first['input'])}; known: {', '.join(operator.options.model_fields)}"
        ) from None
    reason = _refused(operator, options)
    if reason is not None:
        raise RecipeError(f"operator {operator.name}: {reason}")
    return options


def _refused(operator: MixtureOperator, options: MixtureOptions) -> str | None:
    """What is wrong with hyperparameters that are each right."""
    if options.allocation == "usage" and isinstance(options.experts, list):
        return (
            "experts: expected one number, the mean, with allocation 'usage', received a list; "
            "give a number or allocation 'uniform'"
        )
    if operator.drops and (options.allocation == "usage" or options.router != "dominant"):
        return (
            "expected allocation 'uniform' and router 'dominant', for experts that are dropped "
            "leave nothing to store in their place, received others"
        )
    if getattr(options, "density", 0) and getattr(options, "rank", None) is None:
        return "density: expected a rank beside it, received none; give both or neither"
    calibration = options.calibration
    if isinstance(calibration, dict):
        if not isinstance(calibration["data"], str):
            return "calibration.data: expected one folder, received several; there is one model"
        extra = sorted({"domain", "prompts", "classes", "tokenizer"} & set(calibration))
        if extra:
            return f"calibration.{extra[0]}: expected none for one model, received one; remove it"
    return refuse_calibration(Layout((), 0), 0, {"calibration": calibration})
