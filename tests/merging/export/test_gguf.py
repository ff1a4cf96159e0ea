"""GGUF files: read back tensor by tensor, loaded by transformers, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergesearch.merging import InputError
from mergesearch.merging.export.gguf_format.grids import on_grid, type_of
from mergesearch.merging.export.gguf_format.models import hyperparameters, rope_factors
from mergesearch.merging.export.gguf_format.writing import TYPES, write_gguf
from mergesearch.merging.models.layer_bits import at_bits
from mergesearch.merging.models.q4_k import quantised

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'mergesearch[gguf]'")

TOKENS = {"vocab_size": 64, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **TOKENS,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
#: Type of model -> its settings.
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": SIZES,
    "qwen2": SIZES | {"tie_word_embeddings": True},
    "qwen3": SIZES | {"head_dim": 128},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 64},
    "phi": SIZES,
    "phi3": SIZES | {"pad_token_id": 0},
    "gemma": SIZES | {"head_dim": 8},
    "gemma2": SIZES | {"head_dim": 8, "query_pre_attn_scalar": 8},
}
#: Those of which transformers reads all settings from a file as small as this one.
READABLE = ("llama", "qwen2", "qwen3")
#: Type of matrices -> greatest relative error of a matrix of random numbers.
ERRORS = {"f32": 0, "f16": 3e-4, "bf16": 3e-3, "q8_0": 6e-3, "q4_0": 0.1, "q4_k": 0.09}

Save = Callable[..., Path]


@pytest.fixture
def saved(tmp_path: Path) -> Save:
    """Saves a model of random weights, and returns its folder."""
    import transformers

    def save(kind: str, **settings: Any) -> Path:
        torch.manual_seed(0)
        config = transformers.CONFIG_MAPPING[kind](**MODELS[kind] | settings)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return save


def tensors_of(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors of a file by name, as plain numbers."""
    reader = gguf.GGUFReader(file)
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def fields_of(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


def by_halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes the order of rows that llama.cpp gives to queries and keys."""
    rows = torch.arange(len(tensor)).view(heads, -1, 2)
    return tensor[rows.transpose(1, 2).reshape(-1)]


@pytest.mark.parametrize("kind", MODELS)
def test_every_tensor_is_the_model_s(kind: str, saved: Save) -> None:
    folder = saved(kind)
    exported = write_gguf(folder, folder / "model.gguf", "f32")
    read = tensors_of(exported.file)
    stored = load_file(folder / "model.safetensors")
    assert len(read) == exported.tensors == len(stored)
    left = dict(read)
    for name, tensor in stored.items():
        expected = tensor
        if kind == "gpt2" and any(f".{one}.weight" in name for one in ("c_attn", "c_proj", "c_fc")):
            expected = tensor.T
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            expected = tensor + 1
        heads = {"q_proj": 4, "k_proj": 2} if kind in ("llama", "mistral") else {}
        number = next((n for word, n in heads.items() if word in name), None)
        like = [own for own, array in left.items() if array.shape == tuple(expected.shape)]
        found = [
            own
            for own in like
            if np.array_equal(
                by_halves(torch.tensor(left[own]), number).numpy() if number else left[own],
                expected.numpy(),
            )
        ]
        assert len(found) == 1, name
        del left[found[0]]
    fields = fields_of(exported.file)
    architecture = fields["general.architecture"]
    assert fields[f"{architecture}.block_count"] == 2
    assert fields[f"{architecture}.attention.head_count"] == 4
    assert fields["tokenizer.ggml.model"] == "none"
    assert "no tokenizer.json" in exported.lines()[-1]


@pytest.mark.parametrize("kind", READABLE)
def test_transformers_answers_the_same_from_it(kind: str, saved: Save) -> None:
    import transformers

    folder = saved(kind)
    write_gguf(folder, folder / "model.gguf", "f32")
    auto = transformers.AutoModelForCausalLM
    ours = auto.from_pretrained(folder).eval()
    again = auto.from_pretrained(folder, gguf_file="model.gguf").eval()
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(again(tokens).logits, ours(tokens).logits)


@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_answers_the_same_from_it(kind: str, saved: Save) -> None:
    llama = pytest.importorskip("xllamacpp", reason="xllamacpp, a build of llama.cpp, is not there")
    import transformers

    sizes = {"gpt2": {"n_embd": 64}}.get(kind, {"hidden_size": 64, "intermediate_size": 96})
    if kind.startswith(("gemma", "qwen3", "mistral")):
        sizes |= {"head_dim": 32}
    if kind == "gemma2":
        sizes |= {"query_pre_attn_scalar": 32}
    folder = saved(kind, **sizes)
    letters = {chr(ord("a") + n): 3 + n for n in range(26)} | {"ab": 29}
    write_tokenizer(folder, letters, [("a", "b")])
    write_gguf(folder, folder / "model.gguf", "f32", name="tiny")
    parameters = llama.CommonParams()
    parameters.model.path = str(folder / "model.gguf")
    parameters.n_ctx = 32
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = 1
    parameters.warmup = False
    tokens = [5, 9, 12, 20, 7, 3]
    asked = {"prompt": tokens, "max_tokens": 1, "temperature": 0.0, "logprobs": 20}
    answer = llama.Server(parameters).handle_completions(asked)
    [choice] = (json.loads(answer) if isinstance(answer, str) else answer)["choices"]
    read = {one["id"]: one["logprob"] for one in choice["logprobs"]["content"][0]["top_logprobs"]}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1).detach()
    assert len(read) == 20
    for token, value in read.items():  # keys and values are kept in fp16 there
        assert value == pytest.approx(float(expected[token]), abs=0.03)


@pytest.mark.parametrize("kind", ERRORS)
def test_types_of_matrices(kind: str, saved: Save) -> None:
    folder = saved("qwen2", hidden_size=256, intermediate_size=48)
    exact = tensors_of(write_gguf(folder, folder / "exact.gguf", "f32").file)
    exported = write_gguf(folder, folder / "model.gguf", kind)
    for name, array in tensors_of(exported.file).items():
        error = np.linalg.norm(array - exact[name]) / np.linalg.norm(exact[name])
        assert error <= (0 if array.ndim == 1 else ERRORS[kind]), name
    fields = fields_of(exported.file)
    assert fields["general.file_type"] == TYPES[kind]
    types = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(exported.file).tensors}
    assert types["blk.0.attn_q.weight"] == kind
    down = types["blk.0.ffn_down.weight"]  # rows of 48, which no block divides
    assert down == (kind if kind in ("f32", "f16", "bf16") else "f16")
    assert ("blk.0.ffn_down.weight" in exported.wider) == (down != kind)


def test_blocks_of_q4_k() -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(3, 512)).astype(np.float32)
    rows[0] = np.abs(rows[0]) + 5  # no element below zero, so nothing is subtracted
    rows[1, :256] = 0
    rows[2] *= 1e-4
    blocks = quantised(rows)
    assert blocks.shape == (3, 288)
    read = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_K)
    assert np.array_equal(read[1, :256], np.zeros(256))
    groups = np.abs(rows).reshape(3, 16, 32).max(axis=-1)
    span = np.ptp(np.concatenate([rows.reshape(3, 16, 32), np.zeros((3, 16, 1))], -1), axis=-1)
    missing = np.abs(read - rows).reshape(3, 16, 32).max(axis=-1)
    # Half a step of fifteen, and what six bits of scale and minimum miss.
    assert (missing <= span / 30 + (groups.max() / 63) / 2).all()
    assert np.linalg.norm(read[2] - rows[2]) < 0.1 * np.linalg.norm(rows[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_blocks_hold_the_values_that_bits_left(bits: int, dtype: torch.dtype) -> None:
    kind = type_of(bits)
    matrix = torch.randn((6, 192), generator=torch.Generator().manual_seed(bits)) + 0.3
    matrix[5] = 0.25
    values = at_bits(matrix.to(dtype), bits).float().numpy()
    told = gguf.GGMLQuantizationType[kind.upper()]
    read, usual = (
        gguf.quants.dequantize(blocks, told)
        for blocks in (on_grid(values, kind), gguf.quants.quantize(values, told))
    )
    step = np.ptp(matrix.numpy()) / (2**bits - 1)
    # What is left is rounding: of step and minimum to fp16, and of the values to their own dtype.
    assert np.abs(read - values).max() < (0.02 if dtype == torch.float32 else 0.08) * step
    assert np.array_equal(read[5], values[5])
    if bits > 1:
        assert np.linalg.norm(read - values) < 0.2 * np.linalg.norm(usual - values)


def test_a_file_of_the_bits_of_its_layers(saved: Save) -> None:
    import transformers

    folder = saved("qwen2", hidden_size=64, intermediate_size=96)
    stored = load_file(folder / "model.safetensors")
    bits = {n: (3, 6)["layers.1" in n] for n, t in stored.items() if "layers" in n and t.ndim > 1}
    bits["model.layers.0.self_attn.o_proj.weight"] = 5
    rounded = {n: at_bits(t, bits[n]) if n in bits else t for n, t in stored.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    exported = write_gguf(folder, folder / "model.gguf", "bits", bits=bits)
    types = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(exported.file).tensors}
    assert types["blk.0.attn_q.weight"] == "q4_1"
    assert types["blk.0.attn_output.weight"] == "q5_1"
    assert types["blk.1.attn_q.weight"] == "q8_0"
    assert types["token_embd.weight"] == "f16"
    assert exported.wider == ()
    assert "6 q4_1, 1 q5_1, 7 q8_0" in exported.lines()[0]
    auto = transformers.AutoModelForCausalLM
    again = auto.from_pretrained(folder, gguf_file="model.gguf").eval().state_dict()
    whole = auto.from_pretrained(folder).eval().state_dict()
    for name, width in bits.items():
        missed = (again[name] - whole[name]).abs().max()
        assert missed < (0.01 if width > 5 else 0.002) * whole[name].abs().max(), name


def test_bits_that_no_file_can_have(saved: Save) -> None:
    folder = saved("llama")
    with pytest.raises(InputError, match=r"expected a trial whose layers have bits .* q4_k"):
        write_gguf(folder, folder / "model.gguf", "bits")
    folder = saved("gpt2")
    with pytest.raises(InputError, match="expected matrices with a row for each output"):
        write_gguf(folder, folder / "model.gguf", "bits", bits={"h.0.attn.c_attn.weight": 4})


def test_scaled_positions_of_llama_3(saved: Save) -> None:
    import transformers

    folder = saved("llama", rope_parameters=LLAMA3, max_position_embeddings=128)
    config = json.loads((folder / "config.json").read_text())
    factors = rope_factors(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    plain = 5e5 ** -(torch.arange(0, 8, 2) / 8)
    ours = plain / torch.tensor(factors)
    torch.testing.assert_close(ours, model.model.rotary_emb.inv_freq)
    assert {*np.unique(factors)} != {np.float32(1)}
    exported = write_gguf(folder, folder / "model.gguf")
    assert np.array_equal(tensors_of(exported.file)["rope_freqs.weight"], factors)
    assert len(gguf.GGUFReader(exported.file).tensors) == exported.tensors


def write_tokenizer(
    folder: Path, letters: dict[str, int], merges: list[tuple[str, str]], **options: Any
) -> None:
    """A byte-level BPE tokenizer, with two special tokens and one added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **letters}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))


def test_the_tokenizer(saved: Save) -> None:
    folder = saved("llama")
    letters = {letter: number + 3 for number, letter in enumerate("abcd")}
    letters |= {"ab": 7, "abc": 8, "<0x0A>": 9}

    def write(**options: Any) -> dict[str, Any]:
        write_tokenizer(folder, letters, [("a", "b"), ("ab", "c")], **options)
        exported = write_gguf(folder, folder / "model.gguf", overwrite=True)
        assert exported.without_tokenizer is None
        fields = fields_of(exported.file)
        return {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}

    fields = write()
    assert (fields["model"], fields["pre"]) == ("gpt2", "llama-bpe")
    assert fields["tokens"][:11] == ["<unk>", "<s>", "</s>", *letters, "<tool>"]
    assert fields["tokens"][11] == "[PAD11]"
    assert len(fields["tokens"]) == 64
    assert fields["token_type"][:12] == [1, 3, 3, 1, 1, 1, 1, 1, 1, 6, 4, 5]
    assert fields["merges"] == ["a b", "ab c"]
    assert fields["bos_token_id"] == 1
    fields = write(byte_fallback=True)
    assert fields["model"] == "llama"
    assert fields["scores"][:4] == [0, -1, -2, -3]
    assert "merges" not in fields


def test_refusals(saved: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())

    def refused(kind: str = "f16", file: str = "model.gguf", **settings: Any) -> str:
        (folder / "config.json").write_text(json.dumps(config | settings))
        with pytest.raises(InputError) as error:
            write_gguf(folder, folder / file, kind)
        assert not (folder / file).is_file()
        assert not [*folder.glob(".*")]
        return str(error.value)

    line = refused(architectures=["LlamaForSequenceClassification"])
    assert "received LlamaForSequenceClassification of type 'llama'" in line
    assert "of type 'bert'" in refused(model_type="bert", architectures=["BertLMHeadModel"])
    yarn = {"rope_type": "yarn", "factor": 2.0}
    assert "received 'yarn'" in refused(rope_parameters=yarn)
    assert "received 'q5_k'" in refused("q5_k")
    assert "has no place there" in refused(num_hidden_layers=1)
    assert "query_pre_attn_scalar 8, received 9" in refused(query_pre_attn_scalar=9)
    (folder / "config.json").write_text(json.dumps(config))
    write_gguf(folder, folder / "there.gguf")
    with pytest.raises(InputError, match="one that exists"):
        write_gguf(folder, folder / "there.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'mergesearch[gguf]'" in refused()


def test_hyperparameters_of_gemma_2(saved: Save) -> None:
    config = json.loads((saved("gemma2", sliding_window=16) / "config.json").read_text())
    found = hyperparameters(config)
    assert found["attention.sliding_window"] == 16
    assert found["attention.key_length"] == 8
    assert found["final_logit_softcapping"] == pytest.approx(30)
