"""The study as it began: what was planned before the search follows from its first budget."""

from __future__ import annotations

from mergesearch.merging import RunFolderError
from mergesearch.search.record.allowances import first_budget, recorded_budget
from mergesearch.search.record.storage import Storage
from mergesearch.search.record.study_attributes import ALLOWANCES, study_attr
from mergesearch.search.spec.sections import StudySpec


def spec_of_beginning(spec: StudySpec, recorded: StudySpec, storage: Storage) -> StudySpec:
    """The study with the budget that it began with.

    Args:
        spec: The study as it is given now.
        recorded: The study of the run folder.
        storage: Where its trials are, if it has any.
    """
    try:
        first = first_budget(study_attr(storage, spec.name, ALLOWANCES))
        kept = study_attr(storage, spec.name, "study")
    except RunFolderError:  # a new study
        return spec
    if first is None:
        first = recorded.budget if kept is None else recorded_budget(kept.get("budget"))
    return spec.model_copy(update={"budget": first})
