"""Studies of language models that are merged for each prompt, up to the bundles that they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergesearch.merging import InputError
from mergesearch.merging.routing.bundle import load
from mergesearch.search.cli.check import describe_plan
from mergesearch.search.plan.planning import plan_study
from mergesearch.search.runs.exported import export_bundle, rescore
from tests.evaluators.items import DOMAINS, pico_llama, save, token_splits
from tests.evaluators.language import lm_section, make_tasks
from tests.evaluators.texts import make_tokenizer, text_folder, text_llama
from tests.search.studies import run_in, spec_of


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and tokens of two domains; a base and an expert for each, of both vocabularies."""
    home = text_folder(tmp_path_factory.mktemp("home"))
    save(home / "tokens", token_splits())
    for make, family in ((text_llama, "written"), (pico_llama, "scored")):
        for seed, name in enumerate(("base", *DOMAINS)):
            make(seed).save_pretrained(home / family / name)
    make_tokenizer(home / "written" / "base")
    make_tasks(home)
    return home


def study(home: Path, kind: str, method: str, **options: Any) -> dict[str, Any]:
    """A study of ``generation``, ``language_model`` or ``lm_eval``."""
    written = kind != "language_model"
    columns = (
        {"data": "texts", "target": "target", "scorer": "prefix", "max_new_tokens": 3}
        if written
        else {"data": "tokens", "labels": "labels"}
    )
    family = "written" if written else "scored"
    names = DOMAINS[:1] if method == "t3" else DOMAINS
    router = {"router_steps": 5, "router_width": 4} if method == "twin_merging" else {}
    routing = {"method": method, **router, **options}
    section = {"kind": kind, "domain": "domain", "batch_size": 5, "routing": routing}
    if kind == "lm_eval":
        owners = dict(zip(("choose", "write"), DOMAINS, strict=True))
        section = lm_section(home, *owners) | {"routing": routing, "experts": owners}
        columns = {}
    return {
        "name": "routed",
        "base": f"{family}/base",
        "experts": {name: f"{family}/{name}" for name in names},
        "evaluators": [section | columns],
        "strategy": "cma_es",
        "budget": {"trials": 10},
        "selection": {"leaders": 1},
    }


@pytest.mark.parametrize(
    ("kind", "method", "options"),
    [
        ("generation", "twin_merging", {}),
        ("language_model", "t3", {"per": "batch"}),
        pytest.param("generation", "t3", {}, marks=pytest.mark.slow),
        pytest.param("language_model", "twin_merging", {}, marks=pytest.mark.slow),
        pytest.param("lm_eval", "t3", {}, marks=pytest.mark.slow),
        pytest.param("lm_eval", "twin_merging", {}, marks=pytest.mark.slow),
    ],
)
def test_a_bundle_gives_what_was_evaluated(
    home: Path, tmp_path: Path, kind: str, method: str, options: dict[str, Any]
) -> None:
    data = study(home, kind, method, **options)
    run = run_in(data, home / f"run-{kind}-{method}")
    assert all(record.state == "complete" for record in run.log.records)
    routed = [record for record in run.log.records if record.recipe.routing]
    assert any(not record.recipe.routing for record in run.log.records)
    out = tmp_path / "out"
    export_bundle(run, routed[-1], out, facts={}, overwrite=False, threads=1)
    assert rescore(run, routed[-1], out).agreement.identical
    bundle = load(out)
    prompts = {"input_ids": torch.tensor([[0, 3, 4], [5, 6, 7]])}
    prompts["attention_mask"] = torch.tensor([[0, 1, 1], [1, 1, 1]])
    tokens = bundle.generate(**prompts, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens[:, :3], prompts["input_ids"])
    answer = bundle(**prompts)
    assert torch.isfinite(answer.logits).all()
    assert answer.weights.shape == (2, 2 if method == "twin_merging" else 1)
    card = (out / "README.md").read_text()
    assert "model.generate(**prompt" in card
    folder = "shared" if method == "twin_merging" else "base"
    assert (out / folder / "tokenizer.json").exists() is (kind != "language_model")
    assert f"this/folder/{folder}" in card


def test_check_says_what_it_is(home: Path) -> None:
    text = "\n".join(describe_plan(plan_study(spec_of(study(home, "generation", "t3"), home))))
    assert "not a single checkpoint, merged for each item" in text
    assert "lambda_max" in text


def test_prompts_need_the_key_of_texts(home: Path) -> None:
    data = study(home, "generation", "t3")
    data["evaluators"] = [{"kind": "t3", "data": "texts", "domain": "domain"}]
    with pytest.raises(InputError, match=r"LlamaForCausalLM, received t3.*routing"):
        plan_study(spec_of(data, home))
    data = study(home, "generation", "t3")
    data["experts"] |= {"night": "written/night"}
    with pytest.raises(InputError, match="expected exactly one for t3"):
        plan_study(spec_of(data, home))
