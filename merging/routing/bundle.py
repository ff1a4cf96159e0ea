"""An input-dependent merge on disk: model folders, and the tensors that go with them.

::

    routing.json          method, parameters, names of the experts, auto class of the model,
                          class prompts or experts' heads if it answers by some
    tokenizer/            of class prompts
    base/, expert/        T3: two folders that transformers loads
    shared/               Twin-Merging: the shared merge, a folder that transformers loads
    routing.safetensors   Twin-Merging: low-rank vectors of the experts, and the router
    recipe.yaml, .json    what it was made from
    README.md             how to load it
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergesearch.merging.checkpoints.safetensors_files import read_header
from mergesearch.merging.errors import CheckpointError, InputError
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.export.model_card import render_bundle_card
from mergesearch.merging.export.new_folder import check_target, new_folder
from mergesearch.merging.family.family import open_family
from mergesearch.merging.foreign.json_text import read_json
from mergesearch.merging.foreign.library import library_errors
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.paths import resolved
from mergesearch.merging.foreign.shown import cut, path_shown, shown
from mergesearch.merging.models.prompt_heads import PromptHeads
from mergesearch.merging.models.task_heads import TaskHead
from mergesearch.merging.recipe import Recipe
from mergesearch.merging.recipe_file import load_recipe, save_recipe
from mergesearch.merging.tensors.field import Field

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mergesearch.merging.models.own_heads import OwnHeads
    from mergesearch.merging.routing.routed import LowRank, Routed, TwinMerging

FORMAT = 1
SHEET = "routing.json"
TENSORS = "routing.safetensors"
TOKENIZER = "tokenizer"


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
            tasks = _named_tasks(routed.head)
            card = render_bundle_card(stamped, family.base, family.experts, facts or {}, tasks)
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


def _named_tasks(head: TaskHead) -> list[str]:
    """Tasks with classes of their own."""
    if (own := _own_heads(head)) is not None:
        return [*own.models]
    return [task for task in head.classes if task] if isinstance(head, PromptHeads) else []


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
    return {"shared": Field.constant(size, np.full(experts, float(values["shared_scale"])))}


def load(folder: Path | str) -> Routed:
    """The merge of a folder that :func:`write_bundle` wrote, in evaluation mode.

    Call it as the model itself, with ``tasks`` where it answers by class prompts of several.

    Raises:
        CheckpointError: If the folder is no bundle, or one of a newer version.
    """
    root = Path(folder)
    sheet = read_sheet(root)
    routing = sheet["routing"]
    names = sheet.get("heads") or []
    load_method = _LOADERS[routing["method"]]
    experts = len(sheet["experts"])
    loaded: Routed = load_method(root, routing, experts, sheet["model_class"], names).eval()
    loaded.head = _stored_head(root, sheet, loaded.model) or loaded.head
    return loaded


def read_sheet(root: Path) -> Mapping[str, Any]:
    """The checked sheet of a bundle.

    Raises:
        CheckpointError: If the folder is no bundle, or one of a newer version.
    """
    try:
        sheet = Node(read_json(root / SHEET, CheckpointError), path_shown(root), CheckpointError)
        version = sheet.at("format").value
        routing = sheet.at("routing")
        method = routing.at("method").value
        if version == FORMAT and isinstance(method, str) and method in _LOADERS:
            _check_sheet(sheet, routing, method)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path_shown(root)}: expected a folder with {SHEET}, as `mergesearch export` writes "
            f"it, received: {cut(str(error), 200)}"
        ) from None
    if version != FORMAT or not isinstance(method, str) or method not in _LOADERS:
        raise CheckpointError(
            f"{path_shown(root)}: expected format {FORMAT} and a method among {sorted(_LOADERS)}, "
            f"received {shown(version)} and {shown(method)}; load it with the version that wrote it"
        )
    return sheet.mapping()


def _check_sheet(sheet: Node, routing: Node, method: str) -> None:
    """Refuse values of other types than :func:`write_bundle` writes."""
    sheet.at("model_class").text()
    for key in ("experts", "heads"):
        for name in sheet.at(key).elements() if key == "experts" or sheet.has(key) else ():
            if not name.text() or Path(name.text()).name != name.text():
                raise name.wrong("the name of an expert")
    if routing.at("per").value not in ("item", "batch"):
        raise routing.at("per").wrong("item or batch")
    for key in _NUMBERS[method]:
        routing.at(key).number()
    if method == "t3":
        routing.at("centred").boolean()
    if sheet.has("prompts"):
        sheet.at("fixed").boolean()
        for key in ("prompts", "classes"):
            for _, texts in sheet.at(key).members():
                for element in texts.elements():
                    element.text()


def _stored_head(root: Path, sheet: Mapping[str, Any], model: nn.Module) -> TaskHead | None:
    """The class prompts of a bundle, or None; the model has weights of one of its folders."""
    from mergesearch.merging.checkpoints.tokenizer_folder import tokenizer_in

    if not sheet.get("prompts"):
        return None
    tokenizer = tokenizer_in(root / TOKENIZER, str(root))
    heads = PromptHeads(sheet["prompts"], sheet["classes"], tokenizer)
    return heads.fixed_by(model) if sheet["fixed"] else heads


def _loaded(
    folder: Path, model_class: str, names: Sequence[str]
) -> tuple[nn.Module, TaskHead | None]:
    """The model of a folder, and the models with each of its heads, if it has several."""
    from mergesearch.merging.export.head_folders import head_names
    from mergesearch.merging.export.head_models import load_with_head
    from mergesearch.merging.models.loading import load_model
    from mergesearch.merging.models.own_heads import OwnHeads, share_alike

    if not names:
        return load_model(str(folder), model_class), None
    models = {name: load_with_head(folder, name, model_class) for name in names}
    first, *others = names
    for name in others:
        share_alike(models[first], models[name], head_names(folder, name))
    return models[first], OwnHeads(models)


def _load_t3(
    root: Path, routing: Mapping[str, Any], experts: int, model_class: str, names: Sequence[str]
) -> Routed:
    from mergesearch.merging.routing.routed import copied_tensors

    model, head = _loaded(root / "base", model_class, names)
    base = copied_tensors(model)
    expert, _ = _loaded(root / "expert", model_class, names[:1])
    return t3_of(model, base, copied_tensors(expert), routing, head)


def _load_twin(
    root: Path, routing: Mapping[str, Any], experts: int, model_class: str, names: Sequence[str]
) -> Routed:
    from safetensors.torch import load_file

    from mergesearch.merging.models.task_heads import OwnHead
    from mergesearch.merging.routing.routed import TwinMerging, copied_tensors, without_heads
    from mergesearch.merging.routing.router import make_router

    model, head = _loaded(root / "shared", model_class, names)
    read_header(root / TENSORS)  # names what the library would stumble over
    stored = load_file(root / TENSORS)
    shared = without_heads(copied_tensors(model), head or OwnHead())
    with library_errors(path_shown(root / TENSORS), "the tensors of the bundle", CheckpointError):
        vectors = [
            {name: _low_rank(stored, f"exclusive.{k}.{name}", shared[name]) for name in shared}
            for k in range(experts)
        ]
        state = {
            name.removeprefix("router."): t
            for name, t in stored.items()
            if name.startswith("router.")
        }
        width, inputs = state["0.weight"].shape
        router = make_router(inputs, width, experts)
        router.load_state_dict(state)
    return TwinMerging(
        model,
        shared,
        vectors,
        router.eval().requires_grad_(False),
        temperature=routing["temperature"],
        per=routing["per"],
        head=head,
    )


def t3_of(
    model: Any, base: Any, expert: Any, routing: Mapping[str, Any], head: TaskHead | None = None
) -> Routed:
    """T3 with the parameters of a recipe's routing."""
    from mergesearch.merging.routing.routed import T3

    return T3(
        model,
        base,
        expert,
        low=routing["lambda_min"],
        high=routing["lambda_max"],
        gamma=routing["gamma"],
        per=routing["per"],
        centred=routing["centred"],
        head=head,
    )


#: Method -> its parameters that are numbers.
_NUMBERS = {"t3": ("lambda_min", "lambda_max", "gamma"), "twin_merging": ("temperature",)}
_LOADERS = {"t3": _load_t3, "twin_merging": _load_twin}


def _low_rank(stored: Mapping[str, torch.Tensor], key: str, like: torch.Tensor) -> LowRank:
    from mergesearch.merging.routing.routed import LowRank

    return LowRank(stored[f"{key}.left"], stored.get(f"{key}.right"), tuple(like.shape))


def _write_tensors(routed: Routed, path: Path) -> None:
    from safetensors.torch import save_file

    from mergesearch.merging.routing.routed import TwinMerging

    if isinstance(routed, TwinMerging):
        save_file(_twin_tensors(routed), path)


def _twin_tensors(routed: TwinMerging) -> dict[str, torch.Tensor]:
    tensors = {
        f"router.{name}": tensor.cpu() for name, tensor in routed.router.state_dict().items()
    }
    for k, vector in enumerate(routed.exclusive):
        for name, part in vector.items():
            tensors[f"exclusive.{k}.{name}.left"] = part.left.cpu().contiguous()
            if part.right is not None:
                tensors[f"exclusive.{k}.{name}.right"] = part.right.cpu().contiguous()
    return tensors
