"""What a merge is rebuilt from, and what is recorded of it: a recipe, an export, a run's trial."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mergesearch.merging import InputError, Recipe
from mergesearch.merging.export.content import Content, recorded_content
from mergesearch.merging.recipe_file import load_recipe
from mergesearch.search.record.trial_record import TrialRecord
from mergesearch.search.runs.opened import Run, open_run
from mergesearch.spaces.groups import groups_by_name

#: Names under which an export writes its recipe; JSON is read faster.
RECIPES = ("recipe.json", "recipe.yaml")


@dataclass(frozen=True)
class ReplaySource:
    """A merge, and what is known of it.

    Attributes:
        path: What the user named.
        recipe: The merge.
        content: What an export recorded of its weights; None where it is of no export.
        weights: Folder with the weights that the export wrote; None where they are not there.
        run: The run that the merge is a trial of; None where none was named.
        record: Its trial there.
    """

    path: Path
    recipe: Recipe
    content: Content | None = None
    weights: Path | None = None
    run: Run | None = None
    record: TrialRecord | None = None


def open_source(path: Path, trial: int | None) -> ReplaySource:
    """Find the merge that a path stands for.

    Args:
        path: A recipe, the folder of an exported model, or the folder of a run.
        trial: Number of the run's trial; None: its winner.

    Raises:
        InputError: If it is none of them, or a trial of something that is no run was named.
        RecipeError: If the recipe is malformed.
    """
    recipe = next((path / name for name in RECIPES if (path / name).is_file()), None)
    if recipe is None and (path / "study.yaml").is_file():
        return _of_run(path, trial)
    if trial is not None:
        raise InputError(f"--trial: expected the folder of a run, received {path}")
    if recipe is None and path.is_dir():
        raise InputError(
            f"{path}: expected a recipe, the folder of an exported model or of a run, received a "
            f"folder without {', '.join(RECIPES)} and study.yaml"
        )
    return _of_recipe(path, recipe or path)


def _of_run(path: Path, trial: int | None) -> ReplaySource:
    run = open_run(path)
    if run.plan.layout is None:
        raise InputError(
            f"{path}: expected a study of checkpoints, received an analytic problem: nothing to "
            "rebuild"
        )
    record = run.trial(trial)
    return ReplaySource(path, record.recipe, run=run, record=record)


def _of_recipe(path: Path, recipe: Path) -> ReplaySource:
    folder = recipe.parent
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{path}: expected the recipe of a model folder, received that of an adapter, which "
            "lacks what it was cut to; rebuild the whole model with `mergesearch merge`"
        )
    loaded = load_recipe(recipe, groups_by_name)
    written = recipe.name in RECIPES and any(folder.glob("**/*.safetensors"))
    return ReplaySource(path, loaded, recorded_content(recipe), folder if written else None)
