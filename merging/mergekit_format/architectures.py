"""Architectures whose tensors mergekit finds, and writes under the names that they are stored by.

Others it may leave out without a word, or ask for tensors that no checkpoint has. These were
compared tensor by tensor with mergekit 0.1.5; `tests/merging/mergekit_format` does it again.
"""

from __future__ import annotations

ARCHITECTURES = (
    *("BertForSequenceClassification", "BertForTokenClassification"),
    *("DistilBertForMaskedLM", "DistilBertForSequenceClassification"),
    *("DistilBertForTokenClassification", "GPT2ForSequenceClassification", "GPT2LMHeadModel"),
    *("GPTBigCodeForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM"),
    *(
        "Glm4ForCausalLM",
        "GraniteForCausalLM",
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
    ),
    *("MambaForCausalLM", "MistralForCausalLM", "Olmo2ForCausalLM", "Phi3ForCausalLM"),
    *("PhiForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "RobertaForMaskedLM"),
    *("RobertaForSequenceClassification", "RobertaForTokenClassification", "StableLmForCausalLM"),
    *("Starcoder2ForCausalLM",),
)
