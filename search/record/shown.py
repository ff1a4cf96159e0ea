"""What optuna-dashboard shows of a study beside its trials: notes, figures, and files.

They are attributes of the study in the dashboard's own format. Its functions would write the same,
but importing them brings scikit-learn and takes seconds at the end of every run;
``tests/search/record/test_shown.py`` compares the two.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergesearch.search.quiet import quiet_optuna
from mergesearch.search.record.storage import Storage, StorageAccess

if TYPE_CHECKING:
    import optuna

#: Longest part of a text in one attribute, in characters.
PART = 2045


class Shown:
    """Notes, figures and files of one study.

    Args:
        storage: An Optuna storage.
        study_id: The study's id there.
        access: How the storage is read and written.
        trial_ids: The storage's ids of trials, by number.
    """

    def __init__(
        self,
        storage: Storage,
        study_id: int,
        access: StorageAccess,
        trial_ids: Sequence[int],
    ) -> None:
        self._storage = storage
        self._study_id = study_id
        self._access = access
        self._trial_ids = trial_ids

    def set_note(self, markdown: str, number: int | None = None) -> None:
        """Set the note of the study, or of the trial of this number."""
        trial = "" if number is None else f"{self._trial_ids[number]}:"
        self._access.write(lambda: self._set_note(f"dashboard:{trial}note_", markdown))

    def set_figure(self, name: str, figure: Mapping[str, Any]) -> None:
        """Set a figure of plotly, as plain data."""
        text = json.dumps(figure, allow_nan=False, separators=(",", ":"))
        self._access.write(lambda: self._set_text(f"dashboard:plot_data:{name}:", text))

    def _set_note(self, prefix: str, markdown: str) -> None:
        """Set a note, and count its versions: the dashboard refuses edits of older ones."""
        version = f"{prefix}ver"
        known = self._storage.get_study_system_attrs(self._study_id)
        self._storage.set_study_system_attr(self._study_id, version, known.get(version, 0) + 1)
        self._set_text(f"{prefix}str:", markdown)

    def _set_text(self, prefix: str, text: str) -> None:
        """Set a text as numbered parts, as every database keeps them, and empty those of before."""
        parts = [text[start : start + PART] for start in range(0, len(text), PART)]
        known = self._storage.get_study_system_attrs(self._study_id)
        before = sum(key.startswith(prefix) for key in known)
        for index in range(max(len(parts), before)):
            part = parts[index] if index < len(parts) else ""
            self._storage.set_study_system_attr(self._study_id, f"{prefix}{index}", part)

    def attach(self, files: Mapping[str, str], folder: Path) -> dict[str, str]:
        """Keep texts as files of the study, and give their addresses in the dashboard.

        Optuna attaches nothing to trials that have ended, so that all files are the study's. One
        that is attached already is written again in its place.

        Args:
            files: Name of a file -> its content.
            folder: Where their contents are kept.

        Raises:
            OSError: If they cannot be written.
        """
        from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta

        study = self._study()
        known = self._access.read(lambda: get_all_artifact_meta(study))
        ids = {each.filename: each.artifact_id for each in known}
        folder.mkdir(parents=True, exist_ok=True)
        store = FileSystemArtifactStore(folder)
        for name, content in files.items():
            if name in ids:
                store.write(ids[name], io.BytesIO(content.encode()))
            else:
                ids[name] = self._upload(study, store, name, content)
        return {name: f"/artifacts/{self._study_id}/{ids[name]}" for name in files}

    def _upload(self, study: optuna.Study, store: Any, name: str, content: str) -> str:
        """Identifier of a new file."""
        from optuna.artifacts import upload_artifact

        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / name
            path.write_text(content, encoding="utf-8")
            return self._access.write(
                lambda: upload_artifact(
                    artifact_store=store,
                    file_path=str(path),
                    study_or_trial=study,
                    mimetype="text/plain",  # which browsers show
                )
            )

    def _study(self) -> optuna.Study:
        """The study as Optuna's functions want it."""
        import optuna

        def load() -> optuna.Study:
            with quiet_optuna():
                name = self._storage.get_study_name_from_id(self._study_id)
                return optuna.load_study(storage=self._storage, study_name=name)

        return self._access.read(load)


def attached_files(folder: Path) -> Any:
    """The files that studies of a run have attached, as the dashboard reads them."""
    from optuna.artifacts import FileSystemArtifactStore

    return FileSystemArtifactStore(folder)
