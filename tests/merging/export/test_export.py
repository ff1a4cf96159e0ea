"""Exports load in transformers, hold the tensors of the merge, and never appear half written."""

from __future__ import annotations

import errno
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mergesearch.merging.export.folder
from mergesearch.merging import (
    CheckpointError,
    Field,
    InputError,
    NonFiniteError,
    Recipe,
    RecipeError,
    Source,
)
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.checkpoints.safetensors_files import TensorInfo
from mergesearch.merging.export.folder import export_model as export_and_measure
from mergesearch.merging.export.model_card import coefficient_summary
from mergesearch.merging.family.preflight import layout_of
from mergesearch.merging.recipe_file import load_recipe

# Experts count their steps and batches; that merges say so is tested with the policies for special
# tensors.
pytestmark = pytest.mark.filterwarnings("ignore:integer tensors differ:UserWarning")

COEFFICIENTS = (0.25, 0.5)


def export_model(*arguments: Any, **options: Any) -> Path:
    return export_and_measure(*arguments, **options).folder


def _recipe(
    base: Path, experts: Any, coefficients: Any = COEFFICIENTS, operator: str = "task_arithmetic"
) -> Recipe:
    layout = layout_of(open_checkpoint(str(base)))
    return Recipe(
        base=Source("base", str(base)),
        experts=tuple(Source(folder.name, str(folder)) for folder in experts),
        operator=operator,
        field=Field.constant(layout.size, coefficients),
        layout=layout.digest,
        special=(("batch_norm", "merge"),) if "resnet" in str(base) else (),
    )


def _expected(
    base: dict[str, torch.Tensor], experts: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Task arithmetic in double precision, rounded once."""
    merged = {}
    for name, origin in base.items():
        total = origin.double()
        for coefficient, expert in zip(COEFFICIENTS, experts, strict=True):
            total = total + coefficient * (expert[name].double() - origin.double())
        merged[name] = total.to(origin.dtype) if origin.is_floating_point() else origin
    return merged


@pytest.mark.parametrize(
    "name", ["vit", "bert", "llama", "llama_tied", "llama_bf16", "gpt2", "resnet"]
)
@pytest.mark.parametrize("shard_bytes", [10_000_000, 4_000])
def test_transformers_loads_the_merge(name, shard_bytes, pico, read_tensors, tmp_path):
    family = pico(name)
    out = export_model(
        _recipe(family.base, family.experts), tmp_path / "merged", shard_bytes=shard_bytes
    )

    stored = read_tensors(out)
    base = read_tensors(family.base)
    expected = _expected(base, [read_tensors(folder) for folder in family.experts])
    assert set(stored) == set(base)
    for key, tensor in expected.items():
        assert stored[key].dtype == base[key].dtype
        tolerance = (
            {"rtol": 1e-2, "atol": 1e-3}
            if tensor.dtype == torch.bfloat16
            else {"rtol": 1e-6, "atol": 1e-6}
        )
        torch.testing.assert_close(stored[key], tensor, **tolerance)

    model, account = family.load(out)
    assert not account["missing_keys"]
    assert not account["unexpected_keys"]
    assert not account["mismatched_keys"]
    # What transformers has in memory, saved again, is what was exported.
    model.save_pretrained(tmp_path / "again")
    again = read_tensors(tmp_path / "again")
    assert set(again) == set(stored)
    assert all(torch.equal(again[key], stored[key]) for key in stored)


def test_shards_are_bounded_and_indexed(pico, tmp_path):
    family = pico("llama")
    out = export_model(_recipe(family.base, family.experts), tmp_path / "merged", shard_bytes=7_000)
    one = export_model(_recipe(family.base, family.experts), tmp_path / "one")
    assert not (one / "model.safetensors.index.json").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert {path.name for path in files} == set(index["weight_map"].values())
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert max(sizes) <= 7_000
    assert index["metadata"]["total_size"] == sum(sizes)
    assert open_checkpoint(str(out)).fingerprint() == open_checkpoint(str(one)).fingerprint()
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tensor_larger_than_a_shard_gets_its_own(pico, read_tensors, tmp_path):
    family = pico("vit")
    out = export_model(_recipe(family.base, family.experts), tmp_path / "merged", shard_bytes=1)
    assert all(len(load_file(file)) == 1 for file in out.glob("*.safetensors"))
    assert family.load(out)[1]["missing_keys"] == set()


def test_zero_gives_the_base_and_average_gives_an_expert_to_the_bit(pico, tmp_path):
    family = pico("llama_bf16")
    base = export_model(_recipe(family.base, family.experts, [0.0, 0.0]), tmp_path / "base")
    expert = export_model(
        _recipe(family.base, family.experts, [0.0, 1.0], "average"), tmp_path / "expert"
    )
    assert (
        open_checkpoint(str(base)).fingerprint() == open_checkpoint(str(family.base)).fingerprint()
    )
    assert (
        open_checkpoint(str(expert)).fingerprint()
        == open_checkpoint(str(family.experts[1])).fingerprint()
    )


def test_the_same_recipe_gives_the_same_bytes(pico, tmp_path):
    family = pico("vit")
    recipe = _recipe(family.base, family.experts)
    one, two = (export_model(recipe, tmp_path / name) for name in ("one", "two"))
    assert all((two / file.name).read_bytes() == file.read_bytes() for file in one.iterdir())


def test_its_own_recipe_rebuilds_it(pico, tmp_path):
    family = pico("vit")
    recipe = _recipe(family.base, family.experts)
    out = export_model(recipe, tmp_path / "merged")
    saved = load_recipe(out / "recipe.yaml")
    assert saved == load_recipe(out / "recipe.json")
    assert saved.field == recipe.field
    assert saved.layout == recipe.layout
    assert saved.base.fingerprint == open_checkpoint(str(family.base)).fingerprint()
    assert all(expert.fingerprint for expert in saved.experts)
    again = export_model(saved, tmp_path / "again")
    assert open_checkpoint(str(again)).fingerprint() == open_checkpoint(str(out)).fingerprint()


def test_a_shorthand_recipe_with_patterns_touches_only_what_it_names(pico, read_tensors, tmp_path):
    family = pico("vit")
    path = tmp_path / "merge.yaml"
    coefficients = {r".*\.layer\.1\..*": [1.0, 0.0], "default": 0}
    data = {
        "base": str(family.base),
        "experts": [str(f) for f in family.experts],
        "operator": "average",
    }
    path.write_text(yaml.safe_dump(data | {"coefficients": coefficients}))
    merged = read_tensors(export_model(load_recipe(path), tmp_path / "merged"))
    base = read_tensors(family.base)
    expert = read_tensors(family.experts[0])
    assert all(
        torch.equal(merged[name], (expert if ".layer.1." in name else base)[name]) for name in base
    )


def test_tied_copies_are_written_as_the_base_stores_them(pico, copy_of, read_tensors, tmp_path):
    family = pico("bert")
    head = "cls.predictions.decoder.weight"
    embedding = "bert.embeddings.word_embeddings.weight"
    base = copy_of(family.base, lambda t: t | {head: t[embedding].clone()})
    out = export_model(_recipe(base, family.experts), tmp_path / "merged")
    tensors = read_tensors(out)
    assert torch.equal(tensors[head], tensors[embedding])
    assert not torch.equal(tensors[head], read_tensors(base)[head])
    model, account = family.load(out)
    assert not account["unexpected_keys"]
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_mixed_dtypes_stay_as_they_are(tmp_path):
    tensors = {
        "a": torch.randn(3, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "b": torch.linspace(0, 1, 5, dtype=torch.float64),
        "c": torch.tensor(0.5),
        "d": torch.arange(3, dtype=torch.uint8),
        "e": torch.empty(0, 2),
        "f": torch.tensor([True, False, True]),
        "g": torch.arange(3),
    }
    for name, shift in (("base", 0), ("one", 1), ("two", 2)):
        moved = {key: t + shift if t.is_floating_point() else t for key, t in tensors.items()}
        save_file(moved, tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "one", "two")]
    out = export_model(_recipe(files[0], files[1:]), tmp_path / "merged")
    written = load_file(out / "model.safetensors")
    expected = _expected(load_file(files[0]), [load_file(file) for file in files[1:]])
    for name, tensor in expected.items():
        torch.testing.assert_close(written[name], tensor)
    infos = open_checkpoint(str(out)).tensors
    assert all(
        info.start % (8 if name in "bg" else 4 if name == "c" else 1) == 0
        for name, info in infos.items()
    )
    assert not (out / "config.json").exists()
    assert 'load_file("model.safetensors")' in (out / "README.md").read_text()


# --- files beside the weights
# --------------------------------------------------------------------------------------


def test_tokenizer_configuration_and_licence_come_along_but_no_code(pico, tmp_path):
    import tokenizers
    import transformers

    family = pico("llama")
    base = tmp_path / "base"
    shutil.copytree(family.base, base)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "merge": 1, "search": 2}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(base)
    for name in (
        "LICENSE",
        "modeling_custom.py",
        "training_args.bin",
        "optimizer.pt",
        "preprocessor_config.json",
    ):
        (base / name).write_text("{}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")

    out = export_model(_recipe(base, family.experts), tmp_path / "merged")
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {
        *(
            "model.safetensors",
            "config.json",
            "generation_config.json",
            "recipe.yaml",
            "recipe.json",
            "README.md",
            "mergekit_config.yml",
        ),
        *(
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "additional_chat_templates/tools.jinja",
        ),
        *("preprocessor_config.json", "LICENSE"),
    }
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert loaded("search merge")["input_ids"] == [2, 1]
    assert loaded.get_chat_template() == "{{ messages }}"


def _card(out: Path) -> tuple[dict[str, Any], str]:
    _, head, text = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_card_says_what_was_merged(pico, tmp_path):
    family = pico("vit")
    facts = {"accuracy | mirrored": "0.912 ± 0.004\nof 500"}
    head, text = _card(
        export_model(_recipe(family.base, family.experts), tmp_path / "merged", facts=facts)
    )
    assert "base_model" not in head  # names of folders are no models of the hub
    assert {"merge", "mergesearch"} <= set(head["tags"])
    assert head["library_name"] == "transformers"
    assert "license" not in head
    assert "| one | 0.25 | 0.25 | 0.25 |" in text
    assert "| accuracy \\| mirrored | 0.912 ± 0.004 of 500 |" in text
    assert "| base | not declared |" in text
    assert str(family.experts[1]) in text
    code = re.search(r"```python\n(.*)```", text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(code[1].replace("path/to/this/folder", str(tmp_path / "merged")), scope)
    assert type(scope["model"]).__name__ == family.model_class


def test_hub_parents_are_listed_by_their_hub_name(hub, pico, tmp_path, monkeypatch):
    family = pico("vit")
    layout = layout_of(open_checkpoint("org/tiny@v1"))
    recipe = _recipe(family.base, family.experts)
    recipe = replace(recipe, base=Source("origin", "org/tiny@v1"))
    out = export_model(recipe, tmp_path / "merged")
    assert _card(out)[0]["base_model"] == ["org/tiny"]
    assert _card(out)[0]["base_model_relation"] == "merge"
    assert load_recipe(out / "recipe.yaml").base.path == "org/tiny@v1"
    assert recipe.layout == layout.digest

    monkeypatch.chdir(family.base.parent)
    local = replace(recipe, base=Source("origin", "base"))
    out = export_model(local, tmp_path / "local")
    assert "base_model" not in _card(out)[0]
    assert load_recipe(out / "recipe.yaml").base.path == str(family.base)


@pytest.mark.parametrize(
    ("licences", "common"),
    [
        (["mit", "mit", "mit"], "mit"),
        (["mit", "mit", "apache-2.0"], None),
        (["mit", None, "mit"], None),
    ],
)
def test_card_states_a_licence_only_when_all_parents_agree(
    licences, common, pico, copy_of, tmp_path
):
    family = pico("vit")
    folders = [copy_of(folder) for folder in (family.base, *family.experts)]
    for folder, licence in zip(folders, licences, strict=True):
        front = (
            f"---\nlicense: {licence}\n---\n# x\n"
            if licence
            else "# no front matter\n---\nlicense: gpl\n---\n"
        )
        (folder / "README.md").write_text(front)
    head, text = _card(export_model(_recipe(folders[0], folders[1:]), tmp_path / "merged"))
    assert head.get("license") == common
    assert ("Licences of the parents" in text) == (common is None)
    if common is None:
        assert all(f"| {licence or 'not declared'} |" in text for licence in licences)


def test_coefficient_summary_counts_parameters_and_no_padding(pico):
    layout = layout_of(open_checkpoint(str(pico("vit").base)))
    rng = np.random.default_rng(0)
    boundaries = np.array([0, 100, 1000, layout.size - 70, layout.size])
    field = Field(boundaries, rng.normal(size=(2, 4)))
    owned = np.zeros(layout.size, bool)
    for spec in layout.tensors:
        owned[spec.start : spec.stop] = True
    values = np.repeat(field.values, np.diff(boundaries), axis=1)[:, owned]
    expected = np.stack((values.mean(axis=1), values.min(axis=1), values.max(axis=1)), axis=1)
    np.testing.assert_allclose(coefficient_summary(field, layout), expected)


# --- refusals and failures
# -----------------------------------------------------------------------------------------


def _left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_occupied_place_is_refused_unless_told_otherwise(pico, tmp_path):
    family = pico("vit")
    recipe = _recipe(family.base, family.experts)
    out = tmp_path / "merged"
    out.mkdir()
    export_model(recipe, out)  # an empty folder is fine
    (out / "notes.txt").write_text("mine")
    before = open_checkpoint(str(out)).fingerprint()
    with pytest.raises(InputError, match="merged: expected no folder or an empty one"):
        export_model(recipe.with_field(Field.constant(recipe.field.size, [0, 0])), out)
    assert open_checkpoint(str(out)).fingerprint() == before
    export_model(recipe.with_field(Field.constant(recipe.field.size, [0, 0])), out, overwrite=True)
    assert (
        open_checkpoint(str(out)).fingerprint() == open_checkpoint(str(family.base)).fingerprint()
    )
    assert not (out / "notes.txt").exists()
    assert _left_over(tmp_path) == ["merged"]


def test_a_source_is_never_overwritten(pico, copy_of, tmp_path):
    family = pico("vit")
    base = copy_of(family.base)
    for out in (base, tmp_path):
        with pytest.raises(
            InputError, match="expected a folder without sources, received the one of 'base'"
        ):
            export_model(_recipe(base, family.experts), out, overwrite=True)
    assert open_checkpoint(str(base)).fingerprint()


def test_a_file_in_the_way(pico, tmp_path):
    family = pico("vit")
    (tmp_path / "merged").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="received a file"):
            export_model(
                _recipe(family.base, family.experts), tmp_path / "merged", overwrite=overwrite
            )
    with pytest.raises(InputError, match="expected a place to write"):
        export_model(_recipe(family.base, family.experts), tmp_path / "merged" / "below")


def test_changed_sources_are_named(pico, copy_of, tmp_path):
    family = pico("vit")
    expert = copy_of(family.experts[0])
    recipe = load_recipe(
        export_model(_recipe(family.base, [expert, family.experts[1]]), tmp_path / "one")
        / "recipe.json"
    )
    tensors = load_file(expert / "model.safetensors")
    save_file(
        tensors | {"classifier.bias": tensors["classifier.bias"] + 1}, expert / "model.safetensors"
    )
    with pytest.raises(
        RecipeError, match=rf"source '{expert.name}' .* they changed since the recipe was made"
    ):
        export_model(recipe, tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_recipes_that_do_not_fit(pico, tmp_path):
    family = pico("vit")
    other = pico("llama")
    good = _recipe(family.base, family.experts)
    bad = {
        "expected 2 rows of coefficients": good.with_field(Field.constant(good.field.size, [1.0])),
        "it was made for another base": good.with_field(
            Field.constant(good.field.size + 64, [1.0, 1.0])
        ),
        "operator: expected an operator": _recipe(family.base, family.experts, operator="magic"),
    }
    for message, recipe in bad.items():
        with pytest.raises(RecipeError, match=message):
            export_model(recipe, tmp_path / "merged")
    with pytest.raises(CheckpointError, match="expected model_type 'vit'"):
        export_model(_recipe(family.base, other.experts), tmp_path / "merged")
    assert _left_over(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 7, 15])
def test_one_value_that_is_not_finite_stops_the_export(value, position, pico, copy_of, tmp_path):
    family = pico("vit")

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["vit.layernorm.weight"][position] = value
        return tensors

    broken = copy_of(family.experts[0], spoil)
    with pytest.raises(
        NonFiniteError, match=r"merged tensor 'vit\.layernorm\.weight' holds NaN or infinite"
    ):
        export_model(_recipe(family.base, [broken, family.experts[1]]), tmp_path / "merged")
    assert _left_over(tmp_path) == [broken.name]


def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(pico, tmp_path, monkeypatch):
    family = pico("vit")
    recipe = _recipe(family.base, family.experts)
    out = export_model(recipe, tmp_path / "merged")
    before = open_checkpoint(str(out)).fingerprint()

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        export_model(recipe, out, overwrite=True)
    assert open_checkpoint(str(out)).fingerprint() == before
    assert _left_over(tmp_path) == ["merged"]


def test_a_failed_last_step_puts_the_old_folder_back(pico, tmp_path, monkeypatch):
    family = pico("vit")
    recipe = _recipe(family.base, family.experts)
    out = export_model(recipe, tmp_path / "merged")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if ".part-" in self.name and not self.name.endswith("-old"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match="Input/output error"):
        export_model(recipe, out, overwrite=True)
    assert open_checkpoint(str(out)).fingerprint()
    assert _left_over(tmp_path) == ["merged"]


def test_memory_stays_at_a_few_tensors(tmp_path, monkeypatch):
    """Sixteen tensors of 8 MiB per source, one shard: at no moment is a whole model held."""
    generator = torch.Generator().manual_seed(0)
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "one", "two")]
    for file in files:
        save_file(
            {f"layers.{i}": torch.randn(2 << 20, generator=generator) for i in range(16)}, file
        )
    recipe = _recipe(files[0], files[1:])
    export_model(recipe, tmp_path / "warm")  # compiles, and settles the allocator

    before = _anonymous_mebibytes()
    seen = []
    write = mergesearch.merging.export.folder.write_tensor

    def watched(info: TensorInfo, tensor: torch.Tensor) -> None:
        write(info, tensor)
        seen.append(_anonymous_mebibytes() - before)

    monkeypatch.setattr("mergesearch.merging.export.folder.write_tensor", watched)
    export_model(recipe, tmp_path / "merged")
    assert len(seen) == 16
    # A model is 128 MiB. Two rows and the merged tensor, with the next ones under way, are 48.
    assert max(seen) < 96


def _anonymous_mebibytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) >> 10


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_stores_merged_tensors_in_the_dtype_that_is_asked_for(pico, tmp_path, read_tensors, dtype):
    from transformers import AutoModelForCausalLM

    family = pico("llama_bf16")
    recipe = _recipe(family.base, family.experts)
    exported = export_and_measure(recipe, tmp_path / "merged", dtype=dtype, threads=2)
    exact = read_tensors(export_and_measure(recipe, tmp_path / "exact", dtype="float64").folder)
    merged = read_tensors(exported.folder)
    assert {str(tensor.dtype) for tensor in merged.values()} == {f"torch.{dtype}"}
    assert all(
        torch.equal(tensor, exact[name].to(tensor.dtype)) for name, tensor in merged.items()
    )  # one rounding
    assert str(AutoModelForCausalLM.from_pretrained(exported.folder).dtype) == f"torch.{dtype}"


def test_says_how_much_of_the_change_rounding_loses(pico, tmp_path, read_tensors):
    family = pico("llama_bf16")
    recipe = _recipe(family.base, family.experts)
    exact = read_tensors(export_and_measure(recipe, tmp_path / "exact", dtype="float32").folder)
    exported = export_and_measure(recipe, tmp_path / "merged")
    base = read_tensors(family.base)
    stored = read_tensors(exported.folder)
    # Tied copies are stored twice and merged once.
    names = open_checkpoint(str(family.base)).names
    lost = sum(
        float((stored[name].double() - exact[name].double()).square().sum()) for name in names
    )
    change = sum(
        float((exact[name].double() - base[name].double()).square().sum()) for name in names
    )
    assert exported.rounding.share == pytest.approx((lost / change) ** 0.5, rel=1e-4)
    assert 0 < exported.rounding.share < 1
    assert f"{exported.rounding.share:.3%}" in (exported.folder / "README.md").read_text()
    assert "bfloat16" in exported.rounding.sentence()


def test_an_exact_dtype_loses_nothing(pico, tmp_path):
    family = pico("vit")
    assert (
        export_and_measure(_recipe(family.base, family.experts), tmp_path / "merged").rounding.share
        == 0
    )


def test_refuses_a_dtype_that_is_none(pico, tmp_path):
    family = pico("vit")
    with pytest.raises(
        InputError,
        match="dtype: expected one of bfloat16, float16, float32, float64, received 'int8'",
    ):
        export_model(_recipe(family.base, family.experts), tmp_path / "merged", dtype="int8")
