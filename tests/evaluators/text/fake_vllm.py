"""A stand-in for vLLM 0.33: the part of its interface that is used, around a transformers model.

``LLM`` takes the arguments and has the methods of the real one (``vllm/entrypoints/llm.py``), the
worker's ``reload_weights`` those of ``vllm/v1/worker/gpu_model_runner.py``. It refuses weights that
are not all of the opened folder's, and writes down what it is asked for, in order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


class SamplingParams:
    """Settings of one request."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        max_tokens: int | None = 16,
        stop: str | list[str] | None = None,
        prompt_logprobs: int | None = None,
    ) -> None:
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.stop = [stop] if isinstance(stop, str) else stop or []
        self.prompt_logprobs = prompt_logprobs


class LLM:
    """An engine in this process.

    Attributes:
        opened: Engines that were opened, in order.
        corrupts_at: The reload after which weights lie at the wrong place; 0: never.
        fails: What opening an engine raises.
    """

    opened: list[LLM] = []  # noqa: RUF012
    corrupts_at = 0
    fails: Exception | None = None

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        # Arguments of the engine, which the real one takes by name alone.
        max_model_len: int | None = None,
        enable_prefix_caching: bool | None = None,
        distributed_executor_backend: str | None = None,
    ) -> None:
        if self.fails is not None:
            raise self.fails
        self.arguments = {key: value for key, value in locals().items() if key != "self"}
        self.calls: list[str] = []
        self.folders: list[str] = []
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer or model)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._shapes = _shapes(Path(model))
        self.opened.append(self)

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[None]:
        """Run a method of the only worker."""
        assert method == "reload_weights"
        self._reload(*args, **(kwargs or {}))
        return [None]

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[Any]:
        """Continue prompts of tokens greedily, one at a time."""
        assert sampling_params is not None
        assert sampling_params.temperature == 0
        reading = sampling_params.prompt_logprobs is not None
        self.calls.append("read" if reading else "generate")
        return [self._answer(each["prompt_token_ids"], sampling_params) for each in prompts]

    def _reload(
        self,
        weights_iterator: Iterable[tuple[str, torch.Tensor]] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        assert is_checkpoint_format
        assert (weights_iterator is None) != (weights_path is None)
        if weights_path is not None:
            self.folders.append(weights_path)
            weights_iterator = load_file(Path(weights_path) / "model.safetensors").items()
        assert weights_iterator is not None
        weights = dict(weights_iterator)
        assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == self._shapes
        self.calls.append("reload")
        if self.calls.count("reload") == self.corrupts_at:
            weights = {
                name: each.flip(0) if "proj" in name else each for name, each in weights.items()
            }
        self._model.load_state_dict(weights, strict=False)

    @torch.no_grad()
    def _answer(self, prompt: list[int], settings: SamplingParams) -> Any:
        tokens = list(prompt)
        text = ""
        end = self._tokenizer.eos_token_id
        while len(tokens) < len(prompt) + (settings.max_tokens or 0):
            tokens.append(int(self._model(torch.tensor([tokens])).logits[0, -1].argmax()))
            text = self._tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)
            if tokens[-1] == end or any(stop in text for stop in settings.stop):
                break
        answer = SimpleNamespace(text=text, token_ids=tokens[len(prompt) :])
        return SimpleNamespace(outputs=[answer], prompt_logprobs=self._read(prompt, settings))

    def _read(self, prompt: list[int], settings: SamplingParams) -> Any:
        """Nothing for the first token, then token -> log-probability of each."""
        if settings.prompt_logprobs is None:
            return None
        rows = torch.log_softmax(self._model(torch.tensor([prompt])).logits[0].float(), -1)
        return [
            None,
            *(
                {token: SimpleNamespace(logprob=float(row[token]))}
                for row, token in zip(rows[:-1], prompt[1:], strict=True)
            ),
        ]


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", "pt") as stored:
        return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118


def install(monkeypatch: pytest.MonkeyPatch, version: str = "0.33.0") -> type[LLM]:
    """Make ``import vllm`` find the stand-in; returns its engine."""
    import importlib.metadata

    real = importlib.metadata.version
    module = ModuleType("vllm")
    engine = type("LLM", (LLM,), {"opened": [], "corrupts_at": 0, "fails": None})
    module.LLM = engine  # type: ignore[attr-defined]
    module.SamplingParams = SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == "vllm" else real(name)
    )
    # Set where it is missing by what is tested, and put back here.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return engine
