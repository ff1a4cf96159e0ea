"""A folder that transformers loads, rebuilt from a recipe alone.

Tensors are merged one at a time from the full-precision sources and written straight to their
bytes, so memory is bounded by one tensor of each source. The folder appears under its name only
when everything in it is on disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.checkpoints.pipelines import add_other_models, stem_in
from mergesearch.merging.checkpoints.safetensors_files import ITEMSIZE, TensorInfo
from mergesearch.merging.checkpoints.safetensors_writer import (
    lay_out_files,
    write_patches,
    write_tensor,
)
from mergesearch.merging.errors import CheckpointError, InputError, NonFiniteError, RecipeError
from mergesearch.merging.export.about import NOTHING, About
from mergesearch.merging.export.companions import copy_companions
from mergesearch.merging.export.content import content_of
from mergesearch.merging.export.head_folders import (
    family_to_write,
    names_written,
    write_heads,
    written_family,
)
from mergesearch.merging.export.model_card import render_card
from mergesearch.merging.export.new_folder import check_target, new_folder
from mergesearch.merging.family.family import ModelFamily, open_family
from mergesearch.merging.family.integers import warn_of_integers
from mergesearch.merging.family.tokenizer_files import VOCABULARIES, check_written, vocabulary_files
from mergesearch.merging.family.untouched import Untouched, untouched
from mergesearch.merging.foreign.paths import resolved
from mergesearch.merging.kernels.host import all_finite
from mergesearch.merging.mergekit_format.exporting import FILE as MERGEKIT
from mergesearch.merging.mergekit_format.exporting import write_mergekit_config
from mergesearch.merging.models.layer_bits import at_bits
from mergesearch.merging.policies import choices_text
from mergesearch.merging.recipe import Recipe, Source
from mergesearch.merging.recipe_file import located, save_recipe
from mergesearch.merging.resident.recalibration import open_recalibration
from mergesearch.merging.tensors.layout import FLOATING, Layout, TensorSpec
from mergesearch.merging.tensors.memo import Memo
from mergesearch.merging.tensors.rounding import Rounding

if TYPE_CHECKING:
    import torch

    from mergesearch.merging.in_memory import OpenMerger, Settle


@dataclass(frozen=True)
class Export:
    """An exported model.

    Attributes:
        folder: The model.
        rounding: What storing it in its dtypes cost.
        untouched: What the operator passed over.
    """

    folder: Path
    rounding: Rounding
    untouched: Untouched


def export_model(
    recipe: Recipe,
    out: Path,
    *,
    facts: Mapping[str, str] | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    dtype: str | None = None,
    threads: int = 1,
    head: str | None = None,
    about: About = NOTHING,
    memo: Memo | None = None,
) -> Export:
    """Write the merged model of ``recipe`` as a Hugging Face folder.

    It holds what the base's folder holds: weights in the base's dtypes (one rounding), the same
    stored names, integer tensors and tied copies included; configuration, tokenizer and
    preprocessor files; and the recipe with the sources' fingerprints, and a model card. Where
    experts keep heads of their own, ``heads/NAME`` has the head of each; or with ``head`` the
    folder is the whole model of one expert's tasks.

    Args:
        recipe: The merge.
        out: Folder to create; may exist if it is empty.
        facts: Lines for the model card, for example scores.
        shard_bytes: Size above which the weights are split over several files.
        overwrite: Replace a folder that is not empty.
        dtype: Of all merged tensors, instead of the base's own: a name in
            :data:`mergesearch.merging.tensors.layout.FLOATING`.
        threads: Tensors that are merged at once; changes no bit of them.
        head: Name of the expert (or ``base``) whose head and configuration the model gets.
        about: What the model card says beyond the recipe.
        memo: Where results of preparation are that were made before, or None.

    Raises:
        CheckpointError: If a source is missing, damaged, or does not fit the base.
        RecipeError: If the recipe does not fit its sources, or they changed since it was made.
        InputError: If there is no such head, or ``out`` cannot be written or is in use.
        NonFiniteError: If a merged tensor holds NaN or infinity.
    """
    if recipe.routing:
        raise RecipeError(
            "recipe: expected the merge of one checkpoint, received "
            f"{dict(recipe.routing).get('method')!r}, which is merged for each input; export it "
            "from its run with `mergesearch export`"
        )
    if recipe.mixture:
        raise RecipeError(
            "recipe: expected a merge of checkpoints, received one inside a mixture of experts; "
            "export it from its run with `mergesearch export`"
        )
    target = resolved(out)
    family = open_family(recipe, memo)
    written = family_to_write(family, head)
    check_fit(recipe, family)
    check_target(target, family.sources, overwrite)
    files = _changed_files(written, dtype)
    stamped = stamped_recipe(recipe, family)
    stored = _stored_as(written, dtype)
    about = replace(about, dtype=dtype)
    try:
        rounding, left = _write_folder(
            stamped, target, written, stored, files, facts or {}, shard_bytes, threads, about, dtype
        )
    except OSError as error:
        raise InputError(
            f"{out}: expected a place to write {_gigabytes(family.base)} GB, received: "
            f"{error.strerror or error}"
        ) from error
    return Export(out, rounding, left)


def _write_folder(
    recipe: Recipe,
    target: Path,
    family: ModelFamily,
    stored: Mapping[str, TensorInfo],
    files: Mapping[str, str],
    facts: Mapping[str, str],
    shard_bytes: int,
    threads: int,
    about: About,
    dtype: str | None,
) -> tuple[Rounding, Untouched]:
    with new_folder(target) as part:
        place = _weights_folder(family.base, part)
        written = _laid_out(place, stored, shard_bytes, family, _stem(family.base))
        warn_of_integers(family)
        rounding = _write_weights(
            written, family.base, _merger(recipe, family, threads), family.layout, threads
        )
        _write_companions(family, files, place)
        if family.heads is not None:
            write_heads(family.base, family.heads, part)
        _recalibrate(family, part, written)
        head = None if family.heads is None else family.heads.chosen
        exported = content_of(part, dtype, head, about).to_dict()
        save_recipe(recipe, part / "recipe.yaml", exported)
        save_recipe(recipe, part / "recipe.json", exported)
        left = _untouched(recipe, family)
        known = {**facts, **rounding.facts(), **_policies(recipe)}
        known |= {"passed over": left.sentence} if left.sentence else {}
        known |= write_mergekit_config(recipe, family, stored, part)
        card = render_card(
            recipe,
            family.layout,
            family.base,
            family.experts,
            known,
            family.heads,
            about,
            mergekit=(part / MERGEKIT).is_file(),
        )
        (part / "README.md").write_text(card, encoding="utf-8")
        _verify(part, stored, family)
    return rounding, left


def _recalibrate(family: ModelFamily, part: Path, written: Mapping[str, TensorInfo]) -> None:
    """Recompute the statistics of an exported model, with any head where it has none itself."""
    recalibration = open_recalibration(family)
    if recalibration is None:
        return
    apart = {} if family.heads is None or family.heads.chosen else family.heads.apart
    whole = written_family(part, next(iter(apart))) if apart else family
    with folder_of_base(whole, part.parent) if apart else nullcontext(str(part)) as folder:
        statistics = family.special.statistics
        recalibration.apply_to_folder(folder, written, statistics, whole.stored_as)


def _laid_out(
    folder: Path,
    stored: Mapping[str, TensorInfo],
    shard_bytes: int,
    family: ModelFamily,
    stem: str = "model",
) -> dict[str, TensorInfo]:
    """Files for tensors, under the names that the family is written with; where each lies."""
    infos = lay_out_files(folder, names_written(stored, family), shard_bytes, stem)
    return {name: infos[family.stored_as.get(name, name)] for name in stored}


def _weights_folder(base: Checkpoint, part: Path) -> Path:
    """The folder for the weights: that of the denoiser in a new pipeline, else ``part`` itself."""
    if not base.denoiser or base.folder is None:
        return part
    add_other_models(base.folder.parent, base.denoiser, part)
    (part / base.denoiser).mkdir()
    return part / base.denoiser


def _stem(base: Checkpoint) -> str:
    """Beginning of the names of weight files, as the base has it."""
    return (base.folder and stem_in(base.folder)) or "model"


def _untouched(recipe: Recipe, family: ModelFamily) -> Untouched:
    from mergesearch.merging.operators import get_operator

    operator = get_operator(recipe.operator)
    return untouched(operator, family.layout, recipe.options, family.base.config)


def _policies(recipe: Recipe) -> dict[str, str]:
    chosen = choices_text(recipe.special)
    return {"special tensors": chosen} if chosen else {}


def check_fit(recipe: Recipe, family: ModelFamily) -> None:
    """Refuse a recipe that does not fit its sources, before weights are read.

    Raises:
        RecipeError: In one line.
    """
    from mergesearch.merging.operators import get_operator

    operator = get_operator(recipe.operator)
    layout = family.layout
    family.check(operator)
    options = operator.check(layout, len(recipe.experts), recipe.options)
    directions = operator.directions(len(recipe.experts), options)
    if recipe.field.directions != directions:
        raise RecipeError(
            f"recipe: expected {directions} rows of coefficients for {recipe.operator} with "
            f"{len(recipe.experts)} experts, received {recipe.field.directions}"
        )
    if recipe.field.size != layout.size or recipe.layout not in ("", layout.digest):
        raise RecipeError(
            f"recipe: expected a field over layout {layout.digest} of {layout.size} positions, "
            f"received {recipe.layout or 'none'} of {recipe.field.size}; it was made for another "
            "base"
        )


def stamped_recipe(recipe: Recipe, family: ModelFamily) -> Recipe:
    """The recipe with the fingerprints of what is read now.

    Raises:
        RecipeError: If they are not those that it was made with.
    """
    full = located(recipe, Path.cwd())
    sources = zip((full.base, *full.experts), family.sources, strict=True)
    first, *others = (_stamp(source, checkpoint) for source, checkpoint in sources)
    return replace(full, base=first, experts=tuple(others), layout=family.layout.digest)


def _stamp(source: Source, checkpoint: Checkpoint) -> Source:
    where = f"source {source.name!r} ({source.path})"
    return replace(source, fingerprint=checked_fingerprint(checkpoint, source.fingerprint, where))


def checked_fingerprint(checkpoint: Checkpoint, known: str, where: str) -> str:
    """The fingerprint of what is read now.

    Args:
        checkpoint: The weights.
        known: The fingerprint in the recipe; empty where it has none.
        where: The source, as errors name it.

    Raises:
        RecipeError: If they are not the weights that the recipe was made with.
    """
    current = checkpoint.fingerprint()
    if known not in ("", current):
        raise RecipeError(
            f"{where}: expected weights {known[:12]}, "
            f"received {current[:12]}; they changed since the recipe was made, restore them"
        )
    return current


def _stored_as(family: ModelFamily, dtype: str | None) -> dict[str, TensorInfo]:
    """The base's tensors, those that are merged and heads with ``dtype`` and sizes to match."""
    base = family.base
    if dtype is None:
        return dict(base.tensors)
    if dtype not in FLOATING:
        raise InputError(
            f"dtype: expected one of {', '.join(sorted(FLOATING))}, received {dtype!r}"
        )
    own = set() if family.heads is None else {*family.heads.names}
    carried = {
        *(
            name
            for name in base.carried
            if name not in own or base.tensors[name].dtype not in FLOATING
        ),
        *(alias for alias, kept in base.aliases.items() if kept in base.carried),
    }
    return {n: info if n in carried else _cast(info, dtype) for n, info in base.tensors.items()}


def _cast(info: TensorInfo, dtype: str) -> TensorInfo:
    return replace(info, dtype=dtype, stop=info.start + math.prod(info.shape) * ITEMSIZE[dtype])


def _merger(recipe: Recipe, family: ModelFamily, threads: int) -> OpenMerger:
    from mergesearch.merging.in_memory import merge_open, prepared_merge

    merge = prepared_merge(
        family.base,
        family.experts,
        recipe.operator,
        recipe.options,
        recipe.field,
        family.layout,
        family.special,
        threads,
    )
    if recipe.bits:
        return partial(_rounded, partial(merge_open, merge, later=False), dict(recipe.bits))
    return partial(merge_open, merge)


def _rounded(
    merge_one: OpenMerger, bits: Mapping[str, int], spec: TensorSpec, dtype: str
) -> tuple[torch.Tensor, Rounding, None]:
    """A merged tensor at the bits of its layer, and what storing it before that cost."""
    merged, cost, _ = merge_one(spec, dtype)
    width = bits.get(spec.name)
    return (merged if width is None else at_bits(merged, width)), cost, None


def _write_weights(
    stored: Mapping[str, TensorInfo],
    base: Checkpoint,
    merge_one: OpenMerger,
    layout: Layout,
    threads: int,
) -> Rounding:
    """Merge, round and write every tensor; returns what rounding cost.

    What waits for a statistic of the whole model is written over it at the end.
    """
    import torch

    from mergesearch.merging.tensors.parallel import parallel_map

    copies: dict[str, list[str]] = {}
    for alias, kept in base.aliases.items():
        copies.setdefault(kept, []).append(alias)

    open_ones: dict[str, Settle] = {}

    def write(name: str, tensor: torch.Tensor) -> None:
        for stored_name in (name, *copies.get(name, ())):
            write_tensor(stored[stored_name], tensor)

    def work(spec: TensorSpec) -> Rounding:
        merged, cost, settle = merge_one(spec, stored[spec.name].dtype)
        _check_finite(spec.name, merged)
        write(spec.name, merged)
        if settle is not None:
            open_ones[spec.name] = settle
        return cost

    def finish(name: str) -> Rounding:
        patches = open_ones[name]()
        if patches is None:
            return Rounding()
        for stored_name in (name, *copies.get(name, ())):
            write_patches(stored[stored_name], patches.positions, patches.numbers)
        return Rounding(patches.lost, patches.change)

    rounding = sum(parallel_map(work, layout.tensors, threads), Rounding())
    rounding = sum(parallel_map(finish, sorted(open_ones), threads), rounding)
    left = {*base.merged} - {*layout.names}
    if left:
        raise RuntimeError(f"the merge left out {sorted(left)}")
    for name in base.carried:
        tensor = base.read(name)
        write(name, tensor.to(getattr(torch, stored[name].dtype)))
    return rounding


def _unmerged(
    base: Checkpoint, spec: TensorSpec, dtype: str
) -> tuple[torch.Tensor, Rounding, None]:
    """The base's tensor, in the place of a merged one."""
    import torch

    return base.read(spec.name).to(getattr(torch, dtype)), Rounding(), None


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if not all_finite(tensor):
        raise NonFiniteError(f"merged tensor {name!r}")


def _changed_files(family: ModelFamily, dtype: str | None) -> dict[str, str]:
    """File name -> content of the base's companions that policies or ``dtype`` change."""
    config = dict(family.base.config)
    if dtype is not None and "_class_name" not in config:  # diffusers keeps no dtype there
        config |= {"torch_dtype" if "torch_dtype" in config else "dtype": dtype}
    changed = bool(family.base.config) and (family.rebuilt or dtype is not None)
    files = {"config.json": json.dumps(config, indent=2) + "\n"} if changed else {}
    if family.alignment is None or family.base.folder is None:
        return files
    return files | vocabulary_files(family.alignment, family.base, family.experts)


def _write_companions(family: ModelFamily, files: Mapping[str, str], folder: Path) -> None:
    base = family.base
    if base.folder is not None:
        # Beside a new tokenizer.json, files that list the vocabulary in their own way are out of
        # date.
        stale = [*files, *(VOCABULARIES if "tokenizer.json" in files else ())]
        copy_companions(base.folder, folder, lambda file: any(file.match(name) for name in stale))
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


@contextmanager
def folder_of_base(family: ModelFamily, beside: Path) -> Iterator[str]:
    """A folder from which transformers loads the base as it is merged.

    Its own where no policy changed its tensors; else one in ``beside`` that lasts as long as the
    context.
    """
    if not family.rebuilt:
        yield family.base.path
        return
    beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".base-", dir=beside) as name:
        stored = _laid_out(Path(name), family.base.tensors, 5_000_000_000, family)
        _write_weights(stored, family.base, partial(_unmerged, family.base), family.layout, 1)
        _write_companions(family, {"config.json": json.dumps(family.base.config)}, Path(name))
        yield name


def _verify(folder: Path, stored: Mapping[str, TensorInfo], family: ModelFamily) -> None:
    """Check an exported folder by opening it as any reader would."""
    written = open_checkpoint(str(folder))
    if {n: (i.shape, i.dtype) for n, i in written.tensors.items()} != {
        n: (i.shape, i.dtype) for n, i in names_written(stored, family).items()
    }:
        raise CheckpointError(
            f"{folder}: expected the base's tensors after writing, received others"
        )
    if family.alignment is not None:
        check_written(folder, family.alignment)


def _gigabytes(base: Checkpoint) -> str:
    return f"{sum(info.stop - info.start for info in base.tensors.values()) / 1e9:.2g}"
