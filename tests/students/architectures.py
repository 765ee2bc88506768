"""Every architecture that students are made of by following a forward: a class, and a small config of it."""

from typing import Any

import torch
import transformers

_TEXT = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip
_DECODER = {**_TEXT, "num_key_value_heads": 2}
_IMAGE = {
    "image_size": 16, "patch_size": 4,
    **{k: v for k, v in _TEXT.items() if k not in ("vocab_size", "max_position_embeddings", "pad_token_id")},
}  # fmt: skip
_BART = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 1, "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
_MODERN = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

#: Name -> class, prefix of its config's name, and what is said in it.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "Bert", _TEXT),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBert",
        {"vocab_size": 99, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64},
    ),
    "roberta": ("RobertaForMaskedLM", "Roberta", _TEXT),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", "XLMRoberta", _TEXT),
    "camembert": ("CamembertForSequenceClassification", "Camembert", _TEXT),
    "electra": ("ElectraForSequenceClassification", "Electra", {**_TEXT, "embedding_size": 16}),
    "albert": (
        "AlbertForSequenceClassification",
        "Albert",
        {**_TEXT, "embedding_size": 16, "num_hidden_groups": 4},
    ),
    "mpnet": ("MPNetForSequenceClassification", "MPNet", _TEXT),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2",
        {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16},
    ),
    "modernbert": ("ModernBertForSequenceClassification", "ModernBert", {**_TEXT, **_MODERN}),
    "t5": ("T5ForConditionalGeneration", "T5", _T5),
    "t5-gated": ("T5ForConditionalGeneration", "T5", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "bart": ("BartForConditionalGeneration", "Bart", _BART),
    "marian": ("MarianMTModel", "Marian", _BART),
    "gpt2": ("GPT2LMHeadModel", "GPT2", {"vocab_size": 99, "n_embd": 32, "n_layer": 4, "n_head": 4}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoX", _TEXT),
    "opt": ("OPTForCausalLM", "OPT", {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "llama": ("LlamaForCausalLM", "Llama", _DECODER),
    "mistral": ("MistralForCausalLM", "Mistral", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3", {**_DECODER, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2", {**_DECODER, "head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3Text", {**_DECODER, "head_dim": 8}),
    "phi3": ("Phi3ForCausalLM", "Phi3", _DECODER),
    "granite": ("GraniteForCausalLM", "Granite", _DECODER),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3", _DECODER),
    "mixtral": ("MixtralForCausalLM", "Mixtral", {**_DECODER, "num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3Moe",
        {**_DECODER, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "vit": ("ViTForImageClassification", "ViT", _IMAGE),
    "deit": ("DeiTForImageClassification", "DeiT", _IMAGE),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNext",
        {"hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2, "image_size": 32},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "Whisper",
        {**_BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 16},
    ),
    "clip": (
        "CLIPModel",
        "CLIP",
        {"text_config": {**_TEXT, "eos_token_id": 2}, "vision_config": _IMAGE, "projection_dim": 16},
    ),
}


def build(name: str) -> Any:
    """A model whose weights are all of their own: norms of ones and biases of zeros would hide a wrong slice."""
    kind, config, options = CASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, f"{config}Config")(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue  # Marian computes its positions and does not save them
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def example(model: Any) -> dict[str, torch.Tensor]:
    """Inputs of a forward."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (2, 7), generator=generator)
    name = type(model).__name__
    if name.startswith("Whisper"):
        return {"input_features": torch.randn(2, 8, 40, generator=generator), "decoder_input_ids": ids}
    if name.endswith("ForImageClassification"):
        size = model.config.image_size
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    if name == "CLIPModel":
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {"input_ids": ids, **({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})}


def answer(model: Any) -> torch.Tensor:
    """What it answers: logits, of CLIP those of pictures and texts."""
    output = model(**example(model))
    logits: torch.Tensor = output.logits_per_image if hasattr(output, "logits_per_image") else output.logits
    return logits
