"""Data for distillation: text from files, from the hub or embedded, and batches whose order can be resumed."""

from lightning_distill.data.embedded import embedded_corpus, train_causal_tokenizer, train_tokenizer
from lightning_distill.data.language import LanguageModelData
from lightning_distill.data.packing import Document, PackedText
from lightning_distill.data.sampler import BucketBatchSampler, ResumableDataLoader
from lightning_distill.data.text import TextClassificationData

__all__ = [
    "BucketBatchSampler",
    "Document",
    "LanguageModelData",
    "PackedText",
    "ResumableDataLoader",
    "TextClassificationData",
    "embedded_corpus",
    "train_causal_tokenizer",
    "train_tokenizer",
]
