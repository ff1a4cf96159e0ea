"""Record what peft makes of tiny adapters: models, adapters as it saves them, and merges.

Needs peft 0.21 beside transformers 5; run by hand: ``python tests/golden/peft/write.py``. Each
folder holds the model, ``adapter``, and ``merged.safetensors`` with the tensors that the adapter
changes, under their stored names. Where the adapted model has another head, it is of another class.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 24}

VIT = (
    transformers.ViTForImageClassification,
    transformers.ViTConfig(
        image_size=4,
        patch_size=2,
        num_channels=1,
        num_labels=2,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
    ),
)
LLAMA = (
    transformers.LlamaForCausalLM,
    transformers.LlamaConfig(
        **TOKENS,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
    ),
)
GPT2 = (
    transformers.GPT2LMHeadModel,
    transformers.GPT2Config(
        **TOKENS, n_embd=8, n_layer=1, n_head=2, n_positions=8, tie_word_embeddings=False
    ),
)

#: Name -> model, settings of the adapter. Patterns, convolutions, renamed modules and whole
#: tensors; embeddings with √r, biases; square matrices stored as (in, out) beside others, which the
#: saved ``fan_in_fan_out`` gets wrong.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "vit": (
        VIT,
        {
            "target_modules": ["q_proj", "v_proj", "projection"],
            "modules_to_save": ["classifier"],
            "rank_pattern": {"layers.1.attention.q_proj": 3},
            "alpha_pattern": {"v_proj": 5},
        },
    ),
    "llama": (
        LLAMA,
        {
            "target_modules": ["q_proj", "down_proj", "embed_tokens"],
            "use_rslora": True,
            "bias": "all",
        },
    ),
    "gpt2": (GPT2, {"target_modules": ["c_attn", "c_proj", "lm_head"]}),
}

DISTILBERT = (
    transformers.DistilBertForMaskedLM,
    transformers.DistilBertConfig(
        vocab_size=24, dim=8, hidden_dim=12, n_layers=1, n_heads=2, max_position_embeddings=8
    ),
)
ROBERTA = (
    transformers.RobertaModel,
    transformers.RobertaConfig(
        **TOKENS,
        pad_token_id=0,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=10,
    ),
)
#: Name -> base, number of classes, settings: a classifier on top of a model without one. Names
#: behind a prefix and without; heads of two modules, and of two layers.
CLASSIFIERS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "distilbert": (
        DISTILBERT,
        3,
        {"target_modules": ["q_lin", "lin1"], "modules_to_save": ["pre_classifier", "classifier"]},
    ),
    "roberta": (ROBERTA, 5, {"target_modules": ["query", "dense"], "exclude_modules": "class.*"}),
}


def write(name: str) -> None:
    """Write the folder of one case."""
    classifier = name in CLASSIFIERS
    (model_class, config), settings = CASES[name] if not classifier else CLASSIFIERS[name][::2]
    folder = HERE / name
    torch.manual_seed(0)
    model = model_class(config)
    model.save_pretrained(folder)
    before = load_file(folder / "model.safetensors")
    if classifier:
        settings = settings | {"task_type": "SEQ_CLS"}
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=CLASSIFIERS[name][1]
        )
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **settings)
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "adapter")
    _tidy(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    after = load_file(folder / "merged" / "model.safetensors")
    changed = {
        key: tensor
        for key, tensor in after.items()
        if key not in before or not torch.equal(tensor, before[key])
    }
    save_file(changed, folder / "merged.safetensors")
    for file in [*(folder / "merged").iterdir(), folder / "generation_config.json"]:
        file.unlink(missing_ok=True)
    (folder / "merged").rmdir()


def _tidy(adapter: Path) -> None:
    (adapter / "README.md").unlink()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = ""  # was a path on the machine that wrote this
    settings["target_modules"] = sorted(
        settings["target_modules"]
    )  # a set: its order changes from run to run
    (adapter / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    for case in [*CASES, *CLASSIFIERS]:
        write(case)
