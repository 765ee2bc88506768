"""The rows that a recipe takes where nothing is named, and a model for them that has yet to learn."""

import transformers

from lightning_distill.cli.parser import Flags
from lightning_distill.data import ImageData, RowData, TextClassificationData, TokenClassificationData
from lightning_distill.models.cifar_resnet import CifarResNet
from lightning_distill.tasks import TASKS

_ROWS_PER_CLASS = 700
_STATEMENTS = 3000


def embedded_text(flags: Flags) -> tuple[TextClassificationData, transformers.PreTrainedModel]:
    """Text of the installed packages, labelled by the package, and an untrained small BERT for it."""
    data = TextClassificationData.embedded(max_rows_per_class=_ROWS_PER_CLASS, seed=flags.seed, **flags.data.as_dict())
    return data, transformers.BertForSequenceClassification(_small_bert(data, data.max_length))


def embedded_names(flags: Flags) -> tuple[TokenClassificationData, transformers.PreTrainedModel]:
    """Statements of the installed packages, their names tagged by role, and an untrained small BERT for them."""
    data = TokenClassificationData.embedded(max_rows=_STATEMENTS, seed=flags.seed, **flags.data.as_dict())
    return data, transformers.BertForTokenClassification(_small_bert(data, data.max_length))


def embedded_digits(flags: Flags) -> tuple[ImageData, CifarResNet]:
    """Handwritten digits of scikit-learn, and an untrained ResNet-20 for them."""
    data = ImageData.embedded(seed=flags.seed, **flags.data.as_dict())
    return data, CifarResNet(20, len(data.label_names), data.channels, data.label_names)


def _small_bert(data: RowData, max_length: int) -> transformers.BertConfig:
    assert isinstance(data.tokenizer, transformers.PreTrainedTokenizerBase)
    return transformers.BertConfig(
        vocab_size=len(data.tokenizer),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=max(128, max_length),
        pad_token_id=data.tokenizer.pad_token_id,
        id2label=data.id2label,
        label2id=data.label2id,
        problem_type=TASKS[data.task].problem_type,  # type: ignore[arg-type]
    )
