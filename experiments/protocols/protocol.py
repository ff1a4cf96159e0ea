"""What a protocol is: methods with their published settings, and what is reported of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: What a protocol reports of a method:
#:
#: * ``tasks``: score of each task, their mean, and the mean of score over the expert's score.
#: * ``general``: change of what the base can do beside the tasks.
#: * ``subsets``: both, and tasks held out, by the number of experts.
#: * ``cost``: seconds and peak memory.
Report = Literal["tasks", "general", "subsets", "cost"]


@dataclass(frozen=True)
class Adaptation:
    """A method that follows a loss of unlabelled items before it is scored.

    Attributes:
        strategy: Name of the product's strategy.
        granularity: Of the coefficients that it moves.
        options: Of the strategy.
        steps: Gradient steps in all.
    """

    strategy: str
    granularity: str
    options: Mapping[str, Any]
    steps: int


@dataclass(frozen=True)
class Method:
    """A row of a protocol.

    Attributes:
        label: As the paper calls it.
        operator: The product's operator.
        options: Its hyperparameters; ``calibration`` is added where the operator runs the experts.
        coefficient: Of all directions; None for the operator's own default.
        grid: Coefficients of which validation items choose one, instead of that.
        adaptation: What moves the coefficients, if anything does.
        differs: How ours differs from what was published, if it does.
    """

    label: str
    operator: str
    options: Mapping[str, Any] = field(default_factory=dict)
    coefficient: float | None = None
    grid: tuple[float, ...] = ()
    adaptation: Adaptation | None = None
    differs: str = ""

    @property
    def setting(self) -> str:
        """Operator, hyperparameters and coefficient in a few words."""
        parts = [f"`{self.operator}`", *(f"{key} {value}" for key, value in self.options.items())]
        if self.grid:
            parts.append(f"coefficient from {', '.join(map(str, self.grid))} by validation items")
        elif self.adaptation is not None:
            parts.append(f"{self.adaptation.steps} steps of `{self.adaptation.strategy}`")
        elif self.coefficient is not None:
            parts.append(f"coefficient {self.coefficient:g}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Protocol:
    """A published comparison of merging methods.

    Attributes:
        name: On the command line.
        title: What it is called.
        paper: Authors, year, number.
        settings: Where the settings were read.
        tasks: Name of each published task -> what scores it there.
        base: Published base.
        experts: Task -> published expert; empty where none was published.
        methods: The rows.
        reports: What is reported.
        exclude: Regular expression; tensors whose name contains a match stay at the base.
        differs: What of the published protocol is not there, one sentence each.
    """

    name: str
    title: str
    paper: str
    settings: str
    tasks: Mapping[str, str]
    base: str
    experts: Mapping[str, str]
    methods: tuple[Method, ...]
    reports: tuple[Report, ...]
    exclude: str = ""
    differs: tuple[str, ...] = ()

    @property
    def subsets(self) -> bool:
        """Whether subsets of the experts are merged, instead of all of them once."""
        return "subsets" in self.reports
