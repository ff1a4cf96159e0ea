"""The skills zoo: deterministic, reused, with tasks of lm_eval, tuned so that merging matters."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments.zoo import skills
from experiments.zoo.building import silence_transformers
from experiments.zoo.skills_data import SKILLS, SPLITS, questions, sentences
from mergesearch.merging import InputError
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.family.preflight import check_family
from mergesearch.merging.models.loading import load_model
from tests.evaluators.items import candidate_at, opened

BRIEF = skills.Training(steps=2, rate=1e-3, batch=4)
#: The zoo of this file is made once, by one worker.
pytestmark = pytest.mark.xdist_group("skills zoo")

TINY = skills.Settings(
    base=BRIEF,
    expert=BRIEF,
    questions={"search": 8, "validation": 5, "test": 6},
    training=20,
    width=16,
    blocks=2,
)


def weights(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.safetensors"))
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    silence_transformers()
    return skills.build_skills(tmp_path_factory.mktemp("zoo") / "skills", TINY, processes=1)


class TestQuestions:
    @pytest.mark.parametrize("skill", SKILLS)
    def test_choices_differ_and_one_is_right(self, skill: str) -> None:
        for question in questions(skill, "search", 60, 0):
            assert len(set(question.choices)) == 4
            assert question.target == question.choices[question.answer]

    def test_answers_are_right(self) -> None:
        for question in questions("addition", "test", 50, 0):
            one, two = question.prompt.removeprefix("add ").removesuffix(" =").split()
            assert int(question.target) == int(one) + int(two)
        for question in questions("sorting", "test", 50, 0):
            assert question.target.split() == sorted(question.prompt.split()[1:-1])
        for question in questions("reversal", "test", 50, 0):
            assert question.target.split() == question.prompt.split()[1:-1][::-1]
        closing = dict(zip("([{<", ")]}>", strict=True))
        for question in questions("brackets", "test", 50, 0):
            assert question.target.split() == [
                closing[one] for one in question.prompt.split()[1:-1][::-1]
            ]

    @pytest.mark.parametrize("skill", SKILLS)
    def test_training_and_splits_share_no_question(self, skill: str) -> None:
        parts = [{q.id for q in questions(skill, part, 100, 0)} for part in ("training", *SPLITS)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == 400

    def test_texts_are_disjoint_too(self) -> None:
        parts = [set(sentences(part, 100, 0)) for part in ("training", *SPLITS)]
        assert len(set().union(*parts)) == 400

    def test_asking_for_more_than_there_are_is_refused(self) -> None:
        with pytest.raises(
            InputError, match=r"questions.search: expected at most \d+ questions of knowledge"
        ):
            questions("knowledge", "search", 700, 0)


class TestTinyZoo:
    def test_the_same_settings_give_the_same_bits(self, zoo: Path, tmp_path: Path) -> None:
        import torch

        torch.manual_seed(123)  # nor does it matter what else was drawn
        before = torch.get_rng_state()
        again = skills.build_skills(tmp_path / "elsewhere", TINY, processes=1)
        assert torch.equal(torch.get_rng_state(), before)
        assert weights(again) == weights(zoo)
        assert len(set(weights(zoo).values())) == 1 + len(SKILLS)
        other = skills.build_skills(tmp_path / "other", replace(TINY, seed=1), processes=1)
        assert not set(weights(other).values()) & set(weights(zoo).values())

    def test_is_reused_and_task_files_name_its_data(self, zoo: Path) -> None:
        before = (zoo / "manifest.json").stat().st_mtime_ns
        assert skills.build_skills(zoo, TINY) == zoo
        assert (zoo / "manifest.json").stat().st_mtime_ns == before
        for path in (zoo / "tasks").glob("*.yaml"):
            task = yaml.safe_load(path.read_text())
            for file in task.get("dataset_kwargs", {}).get("data_files", {}).values():
                assert Path(file).is_file()

    def test_refuses_a_folder_of_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(InputError, match="expected a new folder or a skills zoo"):
            skills.build_skills(tmp_path, TINY)

    def test_models_are_a_family_that_transformers_loads(self, zoo: Path) -> None:
        base, *experts = (open_checkpoint(str(zoo / name)) for name in ("base", *SKILLS))
        check_family(base, experts)
        assert load_model(str(zoo / "addition"), "AutoModelForCausalLM").config.tie_word_embeddings

    def test_every_task_runs(self, zoo: Path) -> None:
        names = [
            path.stem for path in sorted((zoo / "tasks").glob("*.yaml")) if path.stem != "skills"
        ]
        tasks = [{"task": name, "splits": {split: split for split in SPLITS}} for name in names]
        section = {
            "kind": "lm_eval",
            "include_path": str(zoo / "tasks"),
            "tokenizer": str(zoo / "base"),
            "tasks": tasks,
            "objectives": [{"domains": [name]} for name in names],
        }
        model = load_model(str(zoo / "base"), "AutoModelForCausalLM")
        measured = opened(section).evaluate(candidate_at([0.1], model), "search")
        assert len(measured.values) == len(names) == 12
        assert all(np.isfinite(value) for value in measured.values.values())


@pytest.mark.slow
class TestRealZoo:
    def test_merging_matters(self, tmp_path: Path) -> None:
        silence_transformers()
        zoo = skills.build_skills(tmp_path / "skills")
        rows = {
            name: row | {"mean": np.mean(list(row.values()))}
            for name, row in skills.measure(zoo).items()
        }
        for skill in SKILLS:
            assert rows[skill][skill] > rows["base"][skill] + 0.05
        average = rows["coefficient 0.20"]["mean"]
        assert average > rows["base"]["mean"] + 0.05
        assert (
            max(row["mean"] for name, row in rows.items() if name.startswith("coefficient"))
            > average + 0.02
        )
