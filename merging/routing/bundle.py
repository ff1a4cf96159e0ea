"""An input-dependent merge on disk: model folders, and the tensors that go with them.

::

    routing.json          method, parameters, names of the experts, auto class of the model,
                          class prompts or experts' heads if it answers by some
    tokenizer/            of class prompts
    base/, expert/        T3: two folders that transformers loads
    shared/               Twin-Merging: the shared merge, a folder that transformers loads
    base/                 task masks: the base, with the heads of the experts in heads/
    routing.safetensors   Twin-Merging: low-rank vectors of the experts, and the router
                          task masks: the sum of changes, and a bit for each weight and task
    recipe.yaml, .json    what it was made from
    README.md             how to load it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergesearch.merging.errors import InputError
from mergesearch.merging.export.bundle_card import Served, render_bundle_card
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.export.new_folder import check_target, new_folder
from mergesearch.merging.family.family import open_family
from mergesearch.merging.foreign.paths import resolved
from mergesearch.merging.models.prompt_heads import PromptHeads
from mergesearch.merging.models.task_heads import TaskHead
from mergesearch.merging.recipe import Recipe
from mergesearch.merging.recipe_file import load_recipe, save_recipe
from mergesearch.merging.routing.methods import LOADERS, TENSORS, Stored
from mergesearch.merging.routing.sheet import FORMAT, SHEET, read_sheet
from mergesearch.merging.tensors.field import Field

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mergesearch.merging.models.own_heads import OwnHeads
    from mergesearch.merging.routing.routed import Routed
    from mergesearch.merging.routing.twin_merging import TwinMerging

TOKENIZER = "tokenizer"
#: Auto classes of models that continue texts.
WRITING = ("AutoModelForCausalLM",)


def write_bundle(
    recipe: Recipe,
    routed: Routed,
    out: Path,
    *,
    model_class: str,
    facts: Mapping[str, str] | None = None,
    overwrite: bool = False,
    threads: int = 1,
) -> None:
    """Write an input-dependent merge as a folder.

    The folder appears under its name when everything in it is on disk.

    Args:
        recipe: What ``routed`` was made from.
        routed: The merge.
        out: Folder to create; may exist if it is empty.
        model_class: Auto class of its models.
        facts: Lines for the card.
        overwrite: Replace a folder that is not empty.
        threads: As for an export.

    Raises:
        InputError: If ``out`` cannot be written or is in use.
    """
    target = resolved(out)
    family = open_family(recipe)
    check_target(target, family.sources, overwrite)
    try:
        with new_folder(target) as part:
            stamped = _write_models(recipe, part, threads)
            _write_sheet(recipe, routed.head, model_class, part)
            _write_tensors(routed, part / TENSORS)
            writes = next(iter(folders(recipe))) if model_class in WRITING else None
            sources = (family.base, family.experts)
            card = render_bundle_card(stamped, *sources, facts or {}, served(routed), writes=writes)
            (part / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{out}: expected a place to write, received: {error.strerror or error}"
        ) from error


def _write_models(recipe: Recipe, part: Path, threads: int) -> Recipe:
    """Write the checkpoints and the recipe; returns the recipe with fingerprints of its sources."""
    for name, field in folders(recipe).items():
        export_model(replace(recipe, routing=(), field=field), part / name, threads=threads)
    stamped = load_recipe(part / next(iter(folders(recipe))) / "recipe.json")
    whole = replace(stamped, routing=recipe.routing, field=recipe.field)
    for name in ("recipe.yaml", "recipe.json"):
        save_recipe(whole, part / name)
    return whole


def _write_sheet(recipe: Recipe, head: TaskHead, model_class: str, part: Path) -> None:
    """Write what is no tensor: the sheet, and the tokenizer of class prompts."""
    sheet: dict[str, Any] = {
        "format": FORMAT,
        "routing": dict(recipe.routing),
        "experts": [expert.name for expert in recipe.experts],
        "model_class": model_class,
    }
    if isinstance(head, PromptHeads):
        head.tokenizer.save_pretrained(str(part / TOKENIZER))
        sheet["prompts"] = {key: list(texts) for key, texts in head.prompts.items()}
        sheet["classes"] = {key: list(names) for key, names in head.classes.items()}
        sheet["fixed"] = head.fixed is not None
    if (own := _own_heads(head)) is not None:
        sheet["heads"] = [*own.models]
    (part / SHEET).write_text(json.dumps(sheet, indent=1) + "\n", encoding="utf-8")


def _own_heads(head: TaskHead) -> OwnHeads | None:
    """The heads of experts, where these have their own."""
    from mergesearch.merging.models.own_heads import OwnHeads

    return head if isinstance(head, OwnHeads) else None


def served(routed: Routed) -> Served:
    """Which tasks a merge serves, and how items are told apart."""
    from mergesearch.merging.routing.masked import MaskedMerge

    own = _own_heads(routed.head)
    if isinstance(routed, MaskedMerge):
        return Served(routed.tasks, masks=True, heads=own is not None, infers=bool(routed.router))
    if own is not None:
        return Served(tuple(own.models), heads=True)
    prompts = routed.head.classes if isinstance(routed.head, PromptHeads) else ()
    return Served(tuple(task for task in prompts if task))


def folders(recipe: Recipe) -> dict[str, Field]:
    """Folder -> coefficients of the checkpoints that an input-dependent merge is made from."""
    values = dict(recipe.routing)
    size = recipe.field.size
    experts = len(recipe.experts)
    if values["method"] == "t3":
        return {
            "base": Field.constant(size, np.zeros(1)),
            "expert": Field.constant(size, np.ones(1)),
        }
    if values["method"] == "task_masks":
        return {"base": Field.constant(size, np.zeros(experts))}
    return {"shared": Field.constant(size, np.full(experts, float(values["shared_scale"])))}


def load(folder: Path | str) -> Routed:
    """The merge of a folder that :func:`write_bundle` wrote, in evaluation mode.

    Call it as the model itself, with ``tasks`` where it answers by class prompts of several. One of
    texts takes ``input_ids`` and ``attention_mask``, also in ``generate``.

    Raises:
        CheckpointError: If the folder is no bundle, or one of a newer version.
    """
    root = Path(folder)
    sheet = read_sheet(root)
    routing = sheet["routing"]
    names = sheet.get("heads") or []
    stored = Stored(root, routing, sheet["experts"], sheet["model_class"], names)
    loaded = LOADERS[routing["method"]](stored).eval()
    loaded.head = _stored_head(root, sheet, loaded.model) or loaded.head
    return loaded


def _stored_head(root: Path, sheet: Mapping[str, Any], model: nn.Module) -> TaskHead | None:
    """The class prompts of a bundle, or None; the model has weights of one of its folders."""
    from mergesearch.merging.checkpoints.tokenizer_folder import tokenizer_in

    if not sheet.get("prompts"):
        return None
    tokenizer = tokenizer_in(root / TOKENIZER, str(root))
    heads = PromptHeads(sheet["prompts"], sheet["classes"], tokenizer)
    return heads.fixed_by(model) if sheet["fixed"] else heads


def _write_tensors(routed: Routed, path: Path) -> None:
    from safetensors.torch import save_file

    from mergesearch.merging.routing.masked import MaskedMerge
    from mergesearch.merging.routing.masked_file import masked_tensors
    from mergesearch.merging.routing.twin_merging import TwinMerging

    if isinstance(routed, TwinMerging):
        save_file(_twin_tensors(routed), path)
    if isinstance(routed, MaskedMerge):
        save_file(masked_tensors(routed), path)


def _twin_tensors(routed: TwinMerging) -> dict[str, torch.Tensor]:
    from mergesearch.merging.routing.router import router_tensors

    tensors = router_tensors(routed.router)
    for k, vector in enumerate(routed.exclusive):
        for name, part in vector.items():
            tensors[f"exclusive.{k}.{name}.left"] = part.left.cpu().contiguous()
            if part.right is not None:
                tensors[f"exclusive.{k}.{name}.right"] = part.right.cpu().contiguous()
    return tensors
