"""The text that a recipe of text classifiers takes where nothing is named, and a model for it."""

import transformers

from lightning_distill.cli.parser import Flags
from lightning_distill.data import TextClassificationData

_ROWS_PER_CLASS = 700


def embedded_text(flags: Flags) -> tuple[TextClassificationData, transformers.PreTrainedModel]:
    """Text of the installed packages, labelled by the package, and an untrained small BERT for it."""
    data = TextClassificationData.embedded(max_rows_per_class=_ROWS_PER_CLASS, seed=flags.seed, **flags.data.as_dict())
    assert isinstance(data.tokenizer, transformers.PreTrainedTokenizerBase)
    bert = transformers.BertConfig(
        vocab_size=len(data.tokenizer),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=max(128, data.max_length),
        pad_token_id=data.tokenizer.pad_token_id,
        id2label=data.id2label,
        label2id=data.label2id,
    )
    return data, transformers.BertForSequenceClassification(bert)
