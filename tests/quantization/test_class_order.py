"""A checkpoint fills no model whose classes have another order."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from lightning_distill.quantization import load, quantize, save


def model(*names: str) -> BertForSequenceClassification:
    sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    return BertForSequenceClassification(BertConfig(num_attention_heads=2, **sizes, **classes)).eval()


def test_a_model_of_another_order_of_classes_is_refused(tmp_path: Path) -> None:
    batch = {"input_ids": torch.randint(1, 20, (8, 8))}
    quantized, _ = quantize(model("no", "maybe", "yes"), [batch], bits=8, group_size=32)
    save(quantized, tmp_path / "q")
    with pytest.raises(ValueError, match=r"`model` to have the classes of .* in their order"):
        load(tmp_path / "q", model("yes", "no", "maybe"))
    filled = load(tmp_path / "q", model("No", "maybe", "yes"))
    with torch.no_grad():
        torch.testing.assert_close(filled(**batch).logits, quantized(**batch).logits)
