"""Adapters: against peft's own merge, against the definition, and everything that is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergesearch.merging import CheckpointError, Field, Layout, Recipe, Source
from mergesearch.merging.checkpoints.adapted import AdaptedCheckpoint
from mergesearch.merging.checkpoints.checkpoint import Checkpoint
from mergesearch.merging.checkpoints.locations import absolute_path, short_name
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.export.folder import export_model
from mergesearch.merging.family.aligned import Aligned
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.operators.parts.task_vectors import task_factors, task_vectors
from mergesearch.merging.tensors.source import FilteredSource

GOLDEN = Path(__file__).parents[2] / "golden" / "peft"
QUERY = "model.layers.0.self_attn.q_proj"

Pico = Callable[[str], Any]
Tensors = dict[str, torch.Tensor]


def opened(path: str | Path, name: str = "") -> AdaptedCheckpoint:
    checkpoint = open_checkpoint(str(path), name)
    assert isinstance(checkpoint, AdaptedCheckpoint)
    return checkpoint


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], **settings: Any) -> Path:
    """An adapter folder as peft writes it."""
    folder.mkdir(exist_ok=True)
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    full = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "base_model_name_or_path": "org/model",
        **settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(full))
    return folder


def pair(out: int, into: int, rank: int = 2, seed: int = 0, module: str = QUERY) -> Tensors:
    """Random A and B of a module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, into, generator=generator),
        f"{module}.lora_B.weight": torch.randn(out, rank, generator=generator),
    }


@pytest.fixture
def llama(pico: Pico) -> Path:
    return Path(pico("llama").base)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "math", pair(16, 16))


class TestAgainstPeft:
    @pytest.mark.parametrize("name", ["vit", "llama", "gpt2"])
    def test_reads_what_peft_merges(self, name: str) -> None:
        model = load_file(GOLDEN / name / "model.safetensors")
        merged = load_file(GOLDEN / name / "merged.safetensors")
        adapted = opened(f"{GOLDEN / name}+{GOLDEN / name / 'adapter'}")
        assert set(adapted.tensors) == set(model)
        for key, tensor in model.items():
            if key in merged:
                torch.testing.assert_close(adapted.read(key), merged[key], rtol=0, atol=1e-6)
            else:
                assert torch.equal(adapted.read(key), tensor)

    @pytest.mark.parametrize("name", ["vit", "llama", "gpt2"])
    def test_task_vectors_are_peft_s_changes(self, name: str) -> None:
        base = open_checkpoint(str(GOLDEN / name))
        merged = load_file(GOLDEN / name / "merged.safetensors")
        adapted = opened(f"{GOLDEN / name}+{GOLDEN / name / 'adapter'}")
        low_rank = 0
        for key in base.names:
            vector = task_vectors(base, [adapted], key)[0]
            factors = task_factors(base, [adapted], key)
            expected = (
                merged[key] - base.read(key) if key in merged else torch.zeros(base.shape(key))
            )
            torch.testing.assert_close(vector, expected, rtol=0, atol=1e-6)
            if factors is not None:
                assert torch.equal(vector, vector.new_zeros(vector.shape)) == (not factors.owner)
                torch.testing.assert_close(
                    (factors.left @ factors.right).view(vector.shape), vector
                )
                low_rank += bool(factors.owner)
        # All but the whole tensors: the classifier's two.
        assert low_rank == len(merged) - (2 if name == "vit" else 0)

    def test_a_stored_embedding_that_is_the_base_s_costs_nothing(self) -> None:
        # peft stores embeddings whole beside their low-rank change.
        key = "model.embed_tokens.weight"
        base = open_checkpoint(str(GOLDEN / "llama"))
        adapted = opened(f"{GOLDEN / 'llama'}+{GOLDEN / 'llama' / 'adapter'}")
        assert adapted.tensors[key].file != base.tensors[key].file
        factors = task_factors(base, [adapted], key)
        assert factors is not None
        assert factors.left.shape == (24, 2)
        assert factors.right.shape == (2, 8)


class TestChange:
    def test_task_vectors_do_not_pass_through_the_base(
        self, pico: Pico, tmp_path: Path, copy_of: Any
    ) -> None:
        # The base's numbers are 1e8 times as large as the change, which would vanish in base +
        # change.
        key = f"{QUERY}.weight"
        large = copy_of(
            pico("llama").base, lambda tensors: tensors | {key: torch.full((16, 16), 1e8)}
        )
        tensors = pair(16, 16)
        adapted = opened(f"{large}+{write_adapter(tmp_path / 'math', tensors)}")
        a, b = (tensors[f"{QUERY}.lora_{side}.weight"].double() for side in "AB")
        vector = task_vectors(open_checkpoint(str(large)), [adapted], key)[0]
        torch.testing.assert_close(vector.double(), 2 * b @ a, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        ("settings", "scale"), [({}, 2.0), ({"use_rslora": True}, 4 / math.sqrt(2))]
    )
    def test_scale(
        self, llama: Path, tmp_path: Path, settings: dict[str, Any], scale: float
    ) -> None:
        tensors = pair(16, 16)
        pairs = opened(f"{llama}+{write_adapter(tmp_path / 'a', tensors, **settings)}").factors(
            f"{QUERY}.weight"
        )
        assert pairs is not None
        expected = (tensors[f"{QUERY}.lora_B.weight"].double() * scale).float()
        assert torch.equal(pairs[0], expected)
        assert torch.equal(pairs[1], tensors[f"{QUERY}.lora_A.weight"])

    @pytest.mark.parametrize(
        ("patterns", "alpha"),
        [
            ({"q_proj": 7}, 7),
            ({r"layers\.[01]\.self_attn\.q_proj": 7}, 7),
            ({"self_attn": 7}, 4),  # must match up to the end
            ({"roj": 7}, 4),  # and from a dot on
            ({"v_proj": 6, "q_proj": 7, "model.*": 8}, 7),  # the first that matches
        ],
    )
    def test_patterns_match_as_in_peft(
        self, llama: Path, tmp_path: Path, patterns: Any, alpha: int
    ) -> None:
        folder = write_adapter(tmp_path / "a", pair(16, 16), alpha_pattern=patterns)
        change, _ = opened(f"{llama}+{folder}").changes[f"{QUERY}.weight"]
        assert change.scale == alpha / 2

    def test_is_not_rounded_to_a_coarse_base(self, pico: Pico, adapter: Path) -> None:
        base = open_checkpoint(str(pico("llama_bf16").base))
        adapted = opened(f"{base.path}+{adapter}")
        key = f"{QUERY}.weight"
        left, right = adapted.factors(key) or pytest.fail("no factors")
        assert adapted.read(key).dtype == torch.float32
        torch.testing.assert_close(adapted.read(key), base.read(key).float() + left @ right)
        assert adapted.merged[key] == base.merged[key]

    def test_of_another_base_is_a_difference(self, pico: Pico, adapter: Path) -> None:
        family = pico("llama")
        key = f"{QUERY}.weight"
        study_base, model = (
            open_checkpoint(str(path)) for path in (family.base, family.experts[0])
        )
        adapted = opened(f"{model.path}+{adapter}")
        left, right = adapted.factors(key) or pytest.fail("no factors")
        vector = task_vectors(study_base, [adapted], key)[0]
        torch.testing.assert_close(vector, model.read(key) + left @ right - study_base.read(key))
        assert task_factors(study_base, [adapted], key) is None

    def test_of_a_copy_of_the_base_stays_low_rank(
        self, llama: Path, adapter: Path, copy_of: Any
    ) -> None:
        adapted = opened(f"{copy_of(llama)}+{adapter}")
        factors = task_factors(open_checkpoint(str(llama)), [adapted], f"{QUERY}.weight")
        assert factors is not None
        assert factors.owner == (0, 0)

    def test_whole_tensors_replace_the_model_s(self, llama: Path, tmp_path: Path) -> None:
        norm = torch.arange(16.0)
        folder = write_adapter(
            tmp_path / "a", {"model.norm.modules_to_save.weight": norm}, modules_to_save=["norm"]
        )
        adapted = opened(f"{llama}+{folder}")
        base = open_checkpoint(str(llama))
        assert torch.equal(adapted.read("model.norm.weight"), norm)
        assert task_factors(base, [adapted], "model.norm.weight") is None
        assert torch.equal(
            task_vectors(base, [adapted], "model.norm.weight")[0],
            norm - base.read("model.norm.weight"),
        )


class TestLoading:
    @pytest.mark.parametrize(
        ("name", "auto"),
        [("vit", "AutoModelForImageClassification"), ("gpt2", "AutoModelForCausalLM")],
    )
    def test_the_model_has_the_adapter(self, tmp_path: Path, name: str, auto: str) -> None:
        adapted = opened(f"{GOLDEN / name}+{GOLDEN / name / 'adapter'}")
        load_model(adapted.path, auto).save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        merged = load_file(GOLDEN / name / "merged.safetensors")
        assert set(adapted.adapted) == set(merged)
        assert all(torch.equal(tensor, adapted.read(key)) for key, tensor in saved.items())

    def test_an_adapted_model_can_be_the_base(
        self, pico: Pico, adapter: Path, tmp_path: Path
    ) -> None:
        family = pico("llama_bf16")
        key = f"{QUERY}.weight"
        base = Source("base", f"{family.base}+{adapter}")
        recipe = Recipe(
            base, (Source("one", str(family.experts[0])),), "average", Field.constant(1, [0.0])
        )
        layout = Layout.build(opened(base.path).merged)
        export_model(replace(recipe, field=Field.constant(layout.size, [0.0])), tmp_path / "out")
        exported = load_file(tmp_path / "out" / "model.safetensors")
        for name, tensor in exported.items():
            assert torch.equal(tensor, opened(base.path).read(name).bfloat16())
        assert not torch.equal(exported[key], open_checkpoint(str(family.base)).read(key))

    def test_sources_that_pass_tensors_on_keep_them_low_rank(
        self, llama: Path, adapter: Path
    ) -> None:
        base = open_checkpoint(str(llama))
        adapted = opened(f"{llama}+{adapter}")
        views = [FilteredSource(source, {"model.norm.weight"}) for source in (base, adapted)]
        factors = task_factors(views[0], views[1:], f"{QUERY}.weight")
        assert factors is not None
        assert factors.owner == (0, 0)
        made = replace_read(adapted, f"{QUERY}.weight", torch.zeros(16, 16))
        assert task_factors(base, [made], f"{QUERY}.weight") is None
        assert torch.equal(
            task_vectors(base, [made], f"{QUERY}.weight")[0], -base.read(f"{QUERY}.weight")
        )


def replace_read(origin: Checkpoint, name: str, tensor: torch.Tensor) -> Aligned:
    """A view of a checkpoint that makes one tensor itself."""
    fields = origin.name, origin.path, origin.folder, origin.tensors, origin.config, origin.memo
    return Aligned(*fields, origin=origin, made={name: lambda: tensor})


class TestPaths:
    def test_goes_by_the_name_of_the_adapter(self, llama: Path, adapter: Path) -> None:
        path = f"{llama}+{adapter}"
        adapted = opened(path)
        assert (adapted.name, adapted.path, adapted.folder) == ("math", path, llama)
        assert adapted.config["model_type"] == "llama"
        assert short_name("org/base@v1+org/lora@v2") == "lora"
        assert opened(path, "sums").name == "sums"

    def test_an_adapter_alone_names_its_local_model(self, llama: Path, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "a", pair(16, 16), base_model_name_or_path=str(llama))
        alone = opened(folder)
        both = opened(f"{llama}+{folder}")
        assert (alone.path, alone.fingerprint()) == (f"{llama}+{folder}", both.fingerprint())

    @pytest.mark.parametrize("named", ["org/model", "", None])
    def test_an_adapter_of_an_unknown_model_asks_for_it(
        self, tmp_path: Path, named: str | None
    ) -> None:
        folder = write_adapter(tmp_path / "a", pair(16, 16), base_model_name_or_path=named)
        with pytest.raises(CheckpointError, match=r"write BASE\+ADAPTER"):
            open_checkpoint(str(folder))

    def test_a_folder_with_a_plus_in_its_name_wins(
        self, llama: Path, adapter: Path, tmp_path: Path
    ) -> None:
        model = tmp_path / "a+b"
        lora = tmp_path / "c+d"
        shutil.copytree(llama, model)
        shutil.copytree(adapter, lora)
        assert type(open_checkpoint(str(model))) is Checkpoint
        assert opened(f"{model}+{lora}").fingerprint() == opened(f"{llama}+{adapter}").fingerprint()

    def test_relative_parts_start_where_they_are_written(self, tmp_path: Path) -> None:
        for name in ("model", "lora", "a+b"):
            (tmp_path / name).mkdir()
        expected = {
            "model+lora": f"{tmp_path / 'model'}+{tmp_path / 'lora'}",
            "model+a+b": f"{tmp_path / 'model'}+{tmp_path / 'a+b'}",
            "a+b": f"{tmp_path / 'a+b'}",
            "org/model@v1+lora": f"org/model@v1+{tmp_path / 'lora'}",
            "model+../missing": f"{tmp_path / 'model'}+../missing",
            "org/model": "org/model",
            "": "",
        }
        assert {path: absolute_path(path, tmp_path) for path in expected} == expected

    def test_models_and_adapters_of_the_hub(self, hub: Path, tmp_path: Path) -> None:
        module = "vit.encoder.layer.0.attention.attention.query"
        folder = write_adapter(tmp_path / "a", pair(16, 16, module=module))
        assert set(opened(f"org/tiny@v1+{folder}").changes) == {f"{module}.weight"}

    @pytest.mark.parametrize("path", ["{model}+{model}", "{model}+/no/such", "/no/such+{adapter}"])
    def test_parts_that_are_not_there(self, llama: Path, adapter: Path, path: str) -> None:
        with pytest.raises(CheckpointError, match=r"expected a (PEFT adapter|folder)"):
            open_checkpoint(path.format(model=llama, adapter=adapter))

    def test_two_adapters(self, llama: Path, adapter: Path) -> None:
        with pytest.raises(CheckpointError, match="received two adapters; merge the first"):
            open_checkpoint(f"{llama}+{adapter}+{adapter}")


class TestNames:
    def test_names_in_memory_find_their_stored_names(self, pico: Pico, tmp_path: Path) -> None:
        tensors = pair(16, 16, module="vit.layers.1.attention.q_proj") | {
            "classifier.bias": torch.ones(3)
        }
        adapted = opened(f"{pico('vit').base}+{write_adapter(tmp_path / 'a', tensors)}")
        assert set(adapted.changes) == {"vit.encoder.layer.1.attention.attention.query.weight"}
        assert torch.equal(adapted.read("classifier.bias"), torch.ones(3))

    def test_a_tensor_without_a_place_is_listed(self, llama: Path, tmp_path: Path) -> None:
        folder = write_adapter(tmp_path / "a", pair(16, 16) | pair(3, 16, module="score"))
        with pytest.raises(CheckpointError, match=r"the model does not store: 'score\.weight'"):
            open_checkpoint(f"{llama}+{folder}")

    def test_parameters_that_are_fused_in_memory(self, tmp_path: Path) -> None:
        import transformers

        settings = {
            "vocab_size": 8,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
        }
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
        with torch.random.fork_rng(devices=[]):
            model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**settings, **heads))
        model.save_pretrained(tmp_path / "m")
        fused = {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 16, 8)}
        with pytest.raises(
            CheckpointError,
            match=r"stored in parts: 'model\.layers\.0\.mlp\.experts\.gate_up_proj'",
        ):
            open_checkpoint(f"{tmp_path / 'm'}+{write_adapter(tmp_path / 'a', fused)}")
        # Trained with an older transformers, the adapter has the stored names.
        stored = write_adapter(
            tmp_path / "b", pair(8, 8, module="model.layers.0.block_sparse_moe.experts.1.w2")
        )
        assert opened(f"{tmp_path / 'm'}+{stored}").changes

    @pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
    def test_one_of_two_tied_tensors(self, pico: Pico, tmp_path: Path, module: str) -> None:
        whole = write_adapter(
            tmp_path / "a", {f"{module}.weight": torch.zeros(96, 16)}, modules_to_save=["x"]
        )
        with pytest.raises(
            CheckpointError,
            match=f"(ties to another tensor|does not store).*{module}|{module}.*ties",
        ):
            open_checkpoint(f"{pico('llama_tied').base}+{whole}")
        assert opened(f"{pico('llama').base}+{whole}").names


class TestFingerprint:
    def test_covers_model_adapter_and_scale(self, pico: Pico, tmp_path: Path) -> None:
        family = pico("llama")
        variants = [
            (family.base, pair(16, 16), {}),
            (family.experts[0], pair(16, 16), {}),
            (family.base, pair(16, 16, seed=1), {}),
            (family.base, pair(16, 16), {"lora_alpha": 5}),
            (family.base, pair(16, 16) | {"model.norm.weight": torch.zeros(16)}, {}),
            (family.base, pair(16, 16, module=QUERY.replace("0", "1")), {}),
        ]
        paths = [
            f"{model}+{write_adapter(tmp_path / str(index), tensors, **settings)}"
            for index, (model, tensors, settings) in enumerate(variants)
        ]
        assert len({opened(path).fingerprint() for path in paths}) == len(variants)
        assert opened(paths[0]).identity == opened(paths[0]).fingerprint()
        assert opened(paths[0]).fingerprint() != open_checkpoint(str(family.base)).fingerprint()

    def test_leaves_out_what_changes_no_weight(
        self, llama: Path, adapter: Path, tmp_path: Path
    ) -> None:
        other = write_adapter(
            tmp_path / "b", pair(16, 16), lora_dropout=0.1, base_model_name_or_path="elsewhere"
        )
        assert (
            opened(f"{llama}+{other}").fingerprint() == opened(f"{llama}+{adapter}").fingerprint()
        )

    def test_notices_that_the_model_changed(self, copy_of: Any, llama: Path, adapter: Path) -> None:
        model = copy_of(llama)
        before = opened(f"{model}+{adapter}").fingerprint()
        tensors = load_file(model / "model.safetensors")
        save_file(
            {n: t + 1 for n, t in tensors.items()},
            model / "model.safetensors",
            metadata={"format": "pt"},
        )
        assert opened(f"{model}+{adapter}").fingerprint() != before

    def test_names_all_files_that_matter(self, llama: Path, adapter: Path) -> None:
        files = {file.name for file in opened(f"{llama}+{adapter}").files}
        assert files == {"model.safetensors", "adapter_model.safetensors", "adapter_config.json"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            *(
                ({"peft_type": kind}, f"received '{kind}'; merge it")
                for kind in ("LOHA", "IA3", "PREFIX_TUNING")
            ),
            ({"use_dora": True}, "received use_dora: True; merge it"),
            ({"lora_bias": True}, "received lora_bias"),
            ({"layer_replication": [[0, 1], [0, 1]]}, "received layer_replication"),
            ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "received target_parameters"),
            ({"trainable_token_indices": [1]}, "received trainable_token_indices"),
            ({"use_new_trick": 3}, "received use_new_trick: 3"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa', which changes the base"),
            ({"r": 4}, r"expected rank 4 .* received lora_A \[2, 16\]"),
            ({"rank_pattern": {"q_proj": 0}}, "expected rank 0"),
            ({"lora_alpha": None}, "lora_alpha: expected a number, received None"),
            ({"lora_alpha": 8e99}, r"lora_alpha: expected at most 1,000,000, received 8e\+99"),
            ({"alpha_pattern": {"q_proj": -2e6}}, r"expected at most 1,000,000, received -2e\+06"),
            ({"r": "eight"}, "r: expected a number, received 'eight'"),
        ],
    )
    def test_settings(
        self, llama: Path, tmp_path: Path, settings: dict[str, Any], reason: str
    ) -> None:
        folder = write_adapter(tmp_path / "a", pair(16, 16), **settings)
        with pytest.raises(CheckpointError, match=reason) as caught:
            open_checkpoint(f"{llama}+{folder}")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("tensors", "reason"),
        [
            (
                pair(16, 16) | {f"{QUERY}.lora_magnitude_vector": torch.zeros(16)},
                "received '.*lora_magnitude_vector'",
            ),
            (
                pair(16, 16) | {f"{QUERY}.lora_B.bias": torch.zeros(16)},
                r"received '.*lora_B\.bias'",
            ),
            (
                {f"{QUERY}.lora_A.weight": torch.zeros(2, 16)},
                r"lora_A and lora_B of .* received \['lora_A'\]",
            ),
            (pair(16, 32), r"from \[32\] to 16 features for \[16, 16\]"),
        ],
    )
    def test_tensors(self, llama: Path, tmp_path: Path, tensors: Tensors, reason: str) -> None:
        with pytest.raises(CheckpointError, match=reason):
            open_checkpoint(f"{llama}+{write_adapter(tmp_path / 'a', tensors)}")

    def test_pickles(self, llama: Path, adapter: Path) -> None:
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        with pytest.raises(
            CheckpointError, match=r"received adapter_model\.bin; pickle is never read"
        ):
            open_checkpoint(f"{llama}+{adapter}")
