"""Tiny models of many architectures: built from the configurations of transformers.

Each has every kind of layer that its large relatives have, and several blocks where a test must see
an order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

Shapes = dict[str, tuple[int, ...]]
Options = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A row of the table.

    Attributes:
        model: Class in its library.
        config: Its configuration class; empty in diffusers, where there is none.
        options: Arguments of the configuration.
        auto: The auto class that loads it.
        towers: Label -> number of its blocks, as they should be found.
        library: ``transformers``, or ``diffusers``.
    """

    model: str
    config: str
    options: Options
    auto: str
    towers: Mapping[str, int] = field(default_factory=lambda: {"": 2})
    library: str = "transformers"

    @property
    def loader(self) -> Any:
        """The class of the model."""
        return getattr(import_module(self.library), self.model)

    def build(self) -> nn.Module:
        """The model, with weights from torch's global generator."""
        configured = getattr(import_module(self.library), self.config or "-", None)
        made = (
            self.loader(configured(**self.options)) if configured else self.loader(**self.options)
        )
        model: nn.Module = made
        return model


_TOWER: Options = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
_BLOCKS: Options = _TOWER | {"num_hidden_layers": 2}
_TEXT: Options = _BLOCKS | {"vocab_size": 40}
_DECODER: Options = _TEXT | {
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: Options = _BLOCKS | {"image_size": 8, "patch_size": 4}
_TOKENS: Options = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER_DECODER: Options = _TOKENS | {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 16,
    "decoder_start_token_id": 1,
}
_T5: Options = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_WAVES: Options = _TEXT | {
    "conv_dim": [8, 8],
    "conv_stride": [2, 2],
    "conv_kernel": [3, 3],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}

_CAUSAL = "AutoModelForCausalLM"
_MASKED = "AutoModelForMaskedLM"
_CLASSES = "AutoModelForSequenceClassification"
_SOUNDS = "AutoModelForAudioClassification"
_SEQUENCES = "AutoModelForSeq2SeqLM"
_IMAGES = "AutoModelForImageClassification"
_IMAGE_TEXT = "AutoModelForImageTextToText"
_BOTH = {"": 2, "decoder": 2}

#: Name -> architecture.
ARCHITECTURES: dict[str, Architecture] = {
    # language models
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", _DECODER, _CAUSAL),
    "opt": Architecture(
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 32,
            "max_position_embeddings": 16,
            "word_embed_proj_dim": 8,
        },
        _CAUSAL,
        {"decoder": 2},
    ),
    "falcon": Architecture("FalconForCausalLM", "FalconConfig", _TEXT | _TOKENS, _CAUSAL),
    "gpt_neox": Architecture(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        _TEXT | _TOKENS | {"max_position_embeddings": 16},
        _CAUSAL,
    ),
    "gptj": Architecture(
        "GPTJForCausalLM",
        "GPTJConfig",
        _TOKENS
        | {
            "vocab_size": 40,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "rotary_dim": 4,
            "n_positions": 16,
        },
        _CAUSAL,
    ),
    "bloom": Architecture(
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2},
        _CAUSAL,
    ),
    "mpt": Architecture(
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": 40, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 16},
        _CAUSAL,
    ),
    "glm": Architecture("GlmForCausalLM", "GlmConfig", _DECODER | {"head_dim": 8}, _CAUSAL),
    "phi3": Architecture("Phi3ForCausalLM", "Phi3Config", _DECODER, _CAUSAL),
    "cohere": Architecture("CohereForCausalLM", "CohereConfig", _DECODER, _CAUSAL),
    "mixtral": Architecture(
        "MixtralForCausalLM", "MixtralConfig", _DECODER | {"num_local_experts": 2}, _CAUSAL
    ),
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        "GptOssConfig",
        _DECODER | {"num_local_experts": 4, "head_dim": 8},
        _CAUSAL,
    ),
    "deepseek_v3": Architecture(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _DECODER
        | {
            "num_key_value_heads": 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 8,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "qk_nope_head_dim": 4,
        },
        _CAUSAL,
    ),
    # state spaces and their hybrids
    "mamba": Architecture(
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2},
        _CAUSAL,
    ),
    "mamba2": Architecture(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        _TOKENS
        | {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 1,
            "num_hidden_layers": 2,
        },
        _CAUSAL,
    ),
    "jamba": Architecture(
        "JambaForCausalLM",
        "JambaConfig",
        _DECODER
        | {
            "num_experts": 2,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
        },
        _CAUSAL,
        {"": 4},
    ),
    "rwkv": Architecture(
        "RwkvForCausalLM",
        "RwkvConfig",
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "attention_hidden_size": 16,
            "intermediate_size": 32,
        },
        _CAUSAL,
    ),
    # encoders of texts
    "bert": Architecture("BertForSequenceClassification", "BertConfig", _TEXT, _CLASSES),
    "deberta_v2": Architecture(
        "DebertaV2ForTokenClassification",
        "DebertaV2Config",
        _TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "AutoModelForTokenClassification",
    ),
    "modernbert": Architecture(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        _TEXT | _TOKENS | {"cls_token_id": 1, "sep_token_id": 2},
        _MASKED,
    ),
    "albert": Architecture(
        "AlbertModel", "AlbertConfig", _TEXT | {"embedding_size": 8}, "AutoModel", {"": 1}
    ),
    "mpnet": Architecture("MPNetModel", "MPNetConfig", _TEXT, "AutoModel"),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
        _CLASSES,
    ),
    "qwen2_reward": Architecture(
        "Qwen2ForSequenceClassification", "Qwen2Config", _DECODER | {"num_labels": 1}, _CLASSES
    ),
    # encoders and decoders
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", _T5, _SEQUENCES, _BOTH),
    "bart": Architecture(
        "BartForConditionalGeneration", "BartConfig", _ENCODER_DECODER, _SEQUENCES, _BOTH
    ),
    "marian": Architecture("MarianMTModel", "MarianConfig", _ENCODER_DECODER, _SEQUENCES, _BOTH),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _ENCODER_DECODER
        | {
            "vocab_size": 60,
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 10,
        },
        "AutoModelForSpeechSeq2Seq",
        _BOTH,
    ),
    "wav2vec2": Architecture(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        _WAVES,
        "AutoModelForCTC",
        {"": 2, "feature_extractor": 2},
    ),
    "hubert": Architecture(
        "HubertForSequenceClassification",
        "HubertConfig",
        _WAVES | {"num_labels": 3, "classifier_proj_size": 8},
        _SOUNDS,
        {"": 2, "feature_extractor": 2},
    ),
    "ast": Architecture(
        "ASTForAudioClassification",
        "ASTConfig",
        _BLOCKS
        | {
            "patch_size": 4,
            "time_stride": 4,
            "frequency_stride": 4,
            "max_length": 16,
            "num_mel_bins": 8,
            "num_labels": 3,
        },
        _SOUNDS,
    ),
    # images
    "vit": Architecture("ViTForImageClassification", "ViTConfig", _VISION, _IMAGES),
    "beit": Architecture("BeitForImageClassification", "BeitConfig", _VISION, _IMAGES),
    "dinov2": Architecture("Dinov2ForImageClassification", "Dinov2Config", _VISION, _IMAGES),
    "vit_mae": Architecture(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        _VISION
        | {
            "decoder_num_attention_heads": 2,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 2,
            "decoder_intermediate_size": 32,
        },
        "AutoModelForPreTraining",
        {"vit": 2, "decoder": 2},
    ),
    "swin": Architecture(
        "SwinForImageClassification",
        "SwinConfig",
        {
            "embed_dim": 8,
            "depths": [1, 2],
            "num_heads": [2, 2],
            "image_size": 16,
            "patch_size": 2,
            "window_size": 2,
        },
        _IMAGES,
        {"": 3},
    ),
    "convnext": Architecture(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1]},
        _IMAGES,
        {"": 5},
    ),
    "resnet": Architecture(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 2, 1, 1]},
        _IMAGES,
        {"": 5},
    ),
    "efficientnet": Architecture(
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {
            "width_coefficient": 0.25,
            "depth_coefficient": 0.3,
            "hidden_dim": 320,
            "image_size": 32,
        },
        _IMAGES,
        {"": 8},
    ),
    "mobilenet_v2": Architecture(
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"depth_multiplier": 0.25},
        _IMAGES,
        {"": 16},
    ),
    "segformer": Architecture(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 2],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "num_attention_heads": [2, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
        "AutoModelForSemanticSegmentation",
        {"": 3},
    ),
    "detr": Architecture(
        "DetrForObjectDetection",
        "DetrConfig",
        {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "out_features": ["stage2"],
            },
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "num_queries": 4,
        },
        "AutoModelForObjectDetection",
        {"": 2, "backbone": 2, "decoder": 2},
    ),
    "sam": Architecture(
        "SamModel",
        "SamConfig",
        {
            "vision_config": {
                "hidden_size": 16,
                "output_channels": 8,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
                "window_size": 2,
                "global_attn_indexes": [1],
                "mlp_dim": 32,
                "num_pos_feats": 4,
            },
            "prompt_encoder_config": {
                "hidden_size": 8,
                "image_size": 16,
                "patch_size": 4,
                "mask_input_channels": 4,
            },
            "mask_decoder_config": {
                "hidden_size": 8,
                "mlp_dim": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 8,
            },
        },
        "AutoModelForMaskGeneration",
        {"vision": 3, "mask_decoder": 2},
    ),
    # several modalities
    "clip": Architecture(
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": _TEXT | _TOKENS | {"max_position_embeddings": 8},
            "vision_config": _VISION | {"num_hidden_layers": 3},
            "projection_dim": 8,
        },
        "AutoModelForZeroShotImageClassification",
        {"text": 2, "vision": 3},
    ),
    "siglip": Architecture(
        "SiglipModel",
        "SiglipConfig",
        {
            "text_config": _TEXT | _TOKENS | {"max_position_embeddings": 8},
            "vision_config": _VISION | {"num_hidden_layers": 3},
        },
        "AutoModelForZeroShotImageClassification",
        {"text": 2, "vision": 3},
    ),
    "clap": Architecture(
        "ClapModel",
        "ClapConfig",
        {
            "text_config": _TEXT,
            "audio_config": {
                "hidden_size": 16,
                "patch_embeds_hidden_size": 8,
                "depths": [1, 1],
                "num_attention_heads": [2, 2],
                "spec_size": 16,
                "window_size": 2,
                "num_mel_bins": 8,
                "patch_size": 2,
                "patch_stride": [2, 2],
            },
            "projection_dim": 8,
        },
        "AutoModel",
        {"text": 2, "audio": 2},
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": _DECODER | {"model_type": "llama"},
            "vision_config": _VISION | {"model_type": "clip_vision_model"},
            "image_token_index": 3,
        },
        _IMAGE_TEXT,
        {"text": 2, "vision": 2},
    ),
    "qwen2_vl": Architecture(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": _DECODER
            | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            "vision_config": {
                "depth": 2,
                "embed_dim": 16,
                "num_heads": 2,
                "hidden_size": 16,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
            "image_token_id": 3,
            "video_token_id": 4,
            "vision_start_token_id": 5,
            "vision_end_token_id": 6,
        },
        _IMAGE_TEXT,
        {"text": 2, "vision": 2},
    ),
    "internvl": Architecture(
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        {
            "text_config": _DECODER | {"model_type": "qwen2"},
            "vision_config": _BLOCKS | {"image_size": [8, 8], "patch_size": [4, 4]},
            "image_token_id": 3,
        },
        _IMAGE_TEXT,
        {"text": 2, "vision": 2},
    ),
    "gemma3": Architecture(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": _DECODER | {"head_dim": 8},
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 3,
            "boi_token_index": 5,
            "eoi_token_index": 6,
        },
        _IMAGE_TEXT,
        {"text": 2, "vision": 2},
    ),
    "blip2": Architecture(
        "Blip2ForConditionalGeneration",
        "Blip2Config",
        {
            "vision_config": _VISION,
            "qformer_config": _TEXT | {"encoder_hidden_size": 16},
            "text_config": _T5 | {"model_type": "t5"},
            "num_query_tokens": 2,
            "image_token_index": 3,
        },
        _IMAGE_TEXT,
        {"vision": 2, "qformer": 2, "text": 2, "text_decoder": 2},
    ),
    "florence2": Architecture(
        "Florence2ForConditionalGeneration",
        "Florence2Config",
        {
            "vision_config": {
                "embed_dim": [8, 8],
                "depths": [1, 2],
                "num_heads": [2, 2],
                "num_groups": [2, 2],
                "patch_size": [3, 3],
                "patch_stride": [2, 2],
                "patch_padding": [1, 1],
                "patch_prenorm": [False, True],
                "window_size": 2,
                "projection_dim": 16,
                "max_position_embeddings": 10,
            },
            "text_config": _ENCODER_DECODER | {"model_type": "bart"},
            "image_token_id": 3,
        },
        _IMAGE_TEXT,
        {"vision": 3, "text": 2, "text_decoder": 2},
    ),
}


@cache
def model_shapes(name: str) -> Shapes:
    """Name -> shape of all parameters of an architecture, made without weights."""
    import torch

    with torch.device("meta"):
        model = ARCHITECTURES[name].build()
    return _shapes((name, parameter.shape) for name, parameter in model.named_parameters())


def _shapes(pairs: Iterable[tuple[str, Iterable[int]]]) -> Shapes:
    return {name: tuple(shape) for name, shape in pairs}
