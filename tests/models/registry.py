"""Every architecture of transformers that tests go through by name, one row each, and a small model of it."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from tests.helpers.models import SMALL

TEXT = ("SequenceClassification", "TokenClassification")


@dataclass(frozen=True)
class Row:
    """What a config needs beside the sizes that all have, and the heads, the usual one first."""

    heads: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    #: Whether `student_from_teacher` makes students of it, ramps leave early from it, and its attention is recorded.
    has_students: bool = True
    has_exits: bool = True
    has_attention: bool = True


#: By the prefix of the classes' names.
ARCHITECTURES = {
    "Bert": Row((*TEXT, "MaskedLM")),
    "DistilBert": Row((*TEXT, "MaskedLM"), {"hidden_dim": 32}),
    "Roberta": Row((*TEXT, "MaskedLM"), {"max_position_embeddings": 40}),
    "Electra": Row((*TEXT, "MaskedLM"), {"embedding_size": 8}),
    "ModernBert": Row((*TEXT, "MaskedLM"), {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}),
    "DebertaV2": Row(
        (*TEXT, "MaskedLM"),
        {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]},
        has_students=False,
        has_attention=False,
    ),
    "GPT2": Row((*TEXT, "CausalLM"), {"n_positions": 32}),
    "Llama": Row((*TEXT, "CausalLM"), {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "Qwen3": Row((*TEXT, "CausalLM"), {"num_key_value_heads": 1, "head_dim": 8}),
    "T5": Row(
        ("ConditionalGeneration",),
        {"d_kv": 8, "d_ff": 32, "decoder_start_token_id": 0},
        has_students=False,
        has_exits=False,
    ),
    "Bart": Row(
        ("ConditionalGeneration",),
        {"decoder_layers": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
        has_students=False,
        has_exits=False,
    ),
    "ViT": Row(("ImageClassification",), {"image_size": 8, "patch_size": 2}, has_students=False, has_exits=False),
}


def build(name: str, head: str | None = None, *, layers: int = 2, **config: Any) -> Any:
    """A small model with a head; the first of its row where none is named."""
    row = ARCHITECTURES[name]
    head = row.heads[0] if head is None else head
    settings = {**SMALL, "num_hidden_layers": layers, **row.config, **config}
    full = getattr(transformers, f"{name}Config")(**settings)
    of_gpt2 = (name, head) == ("GPT2", "CausalLM")
    return getattr(transformers, "GPT2LMHeadModel" if of_gpt2 else f"{name}For{head}")(full)


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Two rows for any of them, the second padded where there are words."""
    torch.manual_seed(1)
    if name == "ViT":
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    ids = torch.randint(3, SMALL["vocab_size"], (2, 10))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch | {"decoder_input_ids": ids} if name in ("T5", "Bart") else batch
