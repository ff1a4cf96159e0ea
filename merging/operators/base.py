"""What an operator is: a function that prepares a basis, and what is declared about it.

Almost every published merge is ``base + Σ_k c_k · T_k(expert_k − base)`` with linear maps T_k.
``prepare`` fixes them, once; a trial is then one weighted sum
(:func:`mergesearch.merging.kernels.combine`). The keyword-only parameters of ``prepare`` are the
operator's hyperparameters: their names, annotations and defaults are the schema, and there is no
other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from mergesearch.merging.errors import RecipeError, did_you_mean
from mergesearch.merging.foreign.shown import name_shown, shown
from mergesearch.merging.kernels.forms import Form, Patches
from mergesearch.merging.operators.schema import count_text, meaning, type_text
from mergesearch.merging.tensors.layout import Layout
from mergesearch.merging.tensors.source import Factors, Options

if TYPE_CHECKING:
    import torch


#: What ``prepare`` must see at once: E one element, R a row, T a tensor, each of all experts; G
#: statistics of the whole model first; S forward passes in depth order.
PreparationScope = Literal["E", "R", "T", "G", "S"]

#: How rows relate to the experts as stored, which decides what an arena has to keep: each row is
#: its expert, or the difference to the base (``stored``); that at some elements and 0 elsewhere, up
#: to a factor (``masked``); or numbers of their own (``dense``).
RowForm = Literal["stored", "masked", "dense"]

#: Masked rows that keep at most this share of their elements are packed. In 16 bits they then take
#: at most 0.56 of their room; of more, packing saves too little for what finding numbers costs.
PACKED_UP_TO = 0.5

#: What ``prepare`` needs besides weights: inputs to run the model on, inputs without labels to
#: learn from, or labelled items.
Needs = Literal["inputs", "unlabeled", "labeled"]

#: The family of an operator: the page that describes it, and the kind of its arithmetic.
OperatorFamily = Literal["linear", "sparse", "spectral", "column", "data", "learned"]


#: Properties that an operator may declare; each is checked by
#: ``tests/contracts/test_operators.py``.
IDENTITIES: Mapping[str, str] = {
    "base_at_zero": "coefficients 0 give the base, bit for bit",
    "expert_at_one_hot": "a one-hot coefficient gives that expert, bit for bit",
    "expert_near_one_hot": "a one-hot coefficient gives that expert, within rounding",
    "single_expert": "one expert with coefficient 1 gives that expert, within rounding",
    "identical_experts": "at the default coefficients, copies of one expert give that expert, "
    "within rounding",
    "permutation": "permuting experts together with their coefficients changes nothing but "
    "rounding",
    "linearity": "merged − base is linear in the coefficients, within rounding",
    "homogeneity": "scaling all task vectors by s > 0 scales merged − base by s, within rounding",
    "zero_vector": "an expert equal to the base adds nothing, whatever its coefficient, within "
    "rounding",
    "default_ignores_zero_vector": "as zero_vector, and the default coefficients stay what they "
    "were",
}


@dataclass(frozen=True)
class Direct:
    """A tensor that was merged from its sources as they are stored.

    Attributes:
        lost: Σ (stored − merged)².
        change: Σ (merged − base)².
        settle: Where something waits for a statistic of the whole model: gives what is then to be
            written over the tensor, or None for nothing. Called once all tensors are merged.
    """

    lost: float
    change: float
    settle: Callable[[], Patches | None] | None = None


#: See :attr:`Basis.direct`; numbers are fp32, or bf16 as its bits in uint16.
DirectMerge = Callable[[str, Sequence[Any], Any, Any, Any, bool], Direct | None]


@dataclass(frozen=True)
class Basis:
    """K prepared directions, worked out tensor by tensor so that memory stays small.

    Attributes:
        form: How :func:`mergesearch.merging.kernels.combine` reads the rows.
        directions: Number of directions K.
        rows: Tensor name -> K tensors of the base's shape, in fp32 (fp64 where a source is fp64).
        angles: Tensor name -> angle between base and row in radians, for the form ``slerp`` only.
        factors: Tensor name -> the rows of that tensor as low-rank products, or None where they are
            kept whole.
        direct: A way to merge a tensor from its sources as they are stored, with the bits of its
            rows but without making them: (name, numbers of base and experts, weights
            ``(1 + K, segments)``, boundaries, output, whether something may be settled later), or
            None where it does not apply.
    """

    form: Form
    directions: int
    rows: Callable[[str], list[torch.Tensor]]
    angles: Callable[[str], float] | None = None
    factors: Callable[[str], Factors | None] | None = None
    direct: DirectMerge | None = None


def _one_per_expert(experts: int, _options: Options) -> int:
    return experts


def _copies(experts: int) -> float:
    return 2 * experts + 3


def _dense(_options: Options) -> RowForm:
    return "dense"


def _all(_options: Options) -> float:
    return 1.0


@dataclass(frozen=True)
class Operator:
    """A way to turn experts into directions, with what is known about it.

    Functions of ``(experts, options)`` receive the number of experts and the complete
    hyperparameters.

    Attributes:
        name: Name in recipes and study files.
        prepare: ``prepare(base, experts, **hyperparameters) -> Basis``; hyperparameters are
            keyword-only.
        summary: One line for listings.
        paper: "Lastname YEAR, title".
        family: Its :data:`OperatorFamily`.
        scope: Its :data:`PreparationScope`.
        identities: Declared properties at the default hyperparameters, a subset of
            :data:`IDENTITIES`.
        default: ``(experts, options)`` -> the coefficient that the paper uses.
        bounds: ``(experts, options)`` -> sensible lower and upper bound of a searched coefficient.
        directions: ``(experts, options)`` -> number of directions of the basis.
        needs: Its :data:`Needs`.
        plain: Hyperparameters under which the operator changes task vectors least (density 1, drop
            rate 0), if it has such.
        plain_identities: What holds at ``plain``.
        experts: Least and greatest number of experts that make sense (None: no limit).
        refuse: ``(layout, experts, options)`` -> why it cannot work, before weights are read, or
            None.
        copies: Number of experts -> how many tensors as large as the largest preparation holds at
            once.
        row_form: ``(options)`` -> the :data:`RowForm` of its rows; what an arena keeps is checked
            bit for bit when it is written.
        density: ``(options)`` -> the share of a model's elements that a masked row keeps at most,
            apart from elements that tie with the least one that is kept; 1 where it is not known.
        order_sensitive: Whether the order of the experts matters (then permutation does not hold).
        stochastic: Whether preparation draws random numbers (then ``seed`` is a hyperparameter).
        by_name: Whether rows may depend on the names of experts for another reason than these.
        revision: Of an operator that is not the product's own, what tells versions of its code
            apart; prepared weights of one are not used for another.
        when: When to use it, a sentence without its subject, for listings and pages; may be empty.
    """

    name: str
    prepare: Callable[..., Basis]
    summary: str
    paper: str
    family: OperatorFamily
    scope: PreparationScope
    identities: frozenset[str]
    default: Callable[[int, Options], float]
    bounds: Callable[[int, Options], tuple[float, float]]
    directions: Callable[[int, Options], int] = _one_per_expert
    needs: frozenset[Needs] = frozenset()
    plain: Options = field(default_factory=dict)
    plain_identities: frozenset[str] = frozenset()
    experts: tuple[int, int | None] = (1, None)
    refuse: Callable[[Layout, int, Options], str | None] | None = None
    copies: Callable[[int], float] = _copies
    row_form: Callable[[Options], RowForm] = _dense
    density: Callable[[Options], float] = _all
    order_sensitive: bool = False
    stochastic: bool = False
    by_name: bool = False
    revision: str = ""
    when: str = ""

    @cached_property
    def hyperparameters(self) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters of ``prepare`` by name, with evaluated annotations."""
        parameters = inspect.signature(self.prepare, eval_str=True).parameters
        return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}

    def complete(self, options: Options) -> dict[str, Any]:
        """The hyperparameters of a recipe as keyword arguments for ``prepare``, defaults filled in.

        Raises:
            RecipeError: If a name is unknown or missing, or a value does not fit its annotation.
        """
        known = self.hyperparameters
        for name in options:
            if name not in known:
                allowed = f"; {did_you_mean(name, known)}" if known else ", expected none"
                raise RecipeError(f"operator {self.name}: unknown hyperparameter {name!r}{allowed}")
        for name, parameter in known.items():
            if name not in options and parameter.default is parameter.empty:
                raise RecipeError(self._without_value(parameter))
        return {
            name: self._checked(parameter, options[name]) if name in options else parameter.default
            for name, parameter in known.items()
        }

    def check(self, layout: Layout, experts: int, options: Options) -> dict[str, Any]:
        """:meth:`complete`, after everything that can be refused from shapes alone.

        Raises:
            RecipeError: In one line, if the operator cannot merge this many experts of this layout.
        """
        full = self.complete(options)
        least, most = self.experts
        if experts < least or (most is not None and experts > most):
            wanted = count_text(least, most, f"at least {least}")
            word = "expert" if wanted == "1" else "experts"
            raise RecipeError(
                f"operator {self.name}: expected {wanted} {word} beside the base, received "
                f"{experts}"
            )
        reason = None if self.refuse is None else self.refuse(layout, experts, full)
        if reason is not None:
            raise RecipeError(f"operator {self.name}: {reason}")
        return full

    def _without_value(self, parameter: inspect.Parameter) -> str:
        reason = (
            f"operator {self.name}: hyperparameter {parameter.name!r} has no default, give it a "
            "value"
        )
        described = meaning(parameter)
        return f"{reason} ({described})" if described else reason

    def _checked(self, parameter: inspect.Parameter, value: Any) -> Any:
        from pydantic import ValidationError

        try:
            # Strict: "0.2" is not 0.2, True is not 1. Annotated[float, Field(gt=0)] carries a
            # range.
            return _adapter(parameter.annotation).validate_python(value, strict=True)
        except ValidationError as error:
            first, *others = error.errors()
            path = [parameter.name, *(name_shown(str(part)) for part in first["loc"])]
            reason = first["msg"].removeprefix("Value error, ")
            received = first["input"]
            if others:  # one for each choice, in the words of the checker
                path = path[:1]
                reason = f"expected {type_text(parameter.annotation)}"
                received = value
            raise RecipeError(
                f"operator {self.name}: hyperparameter {'.'.join(path)!r}: {reason}, received "
                f"{shown(received)}"
            ) from None


def _adapter(annotation: Any) -> Any:
    """What checks a value of an annotation; numbers must be finite."""
    from pydantic import ConfigDict, TypeAdapter
    from pydantic.errors import PydanticUserError

    try:
        return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))
    except PydanticUserError:  # a model or typed dictionary, which has a configuration of its own
        return TypeAdapter(annotation)


def kept_form(operator: Operator, options: Options) -> RowForm | Literal["packed"]:
    """The smallest exact form in which rows can be kept, by what the operator declares."""
    form = operator.row_form(options)
    if form == "masked" and operator.density(options) <= PACKED_UP_TO:
        return "packed"
    return form
