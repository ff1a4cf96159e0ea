"""The way of a candidate's weights into a running vLLM engine.

Every way ends in the worker method ``reload_weights`` of vLLM 0.33, called by the public
``LLM.collective_rpc``. It gives each layer back the layout of a checkpoint, loads, processes it
anew and copies the result to where the kernels read. A second plain ``model.load_weights`` would
write the checkpoint's layout into buffers that hold the kernels' (vLLM issue 42821: scores of
mixtures of experts become those of noise, without an error).

- In one process, tensors go as they are, as an iterator.
- Workers of a tensor-parallel engine are processes of their own. The weights are written to a
  folder in shared memory, from which every worker reads its part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mergesearch.merging import MergesearchError
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.checkpoints.safetensors_files import TensorInfo
from mergesearch.merging.checkpoints.safetensors_writer import lay_out_files, write_tensor
from mergesearch.merging.models.parameter_views import ParameterView, parameter_views

if TYPE_CHECKING:
    import torch

#: A file system in main memory, where the system has one.
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class StoredWeights:
    """Where the tensors of the base's checkpoint lie in the resident model.

    Attributes:
        views: Stored name -> place in the model, in the order of the model's layers, so that vLLM
            holds one layer at a time.
    """

    views: Mapping[str, ParameterView]

    @classmethod
    def of(cls, model: Any, base: str) -> StoredWeights:
        """Find all tensors of a base in the model.

        Raises:
            MergesearchError: If the model does not hold some, or holds a copy.
        """
        stored = open_checkpoint(base)
        wanted = {name for name in stored.tensors if name not in stored.carried}
        views = {name: view for name, view in parameter_views(model).items() if name in wanted}
        missing = sorted(wanted - {*views} - {*stored.aliases})
        if missing:
            raise MergesearchError(
                f"engine: expected all {len(wanted)} tensors of {base} in the model, missing "
                f"{len(missing)}, such as {missing[0]!r}; use engine: transformers"
            )
        return cls(views)

    def tensors(self, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield stored name and tensor; tensors are views of the model's memory, not copies."""
        state = model.state_dict()
        for name, view in self.views.items():
            yield name, view.of(state[view.parameter])


def reload_in_process(engine: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Give weights to an engine whose worker is in this process."""
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})


def reload_from_folder(engine: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Give weights to an engine whose workers are other processes of this machine.

    Raises:
        MergesearchError: If the model does not fit into shared memory.
    """
    beside = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    try:
        with TemporaryDirectory(prefix="mergesearch-vllm-", dir=beside) as name:
            save_weights(dict(weights), Path(name))
            engine.collective_rpc("reload_weights", kwargs={"weights_path": name})
    except OSError as error:
        raise MergesearchError(
            f"engine: expected room for the merged weights in {beside or 'the temporary folder'}, "
            f"received: {error.strerror}; give the container more shared memory, or use one card"
        ) from error


def save_weights(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write tensors as one safetensors file, one at a time."""
    infos = {
        name: TensorInfo(
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            folder,
            0,
            tensor.numel() * tensor.element_size(),
        )
        for name, tensor in weights.items()
    }
    laid_out = lay_out_files(folder, infos, shard_bytes=sum(info.stop for info in infos.values()))
    for name, tensor in weights.items():
        write_tensor(laid_out[name], tensor)
