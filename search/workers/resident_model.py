"""What a worker keeps for all its tasks: the arena, and the model that is merged from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mergesearch.evaluators.compute_settings import fix_compute_settings
from mergesearch.merging import InputError
from mergesearch.merging.extensions.heavy_imports import fast_imports
from mergesearch.merging.tensors.accelerator import device_here
from mergesearch.merging.tensors.progress import listening
from mergesearch.search.workers.card_copy import CardCopy
from mergesearch.search.workers.loading import LoadingReporter
from mergesearch.search.workers.messages import WorkerSpec
from mergesearch.search.workers.node_cache import arena_folder

if TYPE_CHECKING:
    from mergesearch.merging.mixture.resident import MixtureWriter
    from mergesearch.merging.resident.arena import Arenas
    from mergesearch.merging.resident.merged_model import MergedModel
    from mergesearch.merging.resident.recalibration import Recalibration
    from mergesearch.merging.tensors.place import Place


def import_libraries(device: str) -> None:
    """Import what every worker with a model needs, before its parts do so one by one."""
    with fast_imports():
        import torch  # noqa: F401

        if device == "cpu":
            from mergesearch.merging.kernels import source_numba, spans_numba  # noqa: F401


def recalibration_of(spec: WorkerSpec) -> Recalibration | None:
    """What brings running statistics of a merge up to date, if the study asks for it."""
    from mergesearch.merging.family.family import open_family
    from mergesearch.merging.resident.recalibration import open_recalibration

    return open_recalibration(open_family(spec.template))


def opened_arenas(spec: WorkerSpec, loading: LoadingReporter) -> Arenas:
    """The arena of a study, prepared if this node does not have it."""
    from mergesearch.merging.resident.arena import open_arenas

    if spec.template.mixture:
        return _no_arenas(spec)
    loading.begin("preparing weights")
    with listening(loading):
        return open_arenas(
            spec.template,
            arena_folder(spec.arenas),
            rows=spec.rows,
            threads=spec.threads,
            place=preparing_place(spec),
        )


def _no_arenas(spec: WorkerSpec) -> Arenas:
    """The layout of one mixture, whose merges are made of its checkpoint."""
    from mergesearch.merging.family.family import open_family
    from mergesearch.merging.mixture.resident import empty_arenas

    return empty_arenas(open_family(spec.template))


def mixture_writer(spec: WorkerSpec, loading: LoadingReporter) -> MixtureWriter | None:
    """What writes merges inside one mixture into the model; None for any other study."""
    from mergesearch.merging.mixture.resident import MixtureWriter

    if not spec.template.mixture:
        return None
    loading.begin("counting what routers do")
    return MixtureWriter(spec.template, arena_folder(spec.arenas))


def own_heads(spec: WorkerSpec) -> tuple[str, ...]:
    """Names of the sources of a study that keep heads of their own; none where they share all."""
    from mergesearch.merging.family.family import open_family
    from mergesearch.merging.policies import parse_policies

    if not parse_policies(spec.template.special).keeps_own:
        return ()
    heads = open_family(spec.template).heads
    return () if heads is None else tuple(heads.of)


def resident_model(
    spec: WorkerSpec,
    model_class: str,
    loading: LoadingReporter,
    copy: CardCopy | None = None,
    heads: Mapping[str, str] = MappingProxyType({}),
) -> MergedModel:
    """The model that tasks are merged into.

    Args:
        spec: What it is merged from.
        model_class: Of transformers.
        loading: Told how far it is.
        copy: Base and rows that lie on the card already.
        heads: Sources with whose heads the merged weights are evaluated -> class of that model.
    """
    import torch

    from mergesearch.merging.export.folder import folder_of_base
    from mergesearch.merging.family.family import open_family
    from mergesearch.merging.models.loading import load_model
    from mergesearch.merging.resident.merged_model import MergedModel

    torch.set_num_threads(spec.threads)
    fix_compute_settings()
    arenas = opened_arenas(spec, loading)
    loading.begin("loading the model")
    device = device_here(spec.device)
    if heads:
        arenas = arenas if copy is None else copy.in_place_of(arenas, device)
        return _headed_model(spec, arenas, device, heads)
    with folder_of_base(open_family(spec.template), Path(spec.arenas)) as folder:
        model = load_model(folder, model_class)
    if spec.shards > 1:
        return _sharded_model(spec, model, model_class, arenas)
    if copy is not None:
        arenas = copy.in_place_of(arenas, device)
    return MergedModel(model, arenas, threads=spec.threads, device=device)


def _headed_model(
    spec: WorkerSpec, arenas: Arenas, device: str, classes: Mapping[str, str]
) -> MergedModel:
    """Models with different heads around the same merged weights; the first is the resident one.

    Raises:
        InputError: If the model is to lie on several cards that have no room for what it is merged
            from.
    """
    from mergesearch.merging.export.head_models import head_model
    from mergesearch.merging.family.family import open_family
    from mergesearch.merging.resident.device_map import dispatch, settled
    from mergesearch.merging.resident.merged_model import MergedModel

    family = open_family(spec.template)
    assert family.heads is not None
    merged = None
    for name in (name for name in family.heads.of if name in classes):
        model = head_model(family, name, classes[name], Path(spec.arenas))
        head = family.heads.of[name]
        if merged is None:
            devices = _spread(spec, model, arenas) if spec.shards > 1 else None
            merged = MergedModel(
                model, arenas, threads=spec.threads, device=device, devices=devices, head=head
            )
        merged.add_head(name, model, head)
        if spec.shards > 1:
            dispatch(model, settled(model, merged.placed))
    assert merged is not None
    return merged


def _sharded_model(spec: WorkerSpec, model: Any, model_class: str, arenas: Arenas) -> MergedModel:
    """A model over several cards, merged on them; in main memory where they have no room for it."""
    from mergesearch.merging.resident.device_map import device_map, device_memory, dispatch
    from mergesearch.merging.resident.merged_model import MergedModel

    try:
        devices = _spread(spec, model, arenas)
    except InputError:
        memory = device_memory(device_here(spec.device), spec.shards)
        return _followed_model(spec, model, model_class, arenas, device_map(model, memory))
    merged = MergedModel(model, arenas, threads=spec.threads, devices=devices)
    dispatch(model, devices)
    return merged


def _spread(spec: WorkerSpec, model: Any, arenas: Arenas) -> dict[str, str]:
    """Where the modules of a model lie with what they are merged from.

    Raises:
        InputError: If the cards have no room for it.
    """
    from mergesearch.merging.resident.device_map import device_map, device_memory

    # Ray shows a worker its own GPUs only.
    memory = device_memory(device_here(spec.device), spec.shards)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    return device_map(model, memory, needed=1 + arenas.memory.nbytes / weights)


def _followed_model(
    spec: WorkerSpec, host: Any, model_class: str, arenas: Arenas, devices: Mapping[str, str]
) -> MergedModel:
    from mergesearch.merging.export.folder import folder_of_base
    from mergesearch.merging.family.family import open_family
    from mergesearch.merging.models.loading import load_model
    from mergesearch.merging.resident.device_map import device_lookup, dispatch, place
    from mergesearch.merging.resident.sharded_model import ShardedModel

    with folder_of_base(open_family(spec.template), Path(spec.arenas)) as folder:
        model = load_model(folder, model_class)
    place(model, device_lookup("cpu", devices))
    return ShardedModel(host, dispatch(model, devices), arenas, threads=spec.threads)


def preparing_place(spec: WorkerSpec) -> Place:
    """Where decompositions of preparing run: main memory, or this machine's accelerator."""
    from mergesearch.merging.tensors.place import HOST, place_here

    return place_here() if spec.prepare == "card" else HOST
