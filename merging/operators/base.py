"""What an operator is: a function that prepares a basis, and what is declared about it.

Almost every published merge is ``base + Σ_k c_k · T_k(expert_k − base)`` once T is fixed. ``prepare`` fixes T, once;
a trial is then one weighted sum (:func:`merging.kernels.combine`). The keyword-only parameters of ``prepare`` are
the operator's hyperparameters: their names, annotations and defaults are the schema, and there is no other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from merging.errors import RecipeError
from merging.kernels import Form

if TYPE_CHECKING:
    import torch

#: What ``prepare`` must see at once: E one element, R a row, T a whole tensor, G whole-model statistics, S forward
#: passes in depth order.
Scope = Literal["E", "R", "T", "G", "S"]

#: Properties that an operator may declare; each is checked by ``tests/contracts/test_operators.py``.
IDENTITIES: Mapping[str, str] = {
    "base_at_zero": "coefficients 0 give the base, bit for bit",
    "expert_at_one_hot": "a one-hot coefficient gives that expert, bit for bit",
    "expert_near_one_hot": "a one-hot coefficient gives that expert, within rounding",
    "single_expert": "one expert with coefficient 1 gives that expert, within rounding",
    "identical_experts": "at the default coefficients, copies of one expert give that expert, within rounding",
    "permutation": "permuting experts together with their coefficients changes nothing but rounding",
    "linearity": "merged − base is linear in the coefficients, within rounding",
    "homogeneity": "scaling all task vectors by s > 0 scales merged − base by s, within rounding",
    "zero_vector": "an expert equal to the base adds nothing, whatever its coefficient, within rounding",
    "default_ignores_zero_vector": "as zero_vector, and the default coefficients stay what they were",
}


class TensorSource(Protocol):
    """Named tensors, read one at a time: a checkpoint on disk, or a mapping in memory."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the tensors."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in its stored dtype; not to be modified."""


@dataclass(frozen=True)
class Basis:
    """K prepared directions, worked out tensor by tensor so that preparation streams.

    Attributes:
        form: How :func:`merging.kernels.combine` reads the rows.
        directions: Number of directions K.
        rows: Tensor name -> K tensors of the base's shape, in fp32 (fp64 where a source is fp64).
    """

    form: Form
    directions: int
    rows: Callable[[str], list[torch.Tensor]]


@dataclass(frozen=True)
class Operator:
    """A way to turn experts into directions, with what is known about it.

    Attributes:
        name: Name in recipes and study files.
        prepare: ``prepare(base, experts, **hyperparameters) -> Basis``; hyperparameters are keyword-only.
        summary: One line for listings.
        paper: "Lastname YEAR, title".
        scope: What preparation must see at once.
        identities: Declared properties, a subset of :data:`IDENTITIES`.
        default: Number of experts -> the coefficient that the paper uses.
        bounds: Number of experts -> sensible lower and upper bound of a searched coefficient.
        directions: Number of experts -> number of directions of the basis.
        order_sensitive: Whether the order of the experts matters (then permutation does not hold).
        stochastic: Whether preparation draws random numbers (then ``seed`` is a hyperparameter).
    """

    name: str
    prepare: Callable[..., Basis]
    summary: str
    paper: str
    scope: Scope
    identities: frozenset[str]
    default: Callable[[int], float]
    bounds: Callable[[int], tuple[float, float]]
    directions: Callable[[int], int]
    order_sensitive: bool = False
    stochastic: bool = False

    @property
    def hyperparameters(self) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters of ``prepare`` by name, with evaluated annotations."""
        parameters = inspect.signature(self.prepare, eval_str=True).parameters
        return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}

    def check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters of a recipe as keyword arguments for ``prepare``.

        Raises:
            RecipeError: If a name is unknown or missing, or a value does not fit its annotation.
        """
        known = self.hyperparameters
        for name in options:
            if name not in known:
                allowed = f"one of {sorted(known)}" if known else "none"
                raise RecipeError(f"operator {self.name}: unknown hyperparameter {name!r}, expected {allowed}")
        for name, parameter in known.items():
            if name not in options and parameter.default is parameter.empty:
                raise RecipeError(f"operator {self.name}: hyperparameter {name!r} has no default, give it a value")
        return {name: self._checked(known[name], value) for name, value in options.items()}

    def _checked(self, parameter: inspect.Parameter, value: Any) -> Any:
        from pydantic import TypeAdapter, ValidationError

        try:
            # Strict: "0.2" is not 0.2, True is not 1. Annotated[float, Field(gt=0)] carries a range.
            return TypeAdapter(parameter.annotation).validate_python(value, strict=True)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise RecipeError(
                f"operator {self.name}: hyperparameter {parameter.name!r}: {reason}, received {value!r}"
            ) from None
