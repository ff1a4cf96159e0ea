"""The sections of a study file as frozen models, with defaults and descriptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mergesearch.evaluators.spec.evaluators import EvaluatorSpec
from mergesearch.merging.alignment.spec import AlignSpec
from mergesearch.merging.errors import RecipeError
from mergesearch.merging.foreign.sizes import sized
from mergesearch.merging.kernels.spans import RowsSetting
from mergesearch.merging.policies import TensorPolicies, split_options
from mergesearch.search.spec.trackers import TrackerSpec
from mergesearch.spaces.spec import SpaceSpec


class Section(BaseModel):
    """A section of the study file: frozen, no unknown keys, finite numbers of sane size."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)
    most: ClassVar[Mapping[str, int]] = {}

    @field_validator("*")
    @classmethod
    def _sized(cls, value: Any, info: ValidationInfo) -> Any:
        return sized(value, info.field_name, cls.most)


class OperatorSection(BaseModel):
    """``operator: task_arithmetic`` or ``operator: {name: ..., hyperparameter: ...}``.

    ``auto`` chooses by measuring (:mod:`mergesearch.search.spec.auto_operator`).
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "task_arithmetic"

    @property
    def options(self) -> dict[str, Any]:
        """Hyperparameters."""
        return dict(self.__pydantic_extra__ or {})


class StrategySection(BaseModel):
    """``strategy: cma_es`` or ``strategy: {name: ..., option: ...}``.

    ``auto`` chooses by dimensions and objectives.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "auto"

    @property
    def options(self) -> dict[str, Any]:
        """The strategy's options."""
        return dict(self.__pydantic_extra__ or {})


class BudgetSection(Section):
    """How much a study may spend."""

    most: ClassVar[Mapping[str, int]] = {"evaluations": 10**15}

    trials: int | None = Field(
        None,
        ge=1,
        description="trials in total: anchors, search, recommendation; failures count, validation "
        "does not",
    )
    evaluations: int | None = Field(None, ge=1, description="evaluations of items, over all trials")
    seconds: float | None = Field(
        None, gt=0, description="wall time in which trials run, over all sessions"
    )
    worker_hours: float | None = Field(
        None, gt=0, description="time of all workers on trials, in hours"
    )

    @model_validator(mode="after")
    def _limited(self) -> BudgetSection:
        if all(getattr(self, key) is None for key in type(self).model_fields):
            raise ValueError(f"expected at least one of {', '.join(type(self).model_fields)}")
        return self


class StartSection(Section):
    """What is taken from other runs: where the search begins, and scores that it need not measure.

    It begins at a trial of one run, or at what several suggest by role and depth.
    """

    run: str | None = Field(None, description="folder of a run on the same experts")
    trial: int | None = Field(None, ge=0, description="number of its trial; default its winner")
    priors: list[str] | None = Field(
        None,
        min_length=1,
        description="folders of finished runs on any experts, whose mean coefficients by role and "
        "depth are the place to begin",
    )
    scores: list[str] | None = Field(
        None,
        min_length=1,
        description="folders of runs on the same models with the same evaluators, whose complete "
        "trials are known results here, at no cost of the budget",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> StartSection:
        if self.run is not None and self.priors is not None:
            raise ValueError("expected either run or priors")
        if self.run is None and self.priors is None and self.scores is None:
            raise ValueError("expected one of run, priors, scores")
        if self.run is None and self.trial is not None:
            raise ValueError("expected trial with run only")
        return self

    @property
    def has_origin(self) -> bool:
        """Whether other runs say where the search begins."""
        return self.run is not None or self.priors is not None

    @property
    def folders(self) -> list[str]:
        """Folders of the runs that say where the search begins."""
        return [*([] if self.run is None else [self.run]), *(self.priors or ())]


class FidelitySection(Section):
    """How many of the search items a trial is evaluated on, and what ends it early."""

    rule: Literal["full", "race", "halving", "hyperband", "subset"] = Field(
        "full",
        description="full: all items; race: until clearly worse than a leading trial; halving, "
        "hyperband: while among the best 1/eta; subset: min_items, and all items where these look "
        "better than those of the leading trial",
    )
    min_items: int = Field(
        50,
        ge=2,
        description="items before a trial may be stopped; for subset, the items of most trials",
    )
    confidence: float = Field(
        1.0, gt=0, description="race: standard errors that a paired difference must exceed"
    )
    eta: int = Field(
        3,
        ge=2,
        description="halving, hyperband: factor between stages; one in eta trials continues",
    )
    order: Literal["balanced", "representative"] = Field(
        "balanced",
        description="subset: the first of the fixed order, or items that "
        "represent the others, by how base and experts answer them",
    )
    estimate: Literal[
        "difference", "mean", "representative", "p_irt", "mp_irt", "gp_irt", "gmp_irt"
    ] = Field(
        "difference",
        description="how the score of a stopped trial on all items is estimated for the strategy",
    )


class SelectionSection(Section):
    """How the winner is chosen on validation items."""

    leaders: int = Field(
        5, ge=1, description="how many of the best trials are re-evaluated on validation items"
    )
    confidence: float = Field(
        1.0,
        ge=0,
        description="leaders are nominated by their value minus this many standard errors",
    )
    lend: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the validation items, alike in every domain, that the search uses "
        "instead: it fits its own items less, and the others choose the winner",
    )
    repeats: int = Field(
        1,
        ge=0,
        description="evaluations of the winner on the search items again, to see how far scores "
        "move",
    )
    weights: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="relative importance of the objectives; default equal"
    )


def _whole(gpus: float) -> float:
    """Allow a share of one GPU, or a whole number of GPUs."""
    if gpus > 1 and gpus != int(gpus):
        raise ValueError("expected a share of one GPU, or whole ones")
    return gpus


class WorkersSection(Section):
    """The workers; changing them does not change what is searched."""

    most: ClassVar[Mapping[str, int]] = {
        "count": 100_000,
        "cpus": 100_000,
        "gpus": 100_000,
        "per_gpu": 1000,
        "threads": 10_000,
    }

    backend: Literal["auto", "inline", "ray"] = Field(
        "auto",
        description="auto: ray where a count, GPUs or an address is given, else one worker in this "
        "process",
    )
    count: int | None = Field(
        None,
        ge=1,
        description="workers; default: as many as fit, more or fewer as nodes of a cluster join "
        "and leave",
    )
    cpus: float = Field(1, gt=0, description="CPUs of each worker")
    gpus: Annotated[float, AfterValidator(_whole)] = Field(
        0, ge=0, description="GPUs of each worker; 1 puts one worker on each, more spread its model"
    )
    per_gpu: int | None = Field(
        None, ge=1, description="workers that share each GPU, instead of gpus"
    )
    threads: int = Field(
        1, ge=1, description="threads of each worker for merging and evaluation on CPU"
    )
    prepare: Literal["cpu", "card"] = Field(
        "cpu",
        description="where decompositions of preparing run: card is much faster for spectral "
        "operators; an export, which prepares on the CPU, then agrees within rounding only",
    )
    address: str | None = Field(
        None,
        description="address of a running Ray cluster, auto on one of its nodes; default: a local "
        "one",
    )
    cache: str | None = Field(
        None,
        description="folder on every node for prepared weights; default: beside the run, on "
        "clusters below the node's folder for temporary files",
    )
    hidden_states_gb: float | None = Field(
        None,
        ge=0,
        le=1_000_000,
        # Studies without it read, and hash, as they did before.
        exclude_if=lambda size: size is None,
        description="main memory of each worker for what lower blocks gave, in GB: blocks whose "
        "coefficients are those of a recent trial do not run again; by default 1 with strategy "
        "block_coordinate, else 0, which keeps nothing",
    )
    price_per_hour: float | None = Field(
        None,
        ge=0,
        description="price of an hour of one GPU, or of one worker that uses none, in any "
        "currency; for the bill of check --cost and of the report",
    )

    @model_validator(mode="after")
    def _one_share(self) -> WorkersSection:
        if self.per_gpu is not None and self.gpus:
            raise ValueError(
                f"expected gpus or per_gpu, received both: gpus {self.gpus:g} and per_gpu "
                f"{self.per_gpu}; leave one out"
            )
        return self

    @property
    def gpus_each(self) -> float:
        """GPUs of each worker, or its share of one."""
        return self.gpus if self.per_gpu is None else 1 / self.per_gpu

    @property
    def distributed(self) -> bool:
        """Whether Ray runs the workers."""
        given = self.count is not None or self.gpus_each > 0 or self.address is not None
        return self.backend == "ray" or (self.backend == "auto" and given)


class DriverSection(Section):
    """How the driver behaves when something goes wrong; not a part of what is searched."""

    drain_seconds: float = Field(
        30, ge=0, description="after Ctrl-C or SIGTERM, how long trials that run may take to finish"
    )
    patience_seconds: float = Field(
        300,
        ge=0,
        description="how long to wait for a storage, a disk or workers that are away, "
        "before giving up",
    )
    lease_seconds: float = Field(
        60,
        ge=1,
        description="silence after which another driver may take over a study in a database",
    )
    judge_port: int = Field(
        0,
        ge=0,
        le=65535,
        # Studies without judges read, and hash, as they did before.
        exclude_if=lambda port: port == 0,
        description="port of this machine for the page on which people judge (evaluators of kind "
        "preference); by default any free one",
    )
    judge_ahead: int = Field(
        1,
        ge=0,
        le=100,
        exclude_if=lambda count: count == 1,
        description="how many trials may wait for a person's choices while workers make the "
        "outputs of more; 0 asks for the next trial only when the last one is judged",
    )


def _named(value: Any) -> Any:
    """Allow a bare name where a section has one: ``strategy: cma_es``."""
    return {"name": value} if isinstance(value, str) else value


def _ruled(value: Any) -> Any:
    """Allow a bare rule: ``fidelity: race``."""
    return {"rule": value} if isinstance(value, str) else value


def _experts(value: Any) -> Any:
    """Allow a list of paths: names are the folder names."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    named = {Path(str(path)).name: str(path) for path in value}
    if len(named) < len(value):
        raise ValueError(
            "expected experts in folders of different names, or a mapping of name to path"
        )
    return named


class ExpertSection(BaseModel):
    """An expert with options of its own."""

    path: str = Field(description="folder, .safetensors file, org/name@revision or MODEL+ADAPTER")
    unlock: bool = Field(False, description="bring its heads to the base's (special.unlock)")
    align: AlignSpec | str | None = Field(
        None, description="bring its units into the base's order (special.align)"
    )


class StudySpec(Section):
    """A whole study, resolved."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run folder")
    seed: int = Field(0, ge=0, description="of every random draw; the same study runs the same")
    base: str | None = Field(
        None, description="folder, .safetensors file or org/name@revision of the common base"
    )
    experts: Annotated[
        dict[str, str],
        BeforeValidator(
            _experts, json_schema_input_type=dict[str, str | ExpertSection] | list[str]
        ),
    ] = Field(
        default_factory=dict,
        description="name -> checkpoint of each expert, or {path: ..., align: METHOD, unlock: "
        "true} (special.align, special.unlock)",
    )
    operator: Annotated[
        OperatorSection, BeforeValidator(_named, json_schema_input_type=OperatorSection | str)
    ] = Field(
        OperatorSection(), description="how weights combine: a name, or name and hyperparameters"
    )
    special: TensorPolicies = Field(
        TensorPolicies(),
        description="policies for vocabularies, running statistics, new heads, ties",
    )
    rows: RowsSetting = Field(
        "auto",
        description="how prepared rows are kept in memory: auto takes the smallest exact form; "
        "int8 and bf16 are approximate, and winners are then chosen and exported from exact rows",
    )
    space: SpaceSpec = Field(
        SpaceSpec(), description="which coefficients there are, and between which bounds"
    )
    strategy: Annotated[
        StrategySection, BeforeValidator(_named, json_schema_input_type=StrategySection | str)
    ] = Field(StrategySection(), description="what is tried next: a name, or name and options")
    evaluators: list[EvaluatorSpec] = Field(
        min_length=1, description="what a good merge is: one section for each kind of score"
    )
    budget: BudgetSection = Field(description="how much the study may spend")
    start: StartSection | None = Field(
        None, description="other runs: where the search begins, and scores that are taken over"
    )
    allow_unrelated: Annotated[str, Field(min_length=1)] | bool | None = Field(
        None,
        description="why experts are merged that do not come from the base (true: no reason given)",
    )
    anchors: Literal["default", "none"] = Field(
        "default", description="known merges that are measured before the search, or none of them"
    )
    fidelity: Annotated[
        FidelitySection, BeforeValidator(_ruled, json_schema_input_type=FidelitySection | str)
    ] = Field(
        FidelitySection(),
        description="whether trials that lose are stopped early, and by which rule",
    )
    selection: SelectionSection = SelectionSection()
    allow_code: bool = Field(
        False, description="let evaluators run code that this file names: scorers, commands, tasks"
    )
    reference_scores: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="known scores of base and experts, anchor -> objective -> value; the report "
        "warns where measured ones differ",
    )
    workers: WorkersSection = WorkersSection()
    driver: DriverSection = DriverSection()
    trackers: list[TrackerSpec] = Field(
        default_factory=list, description="experiment trackers that follow the study"
    )

    @model_validator(mode="before")
    @classmethod
    def _split_experts(cls, data: Any) -> Any:
        """Move options of single experts to the policies that they stand for."""
        if not isinstance(data, Mapping):
            return data
        try:
            experts, special = split_options(data.get("experts"), data.get("special"))
        except RecipeError as error:
            raise ValueError(str(error)) from None
        moved = {"experts": experts, "special": special}
        return {**data, **{key: value for key, value in moved.items() if value is not None}}

    storage: str | None = Field(
        None,
        description="a database's URL, ${NAME} is read from the environment; default: a journal in "
        "the run folder",
    )
    max_consecutive_failures: int = Field(
        10, ge=1, description="failed trials in a row after which the study gives up"
    )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form with every default filled in."""
        return self.model_dump(mode="json")


#: Section that may be a bare name -> the key that the name stands for.
BARE = {"operator": "name", "strategy": "name", "fidelity": "rule"}

#: Keys that may differ when a run is resumed: they say who does the work, not what is searched.
EXECUTION_KEYS = ("workers", "driver", "trackers", "max_consecutive_failures")


def study_schema() -> dict[str, Any]:
    """The JSON Schema of the study file, for editors; kinds that plug-ins add are not in it."""
    return StudySpec.model_json_schema() | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mergesearch study",
    }
