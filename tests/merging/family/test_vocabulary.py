"""Vocabularies aligned by token, against a plain reference and as exports that load."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers

from mergesearch.merging import CheckpointError, Field, Recipe, RecipeError, Source
from mergesearch.merging.checkpoints.opening import open_checkpoint
from mergesearch.merging.export.folder import export_model, folder_of_base
from mergesearch.merging.family.family import ModelFamily, align_family, open_family
from mergesearch.merging.models.loading import load_model
from mergesearch.merging.policies import TensorPolicies
from mergesearch.merging.recipe_file import load_recipe
from mergesearch.merging.resident.arena import open_arenas
from mergesearch.merging.resident.merged_model import MergedModel

BASE = "the cat sat on the mat and the dog sat on the cat"
ONE = "the bird sat on the cat and the mouse on the mat the bird"
TWO = "the mouse and the fish sat on the mat and the dog fish"
SPECIAL = ["<unk>", "<s>", "</s>"]


def words(
    text: str, added: Sequence[AddedToken] = (), specials: Sequence[str] = SPECIAL
) -> Tokenizer:
    """A word-level tokenizer trained on ``text``, the special tokens first, added tokens last."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=specials[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([text], trainers.WordLevelTrainer(special_tokens=list(specials)))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    tokenizer.add_tokens(list(added))
    return tokenizer


def save(folder: Path, tokenizer: Tokenizer, seed: int, padding: int = 0, **settings: Any) -> Path:
    """A pico Llama with a row for every token and ``padding`` more, and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    ends = {
        "bos_token_id": tokenizer.token_to_id("<s>"),
        "eos_token_id": tokenizer.token_to_id("</s>"),
    }
    rows = {"vocab_size": tokenizer.get_vocab_size() + padding, "max_position_embeddings": 32}
    config = LlamaConfig(**(sizes | ends | rows | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Zoo:
    """A base and two experts with vocabularies of their own."""

    base: Path
    experts: tuple[Path, Path]

    def recipe(
        self, policy: str, coefficients: Sequence[float], operator: str = "task_arithmetic"
    ) -> Recipe:
        experts = tuple(Source(path.name, str(path)) for path in self.experts)
        empty = Recipe(
            Source("base", str(self.base)), experts, operator, Field.constant(1, coefficients)
        )
        recipe = replace(empty, special=TensorPolicies(vocabulary=policy).choices)
        return recipe.with_field(Field.constant(open_family(recipe).layout.size, coefficients))

    def family(self, policy: str) -> ModelFamily:
        return open_family(self.recipe(policy, [0.0, 0.0]))


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    folder = tmp_path_factory.mktemp("zoo")
    tied = {"tie_word_embeddings": request.param}
    special = [AddedToken("<tool>", special=True), AddedToken("<end>", lstrip=True)]
    return Zoo(
        save(folder / "base", words(BASE), 0, padding=2, **tied),
        (
            save(folder / "one", words(ONE, special), 1, padding=5, **tied),
            save(folder / "two", words(TWO, [special[0]]), 2, **tied),
        ),
    )


def vocabulary(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    return dict(AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab())


def embedding(folder: Path, name: str = "model.embed_tokens.weight") -> torch.Tensor:
    return open_checkpoint(str(folder)).read(name)


def expected_rows(zoo: Zoo, policy: str) -> tuple[list[str], list[torch.Tensor]]:
    """Tokens and rows of base and experts in the merged vocabulary, one token at a time.

    Padding has no name.
    """
    folders = [zoo.base, *zoo.experts]
    ids = [vocabulary(folder) for folder in folders]
    tables = [embedding(folder) for folder in folders]
    ordered = sorted(ids[0], key=ids[0].__getitem__)
    if policy == "common":
        ordered = [token for token in ordered if all(token in other for other in ids)]
    if policy == "union":
        for other in ids[1:]:
            ordered += [
                token for token in sorted(other, key=other.__getitem__) if token not in ordered
            ]
    rows: list[list[torch.Tensor]] = [[], [], []]
    for token in ordered:
        holders = [
            table[own[token]]
            for own, table in zip(ids[1:], tables[1:], strict=True)
            if token in own
        ]
        known = token in ids[0]
        origin = tables[0][ids[0][token]] if known else sum(holders) / len(holders)
        rows[0].append(origin)
        for index, (own, table) in enumerate(zip(ids[1:], tables[1:], strict=True), start=1):
            rows[index].append(table[own[token]] if known and token in own else origin)
    if policy != "common":
        for source in rows:
            source.extend(tables[0][len(ids[0]) :])
    return ordered, [torch.stack(source) for source in rows]


@pytest.mark.parametrize("policy", ["base", "union", "common"])
def test_rows_go_by_token(zoo: Zoo, policy: str) -> None:
    family = zoo.family(policy)
    ordered, expected = expected_rows(zoo, policy)
    assert family.alignment is not None
    assert sorted(family.alignment.ids, key=family.alignment.ids.__getitem__) == ordered
    for source, rows in zip(family.sources, expected, strict=True):
        torch.testing.assert_close(
            source.read("model.embed_tokens.weight"), rows, rtol=0, atol=1e-6
        )
        assert source.shape("model.embed_tokens.weight") == tuple(rows.shape)
        assert source.config["vocab_size"] == len(rows)
    tied = family.base.config["tie_word_embeddings"]
    assert ("lm_head.weight" in family.layout.names) == (not tied)
    changed = {spec.name for spec in family.layout.tensors if spec.shape[0] == len(expected[0])}
    assert changed == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})


def test_no_coefficient_acts_on_tokens_that_the_base_lacks(zoo: Zoo, tmp_path: Path) -> None:
    ids = zoo.family("union").alignment.ids
    one, other = (
        embedding(export_model(zoo.recipe("union", values), tmp_path / name).folder)
        for name, values in (("one", [0.3, 0.4]), ("other", [-1.0, 2.0]))
    )
    new = [row for token, row in ids.items() if token not in vocabulary(zoo.base)]
    assert new
    assert torch.equal(one[new], other[new])
    held = [
        row
        for token, row in ids.items()
        if token in vocabulary(zoo.base) and token in vocabulary(zoo.experts[0])
    ]
    assert not torch.isclose(one[held], other[held]).all(dim=1).any()


def logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(ids)])).logits[0]


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, account = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not account["missing_keys"]
    assert not account["unexpected_keys"]
    assert not account["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("policy", ["base", "union", "common"])
def test_an_export_answers_as_its_sources_do(zoo: Zoo, policy: str, tmp_path: Path) -> None:
    """With coefficients 0 as the base, with one expert's at 1 as that expert, token by token."""
    for index, folder in ((None, zoo.base), (0, zoo.experts[0]), (1, zoo.experts[1])):
        coefficients = [float(index == k) for k in range(2)]
        out = export_model(
            zoo.recipe(policy, coefficients, "average"), tmp_path / f"{index}"
        ).folder
        merged = load(out)
        source = load(folder)
        ids = vocabulary(out)
        own = vocabulary(folder)
        # Tokens that the base lacks have rows that no coefficient acts on.
        shared = [token for token in own if token in ids and token in vocabulary(zoo.base)]
        text = [token for token in ("<s>", "the", "cat", "sat", "on", "mat") if token in shared]
        given = logits(source, [own[token] for token in text])[:, [own[token] for token in shared]]
        result = logits(merged, [ids[token] for token in text])[:, [ids[token] for token in shared]]
        torch.testing.assert_close(result, given, rtol=1e-5, atol=1e-5)
        assert (
            merged.config.vocab_size
            == merged.get_input_embeddings().num_embeddings
            == len(embedding(out))
        )
        tied = merged.config.tie_word_embeddings
        assert (
            merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
        ) == tied


def test_the_exported_tokenizer_numbers_tokens_by_their_rows(zoo: Zoo, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out = export_model(zoo.recipe("union", [0.3, 0.3]), tmp_path / "union").folder
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    assert tokenizer.get_vocab() == dict(zoo.family("union").alignment.ids)
    before = AutoTokenizer.from_pretrained(zoo.base, local_files_only=True)
    assert tokenizer(BASE).input_ids == before(BASE).input_ids
    assert tokenizer.convert_ids_to_tokens(tokenizer("the <tool> sat <end> fish").input_ids) == (
        ["<s>", "the", "<tool>", "sat", "<end>", "fish"]
    )
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    assert added["<tool>"].special
    assert not added["<end>"].special
    assert added["<end>"].lstrip
    reduced = AutoTokenizer.from_pretrained(
        export_model(zoo.recipe("common", [0.3, 0.3]), tmp_path / "common").folder,
        local_files_only=True,
    )
    assert reduced.get_vocab() == dict(zoo.family("common").alignment.ids)
    assert reduced("the cat").input_ids[0] == reduced.get_vocab()["<s>"] == reduced.bos_token_id
    kept = reduced.convert_ids_to_tokens(reduced("the cat sat on").input_ids)
    assert kept == ["<s>", "the", "<unk>", "sat", "on"]


def test_the_model_that_is_searched_holds_the_bits_of_the_export(zoo: Zoo, tmp_path: Path) -> None:
    recipe = zoo.recipe("union", [0.6, 0.2])
    arenas = open_arenas(recipe, tmp_path / "arenas")
    with folder_of_base(open_family(recipe), tmp_path / "arenas") as folder:
        merged = MergedModel(load_model(folder, "AutoModelForCausalLM"), arenas)
    assert not list((tmp_path / "arenas").glob(".base-*"))
    merged.write(recipe.field)
    exported = load(export_model(recipe, tmp_path / "out").folder)
    state = merged.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in exported.state_dict().items())
    last = exported.config.vocab_size - 1
    assert torch.equal(logits(merged.model, [1, 3, 4, last]), logits(exported, [1, 3, 4, last]))


def test_its_own_recipe_rebuilds_an_export(zoo: Zoo, tmp_path: Path) -> None:
    out = export_model(zoo.recipe("union", [0.6, 0.2]), tmp_path / "out").folder
    saved = load_recipe(out / "recipe.yaml")
    assert dict(saved.special) == {"vocabulary": "union"}
    again = export_model(saved, tmp_path / "again").folder
    assert open_checkpoint(str(again)).fingerprint() == open_checkpoint(str(out)).fingerprint()
    assert (again / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()


def test_dtypes_may_differ(zoo: Zoo, tmp_path: Path, copy_of: Callable[..., Path]) -> None:
    import shutil

    half = copy_of(
        zoo.experts[0], lambda tensors: {name: t.bfloat16() for name, t in tensors.items()}
    )
    shutil.copyfile(zoo.experts[0] / "tokenizer.json", half / "tokenizer.json")
    mixed = Zoo(zoo.base, (half, zoo.experts[1]))
    family = mixed.family("union")
    assert family.layout == zoo.family("union").layout
    # Rows that the expert lacks are exactly the base's: fp32 rows in a source of bfloat16.
    rows = torch.from_numpy(family.alignment.rows[1] < 0)
    base, expert = (source.read("model.embed_tokens.weight") for source in family.sources[:2])
    assert expert.dtype == torch.float32
    assert torch.equal(base[rows], expert[rows])
    assert family.experts[0].tensors["model.embed_tokens.weight"].dtype == "float32"


def test_stored_copies_of_a_tied_embedding_follow_it(
    tmp_path: Path, copy_of: Callable[..., Path]
) -> None:
    import shutil

    base, one = (
        save(tmp_path / name, words(text), seed, tie_word_embeddings=True)
        for seed, (name, text) in enumerate([("base", BASE), ("one", ONE)])
    )

    def twice(folder: Path) -> Path:
        copy = copy_of(
            folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}
        )
        shutil.copyfile(folder / "tokenizer.json", copy / "tokenizer.json")
        return copy

    plain = Zoo(base, (one, one))
    double = Zoo(twice(base), (twice(one), one))
    assert double.family("union").layout == plain.family("union").layout
    out = export_model(double.recipe("union", [0.3, 0.3]), tmp_path / "out").folder
    expected = embedding(export_model(plain.recipe("union", [0.3, 0.3]), tmp_path / "plain").folder)
    assert torch.equal(embedding(out), expected)
    assert torch.equal(embedding(out, "lm_head.weight"), expected)


def test_the_same_vocabulary_changes_nothing(zoo: Zoo) -> None:
    base = open_checkpoint(str(zoo.base))
    for policy in ("base", "union", "common"):
        family = align_family(
            base, [open_checkpoint(str(zoo.base), "copy")], TensorPolicies(vocabulary=policy)
        )
        assert family.alignment is None
        assert family.base is base
        assert not family.rebuilt


def test_identities_follow_the_alignment(zoo: Zoo) -> None:
    by_policy = {policy: zoo.recipe(policy, [0.3, 0.3]) for policy in ("base", "union", "common")}
    assert len({recipe.basis_key for recipe in by_policy.values()}) == 3
    families = [zoo.family(policy) for policy in by_policy]
    assert len({family.base.identity for family in families}) == 3
    assert len({family.experts[0].identity for family in families}) == 3
    assert len({family.base.fingerprint() for family in families}) == 1
    assert families[0].base.fingerprint() == open_checkpoint(str(zoo.base)).fingerprint()


# --- what is refused
# -----------------------------------------------------------------------------------------------


def align(base: Path, expert: Path, policy: str = "same") -> ModelFamily:
    return align_family(
        open_checkpoint(str(base)),
        [open_checkpoint(str(expert))],
        TensorPolicies(vocabulary=policy),
    )


def test_other_sizes_need_a_policy(zoo: Zoo) -> None:
    with pytest.raises(
        CheckpointError, match=r"expected vocabulary size .*special: \{vocabulary: base \| union"
    ):
        align(zoo.base, zoo.experts[0])


def test_moved_tokens_of_equal_size_are_refused_and_renamed_ones_warned_of(tmp_path: Path) -> None:
    base = save(tmp_path / "base", words("a b c"), 0, padding=1)
    moved = save(tmp_path / "moved", words("c c c b b a", ["x"]), 1)
    with pytest.raises(
        CheckpointError, match=r"token '[a-c]' in row \d, as in 'base', received row \d; align"
    ):
        align(base, moved)
    renamed = save(tmp_path / "renamed", words("a b", [AddedToken("d"), AddedToken("e")]), 2)
    with pytest.warns(
        UserWarning, match=r"1 rows hold different tokens .*row 5 is 'c' and 'd' in 'renamed'"
    ):
        align(base, renamed)
    same = save(tmp_path / "same", words("a b c"), 3, padding=1)
    bare = save(tmp_path / "bare", words("c b a"), 4, padding=1)
    (bare / "tokenizer.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        align(base, same)
        align(base, bare)
        assert align(base, renamed, "base").alignment is not None


def test_sources_without_tokens_to_go_by(
    zoo: Zoo, pico: Callable[[str], Any], tmp_path: Path
) -> None:
    bare = save(tmp_path / "bare", words("a b"), 0)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="bare: expected a tokenizer that can be read"):
        align(zoo.base, bare, "union")
    with pytest.raises(CheckpointError, match="expected a folder with a tokenizer"):
        align(zoo.base, zoo.base / "model.safetensors", "union")
    with pytest.raises(CheckpointError, match="expected embeddings of tokens to align, found none"):
        align(pico("vit").base, pico("vit").experts[0], "union")
    short = save(tmp_path / "short", words("a b c"), 0)
    words("a b c d e").save(str(short / "tokenizer.json"))
    with pytest.raises(
        CheckpointError, match="short: expected a row for each of 8 tokens, received 6 rows"
    ):
        align(zoo.base, short, "base")


def test_common_needs_the_tokens_that_the_tokenizer_and_the_configuration_need(
    tmp_path: Path,
) -> None:
    base = save(tmp_path / "base", words("a b c"), 0)
    other = save(
        tmp_path / "other", words("a b c", specials=["<unk>", "<s>", "<eos>"]), 1, eos_token_id=None
    )
    with pytest.raises(
        CheckpointError, match=r"config.json: eos_token_id: expected a token that base and"
    ):
        align(base, other, "common")
    zoo = Zoo(base, (base, save(tmp_path / "more", words("b"), 2)))
    assert sorted(zoo.family("common").alignment.ids) == ["</s>", "<s>", "<unk>", "b"]


def bpe(text: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(special_tokens=SPECIAL, vocab_size=60)
    )
    return tokenizer


def unigram(text: str) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.UnigramTrainer(special_tokens=SPECIAL, unk_token="<unk>", vocab_size=30)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def word_pieces(text: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        [text], trainers.WordPieceTrainer(special_tokens=SPECIAL, vocab_size=40)
    )
    ends = [("</s>", tokenizer.token_to_id("</s>")), ("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer


@pytest.mark.parametrize("make", [bpe, unigram, word_pieces])
def test_other_kinds_of_tokenizers(make: Callable[[str], Tokenizer], tmp_path: Path) -> None:
    zoo = Zoo(
        save(tmp_path / "base", make(BASE), 0),
        (save(tmp_path / "one", make(ONE), 1), save(tmp_path / "two", make(BASE), 2)),
    )
    out = export_model(zoo.recipe("union", [0.5, 0.5]), tmp_path / "union").folder
    assert vocabulary(out) == dict(zoo.family("union").alignment.ids)
    if make is bpe:
        with pytest.raises(
            CheckpointError, match=r"expected merges of the BPE tokenizer among common tokens"
        ):
            export_model(zoo.recipe("common", [0.5, 0.5]), tmp_path / "common")
        assert not (tmp_path / "common").exists()
        return
    out = export_model(zoo.recipe("common", [0.5, 0.5]), tmp_path / "common").folder
    assert vocabulary(out) == dict(zoo.family("common").alignment.ids)
    assert len(vocabulary(out)) < len(vocabulary(zoo.base))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    assert set(tokenizer.convert_ids_to_tokens(tokenizer("the cat").input_ids)) <= set(
        vocabulary(zoo.experts[0])
    )


def test_a_bpe_tokenizer_loses_tokens_that_no_merge_needs(tmp_path: Path) -> None:
    longer = bpe(BASE)
    longer.add_tokens(["<extra>", "<more>"])
    zoo = Zoo(save(tmp_path / "base", longer, 0), (save(tmp_path / "one", bpe(BASE), 1),) * 2)
    out = export_model(zoo.recipe("common", [0.5, 0.5]), tmp_path / "common").folder
    assert vocabulary(out) == vocabulary(zoo.experts[0])


def test_generation_settings_follow_the_rows(tmp_path: Path) -> None:
    def ends_first(text: str) -> Tokenizer:
        return words(text, specials=["<unk>", "</s>", "<s>"])

    base = save(tmp_path / "base", words("z a a b b"), 0)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(
        json.dumps(settings | {"eos_token_id": [2, 3], "pad_token_id": 4})
    )
    zoo = Zoo(
        base,
        (save(tmp_path / "one", words("a b"), 1), save(tmp_path / "two", ends_first("b a"), 2)),
    )
    ids = vocabulary(base)
    assert (ids["a"], ids["b"], ids["z"]) == (3, 4, 5)
    out = export_model(zoo.recipe("common", [0.5, 0.5]), tmp_path / "out").folder
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 3]
    dropped = Zoo(base, (save(tmp_path / "three", words("b"), 1), zoo.experts[1]))
    with pytest.raises(
        CheckpointError, match=r"generation_config.json: eos_token_id: .*received 3"
    ):
        export_model(dropped.recipe("common", [0.5, 0.5]), tmp_path / "refused")
    shifted = Zoo(
        base, (save(tmp_path / "four", words("b", specials=["<unk>", "<s>", "</s>"]), 1),) * 2
    )
    (base / "generation_config.json").write_text(json.dumps(settings | {"pad_token_id": 4}))
    out = export_model(shifted.recipe("common", [0.5, 0.5]), tmp_path / "shifted").folder
    assert (
        json.loads((out / "generation_config.json").read_text())["pad_token_id"]
        == 3
        == vocabulary(out)["b"]
    )


def test_tokens_listed_beside_the_tokenizer_count(tmp_path: Path) -> None:
    base = save(tmp_path / "base", words("a b"), 0)
    one = save(tmp_path / "one", words("a b"), 1, padding=1)
    config = json.loads((one / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"5": {"content": "<new>", "special": True}}
    (one / "tokenizer_config.json").write_text(json.dumps(config))
    family = Zoo(base, (one, one)).family("union")
    assert family.alignment.new == ("<new>",)
    assert torch.equal(family.base.read("lm_head.weight")[5], embedding(one, "lm_head.weight")[5])


def test_operators_that_run_the_model_are_refused(zoo: Zoo) -> None:
    from mergesearch.merging.operators import OPERATORS

    with pytest.raises(
        RecipeError, match="operator fisher: expected sources that can be run as they are stored"
    ):
        zoo.family("union").check(OPERATORS["fisher"])
    zoo.family("base").check(OPERATORS["fisher"])
