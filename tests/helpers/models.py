"""Tiny transformers models and batches, from configs alone."""

from typing import Any

import torch
import transformers
from torch import Tensor

from lightning_distill.models.embedding import EmbeddingModel

VOCAB = 64
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    # GPT-2 and DistilBERT call the same things by other names.
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def bert(head: str = "SequenceClassification", *, layers: int = 2, **config: Any) -> transformers.BertPreTrainedModel:
    """A tiny BERT with a head."""
    full = transformers.BertConfig(**{**SMALL, "num_hidden_layers": layers, **config})
    model: transformers.BertPreTrainedModel = getattr(transformers, f"BertFor{head}")(full)
    return model


def llama(*, layers: int = 2, **config: Any) -> transformers.LlamaForCausalLM:
    """A tiny Llama with grouped-query attention."""
    settings = {**SMALL, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, **config}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))


def seq2seq(kind: str = "T5", *, layers: int = 2, **config: Any) -> transformers.PreTrainedModel:
    """A tiny encoder-decoder: T5, Bart, Marian, MBart, Pegasus and others of their kinds."""
    sizes = {"vocab_size": VOCAB, "d_model": 16, "pad_token_id": 0, "eos_token_id": 2}
    if kind == "T5":
        settings = {"d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": layers, "decoder_start_token_id": 0}
        settings |= {"dropout_rate": 0.0}
    else:
        stacks = {f"{stack}_{name}": value for stack in ("encoder", "decoder")
                  for name, value in (("layers", layers), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
        settings = {**stacks, "max_position_embeddings": 32, "bos_token_id": 1, "decoder_start_token_id": 2}
        settings |= {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
        settings |= {"decoder_vocab_size": VOCAB} if kind == "Marian" else {}
    full = getattr(transformers, f"{kind}Config")(**{**sizes, **settings, **config})
    name = "MTModel" if kind == "Marian" else "ForConditionalGeneration"
    model: transformers.PreTrainedModel = getattr(transformers, f"{kind}{name}")(full)
    return model


def tokens(rows: int = 4, length: int = 8, *, seed: int = 0) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` with rows of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    lengths = torch.randint(3, length + 1, (rows,), generator=generator)
    mask = torch.arange(length) < lengths[:, None]
    return {"input_ids": input_ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def embedder(*, layers: int = 2, **config: Any) -> Any:
    """A tiny BERT that gives embeddings."""
    full = transformers.BertConfig(**{**SMALL, "num_hidden_layers": layers, "initializer_range": 0.5, **config})
    return EmbeddingModel.of(transformers.BertModel(full))


def texts(rows: int = 4, several: int = 2, length: int = 8, *, seed: int = 0) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of rows of several texts, labels of each but the first."""
    made = {name: x.view(rows, several, length) for name, x in tokens(rows * several, length, seed=seed).items()}
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.rand(rows, several - 1, generator=generator)
    return {**made, "labels": labels.squeeze(1) if several == 2 else labels}


def segformer(*, layers: int = 2, **config: Any) -> transformers.SegformerForSemanticSegmentation:
    """A tiny SegFormer, whose logits are a quarter as wide and high as the picture."""
    sizes = {"num_encoder_blocks": 2, "depths": [1, layers - 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
    sizes |= {"num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16}
    sizes |= {"patch_sizes": [7, 3], "strides": [4, 2]}
    drawn = dict.fromkeys(("drop_path_rate", "classifier_dropout_prob", "hidden_dropout_prob"), 0.0)
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**{**sizes, **drawn, **config}))


def pictures(rows: int = 4, *, classes: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """``pixel_values`` and a class for each pixel, 255 where it does not count."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows, 16, 24), generator=generator)
    void = torch.rand(labels.shape, generator=generator) < 0.1
    return {"pixel_values": torch.randn(rows, 3, 16, 24, generator=generator), "labels": labels.masked_fill(void, 255)}


def batch(task: str, rows: int = 4, length: int = 8, *, classes: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A batch of a task, with labels."""
    made = tokens(rows, length, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    real = made["attention_mask"].bool()
    if task == "classification":
        labels = torch.randint(0, classes, (rows,), generator=generator)
    elif task == "multi_label":
        labels = torch.randint(0, 2, (rows, classes), generator=generator).float()
    elif task == "regression":
        labels = torch.randn(rows, generator=generator)
    elif task == "token_classification":
        labels = torch.randint(0, classes, (rows, length), generator=generator).masked_fill(~real, -100)
    elif task == "seq2seq_lm":
        target = tokens(rows, length - 2, seed=seed + 1)
        labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
    elif task == "masked_lm":
        chosen = real & (torch.rand(rows, length, generator=generator) < 0.5)
        chosen[:, 0] = True
        labels = made["input_ids"].masked_fill(~chosen, -100)
    else:
        labels = made["input_ids"].masked_fill(~real, -100)
    return {**made, "labels": labels}
