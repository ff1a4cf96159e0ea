"""A study from Python: made, run, read and exported in a program or a notebook."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

from mergesearch.merging import InputError, StudyFailedError
from mergesearch.merging.extensions.references import give
from mergesearch.merging.foreign.paths import resolved
from mergesearch.search.api.frames import Row, frame, rows_of
from mergesearch.search.api.given import Given
from mergesearch.search.observers.progress import default_style
from mergesearch.search.plan.heads import head_classes
from mergesearch.search.plan.loading import checked_study, read_sections
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.report.headline import sentences
from mergesearch.search.report.plotly_figures import front_figure, progress_figure
from mergesearch.search.report.tables import text_lines
from mergesearch.search.runs.exporting import DISAGREES, export_trial
from mergesearch.search.runs.following import run_and_show
from mergesearch.search.runs.opened import Run, open_run
from mergesearch.search.spec.study_file import resolve

#: How progress is shown; ``auto`` is a live line on a terminal, and lines elsewhere.
Progress = Literal["auto", "rich", "plain", "json", "quiet"]


class Study:
    """A search for good merges, which lives in a run folder.

    The sections are those of a study file, with the same checks and messages. Beside plain data
    they take objects: ``base`` and ``experts`` may be state dicts or torch modules, ``operator``
    and ``strategy`` classes, and the functions of evaluators may be functions. A study whose folder
    holds trials goes on from them, if it is made of the same sections and objects again.

    Args:
        study: A study file, or a mapping of its sections.
        run: The run folder; by default ``runs/NAME``.
        evaluate: A function that scores a merged model, in the place of ``evaluators``
            (:mod:`mergesearch.evaluators.python`), or its name as ``module:name``.
        objectives: Of that function: name -> ``maximize`` or ``minimize``; by default one, called
            ``score``, which is maximised.
        model_class: Of the model that it is given: a transformers auto class, or a function that
            builds a torch module.
        **sections: Sections of the study, which replace those of ``study``.

    Raises:
        InputError: If anything is wrong, in one line.
    """

    def __init__(
        self,
        study: str | Path | Mapping[str, Any] | None = None,
        *,
        run: str | Path | None = None,
        evaluate: Callable[..., Any] | str | None = None,
        objectives: Mapping[str, Literal["maximize", "minimize"]] | None = None,
        model_class: Callable[[], Any] | str | None = None,
        **sections: Any,
    ) -> None:
        file = Path(study) if isinstance(study, str | Path) else None
        described = dict(study or {}) if file is None else read_sections(file)  # type: ignore[arg-type]
        described |= sections
        options = {"objectives": objectives, "model_class": model_class}
        own = _evaluators(described, evaluate, options)
        described |= own
        #: The run folder.
        self.folder = Path(run) if run is not None else Path("runs") / str(described.get("name"))
        given = Given(self.folder / "weights")
        where = "study" if file is None else str(file)
        plain = given.plain(described)
        self._objects = given.objects
        give(self._objects)
        checked = checked_study(plain, where)
        given.write()
        self._spec = resolve(checked, Path.cwd() if file is None else resolved(file).parent)

    def check(self) -> None:
        """Refuse what :meth:`run` would refuse; reads the headers of the checkpoints.

        Raises:
            InputError: In one line.
        """
        give(self._objects)
        plan_study(self._spec)

    def run(
        self,
        progress: Progress = "auto",
        *,
        trust_log: bool = False,
        retry_failed: bool = False,
        metrics: str | None = None,
    ) -> Study:
        """Run the study, or resume it where it stands.

        Args:
            progress: How it is shown, on standard error.
            trust_log: Go on from the recorded points even if the strategy asks for others now.
            retry_failed: Measure failed trials again, anchors too, before going on.
            metrics: ``HOST:PORT`` or ``PORT`` to serve Prometheus metrics at.

        Raises:
            InputError: If anything is wrong.
            StudyFailedError: If the study cannot go on; the same call resumes.
            KeyboardInterrupt: If it was interrupted; the same call resumes.
        """
        if progress not in get_args(Progress):
            raise InputError(
                f"progress: expected one of {', '.join(get_args(Progress))}, received {progress!r}"
            )
        give(self._objects)
        style = default_style() if progress == "auto" else progress
        run_and_show(
            self._spec,
            self.folder,
            style,
            lambda seconds: print(
                f"stopping; running trials have {seconds:g} s to finish", file=sys.stderr
            ),
            trust_log=trust_log,
            retry_failed=retry_failed,
            metrics=metrics,
        )
        return self

    def summary(self) -> str:
        """The result table and the headline, as `mergesearch show` prints them."""
        data = self._opened().report_data()
        return "\n".join([*text_lines(data), "", *sentences(data)])

    def trials(self, *, coordinates: bool = False, rows: bool = False) -> Any:
        """Every trial as a frame of pandas, or as a list of dictionaries.

        Args:
            coordinates: Add the coordinates of each trial's point.
            rows: Give dictionaries, for which pandas is not needed.

        Raises:
            InputError: If pandas is needed and not installed.
        """
        run = self._opened()
        return self._table(run, [*run.log.records], coordinates, rows)

    def front(self, *, coordinates: bool = False, rows: bool = False) -> Any:
        """The recommended trials: the front, or with one objective the winner.

        Arguments and errors are those of :meth:`trials`.
        """
        run = self._opened()
        data = run.report_data()
        several = len(data.objectives) > 1
        leading = [] if data.leading is None else [data.leading]
        return self._table(run, data.recommended if several else leading, coordinates, rows)

    def plot_front(self) -> Any:
        """The front as a figure of plotly.

        Raises:
            InputError: If there is one objective, or no trial is complete.
        """
        data = self._opened().report_data()
        if len(data.objectives) < 2:
            raise InputError(
                f"front: expected several objectives, received {data.objectives[0].name!r} alone; "
                "plot_progress() draws it"
            )
        return self._figure(front_figure)

    def plot_progress(self) -> Any:
        """The best value so far after each trial, as a figure of plotly.

        Raises:
            InputError: If no trial is complete.
        """
        return self._figure(progress_figure)

    def best_model(self, trial: int | None = None, *, head: str | None = None) -> Any:
        """The merged model of a trial, as a torch module in evaluation mode.

        It is what :meth:`export` writes, loaded.

        Args:
            trial: Its number; default: the winner.
            head: Where experts keep heads of their own, the expert whose head the model has.

        Raises:
            InputError: If the study has no models, no such trial, or heads of which none is named.
        """
        from mergesearch.merging.models.loading import load_model
        from mergesearch.merging.routing.bundle import load

        run = self._opened()
        record = run.trial(trial)
        model_class = run.plan.evaluator.model_class
        if model_class is None:
            raise InputError(
                "best_model: expected a study whose evaluators run a model, received one without; "
                "export() writes its weights"
            )
        classes = head_classes(run.plan.heads, run.plan.evaluator)
        if classes and head is None:
            raise InputError(f"best_model: expected head=, one of {sorted(classes)}, received none")
        model_class = classes.get(head or "", model_class)
        with TemporaryDirectory(prefix="mergesearch-") as name:
            out = Path(name) / "model"
            export_trial(run, record, out, overwrite=False, rescored=False, head=head)
            return load(out) if record.recipe.routing else load_model(str(out), model_class)

    def export(
        self,
        path: str | Path,
        trial: int | None = None,
        *,
        overwrite: bool = False,
        rescore: bool = True,
        head: str | None = None,
    ) -> dict[str, Any]:
        """Write the model of a trial as a folder, and score it again.

        Args:
            path: The folder.
            trial: Number of the trial; default: the winner.
            overwrite: Replace a folder that is not empty.
            rescore: Score the exported model against the record.
            head: As of :meth:`best_model`; without one, the shared part and the heads are written.

        Returns:
            What `mergesearch export --json` prints.

        Raises:
            InputError: If there is no such trial, or the folder cannot be written.
            StudyFailedError: If the exported model does not score as recorded.
        """
        run = self._opened()
        exported = export_trial(
            run, run.trial(trial), Path(path), overwrite=overwrite, rescored=rescore, head=head
        )
        if not exported.result.get("agrees", True):
            raise StudyFailedError(DISAGREES)
        return exported.result

    def _opened(self) -> Run:
        """The run, opened for reading."""
        give(self._objects)
        return open_run(self.folder)

    def _table(self, run: Run, records: list[Any], coordinates: bool, rows: bool) -> Any:
        names = run.plan.space.names if coordinates else ()
        found: list[Row] = rows_of(records, run.plan.objectives, names)
        return found if rows else frame(found, run.plan.objectives, names)

    def _figure(self, draw: Callable[[Any], Any]) -> Any:
        import plotly.graph_objects

        data = self._opened().report_data()
        if not data.complete.records:
            raise InputError(f"{self.folder}: expected a complete trial, found none")
        return plotly.graph_objects.Figure(draw(data))


def _evaluators(
    described: Mapping[str, Any], evaluate: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The section of evaluators that ``evaluate`` stands for; empty without one.

    Raises:
        InputError: If there are evaluators too, or options without a function.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if evaluate is None:
        if given:
            key = min(given)
            raise InputError(
                f"{key}: expected a function beside it, as evaluate=, received none; evaluators of "
                "other kinds have it in their own section"
            )
        return {}
    if "evaluators" in described:
        raise InputError(
            "evaluate: expected no evaluators beside it, received some; list the function there as "
            "{'kind': 'python', 'function': ...}"
        )
    if "objectives" in given:
        given["objectives"] = [
            {"name": name, "direction": direction}
            for name, direction in dict(given["objectives"]).items()
        ]
    model = {} if "base" in described else {"model": "none"}
    return {"evaluators": [{"kind": "python", "function": evaluate, **given, **model}]}
