"""What auto classes load, read from transformers' files, agrees with what it says when imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from mergesearch.merging.models import auto_tables
from mergesearch.merging.models.auto_tables import surely_loads


def test_the_files_say_what_the_tables_say() -> None:
    """A type that the files promise is loaded, and they promise nearly all that are."""
    promised = 0
    loaded = 0
    for name in (name for name in dir(transformers) if name.startswith("AutoModel")):
        tables = getattr(getattr(transformers, name), "_model_mapping", None)
        if tables is None:
            continue
        back = tables._reverse_config_mapping
        for kind, configuration in tables._config_mapping.items():
            real = back[configuration] in tables._model_mapping
            assert real or not surely_loads(name, kind), (name, kind)
            promised += surely_loads(name, kind)
            loaded += real
    assert promised > 0.9 * loaded


@pytest.mark.parametrize(
    ("model_class", "model_type"),
    [
        ("AutoModelForCausalLM", "llama"),
        ("AutoModelForCausalLM", "gpt2"),
        ("AutoModelForCausalLM", "qwen2"),
        ("AutoModelForImageClassification", "vit"),
        ("AutoModelForSequenceClassification", "bert"),
        ("AutoModel", "bert"),
        ("AutoModelForImageTextToText", "llava"),
    ],
)
def test_common_models_are_known_without_an_import(model_class: str, model_type: str) -> None:
    assert surely_loads(model_class, model_type)


@pytest.mark.parametrize(
    ("model_class", "model_type"),
    [
        ("AutoModelForCausalLM", "vit"),
        ("AutoModelForCausalLM", "None"),
        ("AutoModelForCausalLM", "no such type"),
        ("AutoNothing", "llama"),
        ("BertModel", "bert"),
    ],
)
def test_what_the_files_do_not_say_is_left_to_the_tables(model_class: str, model_type: str) -> None:
    assert not surely_loads(model_class, model_type)


def test_other_forms_of_the_files_say_nothing(tmp_path: Path) -> None:
    """As in releases where the tables stand elsewhere, or are made by code."""
    code = "from mergesearch.merging.models.auto_tables import surely_loads as s; "
    package = tmp_path / "transformers"
    (package / auto_tables.FOLDER).mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / auto_tables.FOLDER / "modeling_auto.py").write_text("NAMES = dict(made())\n")
    shown = subprocess.run(
        [sys.executable, "-c", code + "print(s('AutoModelForCausalLM', 'llama'))"],
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[3]}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "False\n"
