"""The vLLM engine gets every candidate's weights, complete and under the names of the base."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mergesearch.evaluators.text.text_items import TextItems
from mergesearch.evaluators.text.transformers_writer import TransformersWriter
from mergesearch.evaluators.text.vllm_backend import VllmWriter
from mergesearch.evaluators.text.vllm_settings import SUPPORTED, VllmSettings, needs_eager
from mergesearch.evaluators.text.vllm_weights import StoredWeights
from mergesearch.merging import InputError, MergesearchError
from tests.evaluators.items import build, candidate_at, opened
from tests.evaluators.text import fake_vllm
from tests.evaluators.texts import bound_llama, text_folder

ROOT = Path(__file__).parents[3]
NEW_TOKENS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return bound_llama(tmp_path_factory.mktemp("models"))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_vllm.install(monkeypatch)


def section(folder: Path, **options: Any) -> dict[str, Any]:
    columns = {"data": "texts", "tokenizer": str(folder / "tokenizer"), "target": "target"}
    return (
        {"kind": "generation", "engine": "vllm", "max_new_tokens": NEW_TOKENS} | columns | options
    )


def items_of(folder: Path) -> TextItems:
    evaluator: Any = opened(section(folder, engine="transformers"), folder=folder)
    (items,) = [evaluator._items["search"]]
    return items


def writer(folder: Path, model: Any, **settings: Any) -> VllmWriter:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return VllmWriter(
        tokenizer,
        str(folder / "tokenizer"),
        model,
        NEW_TOKENS,
        (),
        VllmSettings(**settings),
        "here",
    )


def put(merged: Any, coefficient: float) -> Any:
    """The resident model at a point between base and expert."""
    from mergesearch.merging import Field

    merged.write(Field.constant(merged.merged.numel(), [coefficient]))
    return merged.model


@pytest.mark.parametrize("settings", [{}, {"tensor_parallel_size": 2}])
def test_each_candidate_is_reloaded_and_writes_what_transformers_writes(
    folder: Path, merged: Any, engine: Any, settings: dict[str, int]
) -> None:
    items = items_of(folder)
    ours = writer(folder, put(merged, 0.5), **settings)
    (started,) = engine.opened
    expected = []
    for coefficient in (0.5, 1.0, 0.0):
        model = put(merged, coefficient)
        own = TransformersWriter(ours_tokenizer(folder), NEW_TOKENS, (), "here")
        expected.append([(one.text, one.tokens) for one in own.write(model, items)])
        assert [(one.text, one.tokens) for one in ours.write(model, items)] == expected[-1]
    assert expected[0] != expected[1] != expected[2] != expected[0]
    # The first two candidates are also compared with the resident model.
    assert started.calls == [*["reload", "read", "generate"] * 2, "reload", "generate"]
    assert len(started.folders) == (3 if settings else 0)
    assert not any(Path(name).exists() for name in started.folders)


def ours_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def test_an_engine_in_a_process_of_its_own_reads_a_folder(
    folder: Path, merged: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    ours = writer(folder, merged.model)
    ours.write(merged.model, items_of(folder))
    assert len(engine.opened[0].folders) == 1


@pytest.mark.parametrize("reload", [1, 2])
def test_weights_at_the_wrong_place_are_noticed(
    folder: Path, merged: Any, engine: Any, reload: int
) -> None:
    engine.corrupts_at = reload
    items = items_of(folder)
    ours = writer(folder, put(merged, 0.5))
    for _ in range(1, reload):
        ours.write(merged.model, items)
    with pytest.raises(MergesearchError, match=f"for candidate {reload}: vLLM does not reload"):
        ours.write(merged.model, items)


def test_the_engine_is_opened_on_the_base_with_the_settings_of_the_study(
    folder: Path, merged: Any, engine: Any
) -> None:
    options = {
        "max_model_len": 48,
        "gpu_memory_utilization": 0.3,
        "tensor_parallel_size": 2,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "seed": 3,
    }
    evaluator = opened(section(folder, vllm=options), folder=folder)
    evaluator.evaluate(candidate_at([1], put(merged, 0.5)), "search")
    evaluator.evaluate(candidate_at([1], put(merged, 1.0)), "search")
    (started,) = engine.opened
    assert started.arguments == options | {
        "model": merged.model.config.name_or_path,
        "tokenizer": str(folder / "tokenizer"),
        "trust_remote_code": False,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "mp",
    }


def test_defaults_leave_the_dtype_and_length_to_the_model(
    folder: Path, merged: Any, engine: Any
) -> None:
    writer(folder, merged.model)
    arguments = engine.opened[0].arguments
    assert (arguments["dtype"], arguments["max_model_len"]) == ("float32", None)
    assert (arguments["enforce_eager"], arguments["gpu_memory_utilization"]) == (False, 0.4)


@pytest.mark.parametrize(
    ("config", "eager"),
    [
        ({"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2}, False),
        ({"layer_types": ["full_attention", "sliding_attention"]}, False),
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, True),
        ({"n_routed_experts": None, "moe_intermediate_size": 0}, False),
        ({"n_routed_experts": 64}, True),
        ({"text_config": {"num_experts": 128}}, True),
        ({"layer_types": ["linear_attention", "full_attention"]}, True),
        ({"hybrid_override_pattern": "M-M*"}, True),
        ({"mamba_num_heads": 8}, True),
        ({"quantization_config": {"quant_method": "fp8"}}, True),
    ],
)
def test_graphs_are_left_out_where_reloading_builds_kernels_anew(
    config: dict[str, Any], eager: bool
) -> None:
    assert needs_eager(config) is eager


class TestRefusals:
    @pytest.mark.parametrize("version", ["0.20.2", "0.32.0", "0.34.0", "1.0"])
    def test_other_versions(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, version: str
    ) -> None:
        fake_vllm.install(monkeypatch, version)
        with pytest.raises(
            InputError, match=rf"0\.engine: expected vllm 0\.33, found {re.escape(version)}; pip "
        ):
            build(section(folder), folder=folder).check()

    @pytest.mark.parametrize("version", ["0.33.0", "0.33.1.post1", "0.33.2+cu129"])
    def test_the_version_that_is_meant(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, version: str
    ) -> None:
        fake_vllm.install(monkeypatch, version)
        build(section(folder), folder=folder).check()

    @pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
    def test_no_vllm(self, folder: Path) -> None:
        with pytest.raises(
            InputError, match=r"expected vllm 0\.33, found none; pip install -c constraints-vllm"
        ):
            build(section(folder), folder=folder).check()

    def test_prompts_that_are_too_long(self, folder: Path, merged: Any, engine: Any) -> None:
        ours = writer(folder, merged.model, max_model_len=6)
        with pytest.raises(
            InputError, match=r"max_model_len: expected room for \d+ tokens of item"
        ):
            ours.write(merged.model, items_of(folder))
        assert engine.opened[0].calls == []

    def test_an_engine_that_does_not_start(self, folder: Path, merged: Any, engine: Any) -> None:
        engine.fails = ValueError("No available memory\nfor the cache blocks.")
        with pytest.raises(
            MergesearchError, match=r"ValueError: No available memory for the cache blocks\.; lower"
        ):
            writer(folder, merged.model)

    def test_a_base_that_was_rebuilt(self, folder: Path, engine: Any, tmp_path: Path) -> None:
        model = bound_llama(tmp_path).model
        shutil.rmtree(tmp_path / "base")
        with pytest.raises(
            MergesearchError, match="expected a base that is merged as it is stored"
        ):
            writer(folder, model)

    def test_a_model_that_lacks_tensors_of_the_base(self, merged: Any, tmp_path: Path) -> None:
        bound_llama(tmp_path, num_hidden_layers=3)
        with pytest.raises(MergesearchError, match=r"missing 9, such as 'model\.layers\.2\."):
            StoredWeights.of(merged.model, str(tmp_path / "base"))

    def test_settings_without_the_engine(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="vllm: expected engine: vllm beside it, received tra"):
            build(section(folder, engine="transformers", vllm={"seed": 1}), folder=folder)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_of_a_bound_model_have_the_names_of_its_checkpoint(
    tmp_path: Path, tied: bool
) -> None:
    import torch
    from safetensors.torch import load_file

    merged = bound_llama(tmp_path, tie_word_embeddings=tied)
    base, expert = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "expert"))
    weights = StoredWeights.of(merged.model, str(tmp_path / "base"))
    given = dict(weights.tensors(merged.model))
    assert set(given) == set(base)
    for name, tensor in base.items():
        torch.testing.assert_close(given[name], (tensor + expert[name]) / 2)
    merged.merged.fill_(7)
    assert all(bool((given[name] == 7).all()) for name in base)


def test_extra_and_constraints_name_the_version_that_is_meant() -> None:
    major, minor = SUPPORTED
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras["optional-dependencies"]["vllm"] == [
        f"vllm>={major}.{minor},<{major}.{minor + 1}"
    ]
    pinned = (ROOT / "constraints-vllm.txt").read_text()
    assert re.search(rf"^vllm=={major}\.{minor}\.", pinned, re.MULTILINE)


@pytest.mark.slow
def test_the_extra_resolves_with_its_constraints() -> None:
    """Without downloading wheels where the index serves their metadata; nothing is installed."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    index = subprocess.run(
        [*pip, "index", "versions", "vllm"], capture_output=True, text=True, timeout=300
    )
    if index.returncode:
        pytest.skip(f"the index has no vllm: {index.stderr.strip().splitlines()[-1]}")
    resolved = subprocess.run(
        [
            *(*pip, "install", "--dry-run", "--ignore-installed"),
            *("-c", "constraints-vllm.txt", ".[vllm,cluster]"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
        env=os.environ | {"PIP_NO_INPUT": "1"},
    )
    assert resolved.returncode == 0, resolved.stderr[-2000:]
    (line,) = [one for one in resolved.stdout.splitlines() if one.startswith("Would install")]
    chosen = set(line.split())
    pinned = (ROOT / "constraints-vllm.txt").read_text().split()
    wanted = {pin.replace("==", "-") for pin in pinned if re.match(r"(vllm|torch|numba)==", pin)}
    assert len(wanted) == 3
    assert wanted <= chosen
