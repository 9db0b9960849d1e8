"""Tiny configurations of the architectures people train, with random weights: nothing is fetched.

`ARCHITECTURES` maps a name to an `Architecture`: how to build it, a batch by step, and its loss. Those of transformers
are in this file, as data: the model's class, the kind of its inputs, what makes its configuration small. All others are
in `architectures_other.py`. A package is imported when a model of it is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH, VOCABULARY, IMAGE, LABELS = 2, 12, 64, 16, 3


@dataclass(frozen=True)
class Architecture:
    """name: as in tables. package: what must be importable. build: makes the model, drawing from the global generator.
    batch: (model, step) -> batch, the same for the same step. loss: (model, batch) -> scalar. fast: checked by
    default; the others are marked slow. lacking: precisions, or "cast", in which PyTorch itself does not run it on the
    CPU. whole: classes whose modules must not be taken apart by a plan, because of how their code is written."""

    name: str
    package: str
    build: Callable[[], nn.Module]
    batch: Callable[[nn.Module, int], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    fast: bool = False
    lacking: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()


def generator(step: int) -> torch.Generator:
    """What the batch of `step` is drawn from."""
    return torch.Generator().manual_seed(1000 + step)


# Kinds of inputs: (configuration, generator) -> keyword arguments of the model. The model computes its own loss.


def language(config: Any, g: torch.Generator) -> dict[str, Tensor]:
    """Token ids [B, L], which are the labels too."""
    ids = torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=g)
    return {"input_ids": ids, "labels": ids.clone()}


def padded(config: Any, g: torch.Generator) -> dict[str, Tensor]:
    """The same with the second row's end padded, as data collators give it."""
    batch = language(config, g)
    mask = torch.ones_like(batch["input_ids"])
    mask[1, LENGTH - 4 :] = 0
    return {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}


def replaced(config: Any, g: torch.Generator) -> dict[str, Tensor]:
    """Padded token ids and, for each, whether it was replaced."""
    return {**padded(config, g), "labels": torch.randint(0, 2, (BATCH, LENGTH), generator=g)}


def classes(config: Any, g: torch.Generator) -> dict[str, Tensor]:
    """Padded token ids and a label for each row."""
    return {**padded(config, g), "labels": torch.randint(0, config.num_labels, (BATCH,), generator=g)}


def images(config: Any, g: torch.Generator) -> dict[str, Tensor]:
    """Images [B, 3, H, W] and a label for each."""
    labels = torch.randint(0, config.num_labels, (BATCH,), generator=g)
    return {"pixel_values": pixels(g), "labels": labels}


def pixels(g: torch.Generator, size: int = IMAGE) -> Tensor:
    return torch.randn(BATCH, 3, size, size, generator=g)


def segments(config: Any, g: torch.Generator) -> dict[str, Tensor]:
    """Images and a label for each pixel."""
    labels = torch.randint(0, config.num_labels, (BATCH, 32, 32), generator=g)
    return {"pixel_values": pixels(g, 32), "labels": labels}


def boxes(config: Any, g: torch.Generator) -> dict[str, Any]:
    """Images and, for each, two labelled boxes."""
    labels = [{"class_labels": torch.tensor([0, 1]), "boxes": torch.rand(2, 4, generator=g) * 0.4 + 0.1}] * BATCH
    return {"pixel_values": pixels(g, 32), "labels": labels}


def waves(config: Any, g: torch.Generator) -> dict[str, Tensor]:
    """Sound [B, samples] and transcripts of 3 tokens."""
    return {
        "input_values": torch.randn(BATCH, 400, generator=g),
        "labels": torch.randint(1, config.vocab_size, (BATCH, 3), generator=g),
    }


def spectra(config: Any, g: torch.Generator) -> dict[str, Tensor]:
    """Mel spectra [B, bins, frames] and token ids as labels."""
    frames = 2 * config.max_source_positions
    features = torch.randn(BATCH, config.num_mel_bins, frames, generator=g)
    return {"input_features": features, "labels": language(config, g)["labels"]}


def pairs(config: Any, g: torch.Generator) -> dict[str, Any]:
    """Images with texts that end in the end-of-text token."""
    ids = torch.randint(5, VOCABULARY - 1, (BATCH, LENGTH), generator=g)
    ids[:, -1] = VOCABULARY - 1
    return {"input_ids": ids, "pixel_values": pixels(g), "return_loss": True}


# Names that configurations give to the same few sizes.

COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": 2,
}  # fmt: skip
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
      "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}  # fmt: skip
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
          "image_size": IMAGE, "patch_size": 8, "num_labels": LABELS}  # fmt: skip
SPEECH = {
    "vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "ctc_loss_reduction": "mean",
}  # fmt: skip
TOWERS = {
    "text_config": {**COMMON, "eos_token_id": VOCABULARY - 1},
    "vision_config": {k: v for k, v in VISION.items() if k != "num_labels"},
}


def _model(cls: str, config: dict[str, Any]) -> nn.Module:
    import transformers

    model_class = getattr(transformers, cls)
    return model_class(model_class.config_class(**config))


def _transformers(name: str, cls: str, inputs: Callable, config: dict, **options: Any) -> Architecture:
    return Architecture(
        name, "transformers", lambda: _model(cls, config), lambda model, step: inputs(model.config, generator(step)),
        lambda model, batch: model(**batch).loss, **options,
    )  # fmt: skip


_MASKED_BY_QUERY = ("DisentangledSelfAttention", "LongformerSelfAttention")
"""They mask attention scores with the least value of the queries' dtype, which that of the scores may not have."""

TRANSFORMERS = [
    # encoders
    _transformers("BERT", "BertForSequenceClassification", classes, COMMON, fast=True),
    _transformers("RoBERTa", "RobertaForMaskedLM", padded, COMMON),
    _transformers("DistilBERT", "DistilBertForSequenceClassification", classes,
                  {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
                   "max_position_embeddings": 32, "pad_token_id": 0}),
    _transformers("ALBERT", "AlbertForSequenceClassification", classes,
                  {**COMMON, "embedding_size": 16, "num_hidden_groups": 1}, fast=True),
    _transformers("ELECTRA", "ElectraForPreTraining", replaced, {**COMMON, "embedding_size": 16}),
    _transformers("DeBERTa-v2", "DebertaV2ForSequenceClassification", classes,
                  {**COMMON, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
                  whole=_MASKED_BY_QUERY),
    _transformers("MPNet", "MPNetForMaskedLM", padded, COMMON),
    _transformers("ModernBERT", "ModernBertForMaskedLM", padded,
                  {**COMMON, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}),
    _transformers("Longformer", "LongformerForMaskedLM", padded, {**COMMON, "attention_window": 4},
                  whole=_MASKED_BY_QUERY),
    # decoders
    _transformers("GPT-2", "GPT2LMHeadModel", language, GPT2, fast=True),
    _transformers("GPT-Neo", "GPTNeoForCausalLM", language,
                  {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
                   "intermediate_size": 48, "attention_types": [[["global", "local"], 1]], "window_size": 4,
                   "max_position_embeddings": 32,
                   "bos_token_id": 1, "eos_token_id": 2}),
    _transformers("GPT-NeoX", "GPTNeoXForCausalLM", language, COMMON),
    _transformers("GPT-J", "GPTJForCausalLM", language, {**GPT2, "rotary_dim": 4}),
    _transformers("GPT-BigCode", "GPTBigCodeForCausalLM", language, GPT2),
    _transformers("Llama", "LlamaForCausalLM", padded, GROUPED, fast=True),
    _transformers("Mistral", "MistralForCausalLM", language, {**GROUPED, "sliding_window": 8}),
    _transformers("Mixtral", "MixtralForCausalLM", language,
                  {**EXPERTS, "num_local_experts": 4, "output_router_logits": True}, fast=True),
    _transformers("Qwen2", "Qwen2ForCausalLM", language, GROUPED),
    _transformers("Qwen3", "Qwen3ForCausalLM", language, GROUPED),
    _transformers("Qwen3-MoE", "Qwen3MoeForCausalLM", language,
                  {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1}),
    _transformers("Gemma", "GemmaForCausalLM", language, GROUPED),
    _transformers("Gemma 2", "Gemma2ForCausalLM", language, {**GROUPED, "sliding_window": 8}),
    _transformers("Gemma 3", "Gemma3ForCausalLM", language, {**GROUPED, "sliding_window": 8}),
    _transformers("Phi-3", "Phi3ForCausalLM", language, {**COMMON, "num_key_value_heads": 2}),
    _transformers("OLMo 2", "Olmo2ForCausalLM", language, GROUPED),
    _transformers("OPT", "OPTForCausalLM", language,
                  {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                   "ffn_dim": 48, "max_position_embeddings": 32, "word_embed_proj_dim": 16, "pad_token_id": 0,
                   "bos_token_id": 1, "eos_token_id": 2}),
    _transformers("BLOOM", "BloomForCausalLM", language,
                  {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0,
                   "bos_token_id": 1, "eos_token_id": 2}),
    _transformers("Falcon", "FalconForCausalLM", language, {**COMMON, "ffn_hidden_size": 48, "multi_query": True}),
    _transformers("DeepSeek V3", "DeepseekV3ForCausalLM", language,
                  {**COMMON, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                   "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
                   "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
                   "first_k_dense_replace": 1}),
    _transformers("GPT-OSS", "GptOssForCausalLM", language, {**EXPERTS, "num_local_experts": 4, "sliding_window": 8}),
    _transformers("Mamba", "MambaForCausalLM", language,
                  {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2,
                   "time_step_rank": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    _transformers("Mamba-2", "Mamba2ForCausalLM", language,
                  {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "num_heads": 8,
                   "head_dim": 8, "n_groups": 2, "chunk_size": 4, "pad_token_id": 0, "bos_token_id": 1,
                   "eos_token_id": 2}),
    _transformers("RWKV", "RwkvForCausalLM", language,
                  {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48,
                   "context_length": 32, "bos_token_id": 1, "eos_token_id": 2}),
    _transformers("RecurrentGemma", "RecurrentGemmaForCausalLM", language,
                  {**GROUPED, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8}),
    # encoder and decoder
    _transformers("T5", "T5ForConditionalGeneration", language, T5, fast=True),
    _transformers("Switch Transformers", "SwitchTransformersForConditionalGeneration", language,
                  {**T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
                   "num_decoder_layers": 2, "expert_capacity": 8}),
    _transformers("BART", "BartForConditionalGeneration", padded, SEQ2SEQ),
    _transformers("Pegasus", "PegasusForConditionalGeneration", language, SEQ2SEQ),
    _transformers("Marian", "MarianMTModel", language, SEQ2SEQ),
    # images
    _transformers("ViT", "ViTForImageClassification", images, VISION),
    _transformers("DeiT", "DeiTForImageClassification", images, VISION),
    _transformers("BEiT", "BeitForImageClassification", images,
                  {**VISION, "use_relative_position_bias": True, "use_mask_token": False}),
    _transformers("DINOv2", "Dinov2ForImageClassification", images, {**VISION, "mlp_ratio": 2}),
    _transformers("Swin", "SwinForImageClassification", images,
                  {"image_size": IMAGE, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4],
                   "window_size": 4, "num_labels": LABELS}, fast=True),
    _transformers("ConvNeXt", "ConvNextForImageClassification", images,
                  {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "patch_size": 2,
                   "num_labels": LABELS}),
    _transformers("ResNet", "ResNetForImageClassification", images,
                  {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": LABELS}),
    _transformers("SegFormer", "SegformerForSemanticSegmentation", segments,
                  {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
                   "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
                   "decoder_hidden_size": 16, "num_labels": LABELS}),
    _transformers("DETR", "DetrForObjectDetection", boxes,
                  {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "d_model": 32,
                   "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
                   "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 4,
                   "num_labels": LABELS,
                   "backbone_config": {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32],
                                       "depths": [1, 1], "out_features": ["stage2"]}},
                  lacking=("cast",)),
    # sound
    _transformers("Whisper", "WhisperForConditionalGeneration", spectra,
                  {**{k: v for k, v in SEQ2SEQ.items() if k not in ("max_position_embeddings", "forced_eos_token_id")},
                   "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 32,
                   "suppress_tokens": [], "begin_suppress_tokens": []}),
    _transformers("Wav2Vec2", "Wav2Vec2ForCTC", waves, {**SPEECH, "num_feat_extract_layers": 3}, fast=True),
    _transformers("HuBERT", "HubertForCTC", waves, {**SPEECH, "num_feat_extract_layers": 3}),
    # images with texts
    _transformers("CLIP", "CLIPModel", pairs, {**TOWERS, "projection_dim": 16}, fast=True),
    _transformers("SigLIP", "SiglipModel", pairs, TOWERS),
]  # fmt: skip


def _all() -> dict[str, Architecture]:
    others = importlib.import_module("architectures_other").OTHERS
    return {a.name: a for a in (*TRANSFORMERS, *others)}


def __getattr__(name: str) -> dict[str, Architecture]:
    if name != "ARCHITECTURES":
        raise AttributeError(name)
    return _all()
