"""Settings of a vLLM engine, and the version of vLLM that they are meant for."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mergesearch.merging import InputError

#: The minor version whose interface is used; the range of the extra in pyproject.toml says the
#: same. Others may keep weights elsewhere or reload them otherwise, which shows in scores alone.
SUPPORTED = (0, 33)
INSTALL = "pip install -c constraints-vllm.txt 'mergesearch[vllm]'"

#: Keys of a model's configuration under which vLLM rebuilds kernels when weights are reloaded, or
#: keeps states beside them: mixtures of experts, quantised weights, state-space layers.
_REBUILT = re.compile(
    r"(num|n)_.*experts$|^moe_|^quantization_config$|^(mamba|ssm|linear_attn|linear)_"
)
_REBUILT_LAYERS = re.compile(r"mamba|linear_attention|recurrent|conv")


@dataclass(frozen=True)
class VllmSettings:
    """How the engine is opened.

    Attributes:
        max_model_len: Tokens of a prompt and its prediction at most; None: as many as the model
            has room for.
        gpu_memory_utilization: Share of each card's memory for the engine's weights and cache.
        tensor_parallel_size: Cards over which the engine splits the model.
        dtype: Of its weights; None: that of the resident model.
        enforce_eager: Run without CUDA graphs; None: where the model needs it.
        seed: Of the engine's generators. Predictions are greedy and draw nothing.
    """

    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.4
    tensor_parallel_size: int = 1
    dtype: str | None = None
    enforce_eager: bool | None = None
    seed: int = 0


def check_version(where: str) -> None:
    """Check that vLLM is installed in the version that is meant.

    Raises:
        InputError: If it is not.
    """
    wanted = ".".join(str(part) for part in SUPPORTED)
    try:
        installed = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"{where}: expected vllm {wanted}, found none; {INSTALL}") from None
    if tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) != SUPPORTED:
        raise InputError(f"{where}: expected vllm {wanted}, found {installed}; {INSTALL}")


def engine_arguments(
    settings: VllmSettings, base: str, tokenizer: str, config: Any, dtype: str
) -> dict[str, Any]:
    """The arguments of ``vllm.LLM``.

    Args:
        settings: The study's.
        base: Folder of the base.
        tokenizer: Folder of the tokenizer.
        config: Configuration of the resident model.
        dtype: Of the resident model.
    """
    eager = settings.enforce_eager
    arguments: dict[str, Any] = {
        "model": base,
        "tokenizer": tokenizer,
        "dtype": settings.dtype or dtype,
        "seed": settings.seed,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": needs_eager(config.to_dict()) if eager is None else eager,
        # What is cached of earlier candidates belongs to other weights.
        "enable_prefix_caching": False,
        "trust_remote_code": False,
    }
    if settings.max_model_len is not None:
        arguments["max_model_len"] = settings.max_model_len
    if settings.tensor_parallel_size > 1:
        # Inside a Ray worker vLLM would otherwise ask Ray for cards of its own.
        arguments["distributed_executor_backend"] = "mp"
    return arguments


def needs_eager(config: Mapping[str, Any]) -> bool:
    """Whether a model must run without CUDA graphs because its weights are reloaded.

    A graph reads the addresses that it was captured with. vLLM 0.33 copies reloaded weights to the
    old addresses (``model_executor/model_loader/reload/layerwise.py``), so graphs of dense models
    stay right. Kernels of experts and of quantised weights are built anew with buffers of their
    own, which graphs do not see (vLLM issues 41670 and 48312).
    """
    return any(_rebuilt(key, value) for key, value in _flattened(config))


def _flattened(config: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values, also of the configurations of parts of a model."""
    for key, value in config.items():
        yield str(key), value
        if isinstance(value, Mapping):
            yield from _flattened(value)


def _rebuilt(key: str, value: Any) -> bool:
    if key in ("layer_types", "layers_block_type", "hybrid_override_pattern") and value:
        names = [value] if isinstance(value, str) else value
        return key == "hybrid_override_pattern" or any(
            _REBUILT_LAYERS.search(str(name)) for name in names
        )
    return bool(value) and _REBUILT.search(key) is not None
