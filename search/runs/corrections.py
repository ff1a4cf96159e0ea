"""Corrections of a study that has no result yet: its folder takes another one in its place."""

from __future__ import annotations

from pathlib import Path

from mergesearch.merging import InputError, RunFolderError
from mergesearch.search.record.run_folder import RunFolder
from mergesearch.search.record.storage import Storage, read_storage, repair_journal
from mergesearch.search.record.study_attributes import study_attr, study_id_of
from mergesearch.search.report.saved import forget_saved
from mergesearch.search.runs.wiring import storage_location
from mergesearch.search.spec.comparison import conflicts, searched_keys
from mergesearch.search.spec.renamed import with_new_names
from mergesearch.search.spec.sections import StudySpec


def give_up_folder(recorded: StudySpec, folder: RunFolder) -> bool:
    """Discard the trials of a folder's study if none has a result, and say whether they are gone.

    Those in a database are discarded later, by :func:`discard_corrected`.

    Args:
        recorded: The study of the folder.
        folder: Held by this process.
    """
    location = storage_location(recorded, folder)
    if isinstance(location, Path):
        repair_journal(location)
    try:
        storage = read_storage(location)
    except RunFolderError:
        return True  # nothing was ever recorded
    except InputError:
        # The database cannot be asked. A study that was opened there has left events.
        return not (folder.path / "events.jsonl").is_file()
    if not _without_result(storage, recorded.name):
        return False
    forget_saved(folder.path)
    if isinstance(location, Path):
        location.unlink()
    return True


def discard_corrected(spec: StudySpec, storage: Storage) -> None:
    """Discard the recorded study of the same name where it has no result and another is given.

    Args:
        spec: The study as it is given now.
        storage: Open for writing; this process holds the study's lease.
    """
    try:
        recorded = study_attr(storage, spec.name, "study")
    except RunFolderError:
        return  # a new study
    if recorded is None or not conflicts(with_new_names(recorded), searched_keys(spec)):
        return
    if _without_result(storage, spec.name):
        storage.delete_study(study_id_of(storage, spec.name))


def _without_result(storage: Storage, name: str) -> bool:
    """Whether no trial of a study has succeeded, or its base failed before the search began."""
    try:
        trials = storage.get_all_trials(study_id_of(storage, name), deepcopy=False)
    except RunFolderError:
        return True
    known = [(trial.user_attrs.get("kind"), trial.state.name) for trial in trials]
    if not any(state in ("COMPLETE", "PRUNED") for _, state in known):
        return True
    base = [state for kind, state in known if kind == "base"]
    return base[-1:] == ["FAIL"] and all(kind != "search" for kind, _ in known)
