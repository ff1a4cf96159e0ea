"""A trial in other forms than a model folder: as an adapter of its base, and as a GGUF file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from mergesearch.merging import InputError
from mergesearch.merging.foreign.paths import resolved
from mergesearch.merging.tensors.parallel import usable_cores
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.runs.card_facts import facts_of
from mergesearch.search.runs.exported import rescore
from mergesearch.search.runs.exporting import Exported
from mergesearch.search.runs.opened import Run


@dataclass(frozen=True)
class Forms:
    """The forms that are asked for beside the model folder.

    Attributes:
        adapter: Folder of an adapter, or None.
        rank: Its greatest rank; None: what it takes to lose nothing.
        lossy: Whether changes that an adapter cannot hold may be left out.
        gguf: A GGUF file, or None.
        gguf_type: Type of its matrices.
    """

    adapter: Path | None = None
    rank: int | None = None
    lossy: bool = False
    gguf: Path | None = None
    gguf_type: str | None = None

    def check(self, out: Path | None) -> None:
        """Refuse options that go with none of the forms, and no form at all.

        Raises:
            InputError: In one line.
        """
        if out is None and self.adapter is None and self.gguf is None:
            raise InputError(
                "export: expected a place to write to, received none; give --out DIR, --adapter "
                "DIR or --gguf FILE"
            )
        if self.adapter is None and (self.rank is not None or self.lossy):
            given = "--lossy" if self.rank is None else "--adapter-rank"
            raise InputError(f"{given}: expected --adapter DIR beside it, received none")
        if self.gguf is None and self.gguf_type is not None:
            raise InputError("--gguf-type: expected --gguf FILE beside it, received none")


def export_forms(
    opened: Run,
    record: TrialRecord,
    forms: Forms,
    out: Path | None,
    write_model: Callable[[Path], Exported],
    *,
    overwrite: bool,
    rescored: bool,
    head: str | None,
) -> Exported:
    """Write a trial in all forms that are asked for.

    Args:
        opened: The run.
        record: The trial.
        forms: Those beside the model folder.
        out: The model folder, or None.
        write_model: Writes that, and scores it again.
        overwrite: Replace what is there.
        rescored: Whether to score an adapter on its base.
        head: Expert whose head the model gets.

    Raises:
        InputError: If the trial has no such form, or it cannot be written.
    """
    if opened.plan.layout is None:
        raise InputError(
            f"{opened.folder.path}: expected a study of checkpoints, received an analytic problem: "
            "nothing to export"
        )
    if forms.gguf is not None:
        _check_gguf(record, forms, head, overwrite)
    results: dict[str, Any] = {"trial": record.number}
    lines: list[str] = []
    if out is not None:
        exported = write_model(out)
        results |= exported.result
        lines += exported.lines
    if forms.adapter is not None:
        written = _adapter(opened, record, forms, overwrite=overwrite, head=head)
        if rescored and record.state == "complete" and opened.plan.heads is None:
            written = _with_scores(opened, record, forms.adapter, written)
        results["adapter"] = written.result
        lines += written.lines
    if forms.gguf is not None:
        with _model_folder(record, out, forms.gguf, head) as folder:
            written = _gguf(opened, record, forms, folder, overwrite=overwrite)
        results["gguf"] = written.result
        lines += written.lines
    return Exported(results, lines)


def _adapter(
    opened: Run, record: TrialRecord, forms: Forms, *, overwrite: bool, head: str | None
) -> Exported:
    from mergesearch.merging.export.adapter_format.writing import export_adapter

    assert forms.adapter is not None
    exported = export_adapter(
        record.recipe,
        forms.adapter,
        rank=forms.rank,
        lossy=forms.lossy,
        facts=facts_of(opened, record.number),
        overwrite=overwrite,
        threads=usable_cores(),
        head=head,
    )
    first, *others = exported.lines()
    lines = [f"trial {record.number} written to {forms.adapter}: {first}", *others]
    return Exported(exported.to_dict(), lines)


def _with_scores(opened: Run, record: TrialRecord, adapter: Path, written: Exported) -> Exported:
    """An adapter with what it scores on its base, beside what the merge has scored."""
    again = rescore(opened, record, Path(f"{record.recipe.base.path}+{resolved(adapter)}"))
    verdict = opened.verdict
    scores = {} if verdict is None else verdict.scores.get(again.split, {})
    recorded = scores[record.number].values if again.split == "test" else record.values
    values = dict(again.measurement.values)
    figures = "  ".join(
        f"{name} {value:.6g} (merge {recorded[name]:.6g})" for name, value in values.items()
    )
    line = f"scored as an adapter of its base on {again.split} items: {figures}"
    result = {"split": again.split, "values": values, "recorded": dict(recorded)}
    return Exported({**written.result, **result}, [*written.lines, line])


def _gguf(
    opened: Run, record: TrialRecord, forms: Forms, folder: Path, *, overwrite: bool
) -> Exported:
    from mergesearch.merging.export.gguf_format.writing import write_gguf

    assert forms.gguf is not None
    name = f"{opened.plan.spec.name} trial {record.number}"
    kind = forms.gguf_type or "f16"
    bits = dict(record.recipe.bits)
    exported = write_gguf(folder, forms.gguf, kind, name=name, overwrite=overwrite, bits=bits)
    first, *others = exported.lines()
    lines = [f"trial {record.number} written to {forms.gguf}: {first}", *others]
    return Exported(exported.to_dict(), lines)


def _check_gguf(record: TrialRecord, forms: Forms, head: str | None, overwrite: bool) -> None:
    """Refuse a GGUF file before the model is merged."""
    from mergesearch.merging.checkpoints.opening import open_checkpoint
    from mergesearch.merging.export.gguf_format.writing import check_gguf

    assert forms.gguf is not None
    sources = {source.name: source for source in (record.recipe.base, *record.recipe.experts)}
    chosen = record.recipe.base if head is None else sources.get(head, record.recipe.base)
    if record.recipe.routing:
        raise InputError(
            "gguf: expected the merge of one checkpoint, received one that depends on its input"
        )
    config = open_checkpoint(chosen.path).config
    kind = forms.gguf_type or "f16"
    check_gguf(config, kind, forms.gguf, overwrite, dict(record.recipe.bits))


@contextmanager
def _model_folder(
    record: TrialRecord, out: Path | None, beside: Path, head: str | None
) -> Iterator[Path]:
    """The folder of the exported model; one for the time being where none is asked for."""
    from mergesearch.merging.export.folder import export_model
    from mergesearch.merging.mixture.exporting import export_mixture

    if out is not None:
        yield out
        return
    resolved(beside).parent.mkdir(parents=True, exist_ok=True)
    place = Path(mkdtemp(prefix=f".{beside.name}.", dir=resolved(beside).parent))
    try:
        model = place / "model"
        if record.recipe.mixture:
            export_mixture(record.recipe, model, head=head)
        else:
            export_model(record.recipe, model, threads=usable_cores(), head=head)
        yield model
    finally:
        shutil.rmtree(place, ignore_errors=True)
