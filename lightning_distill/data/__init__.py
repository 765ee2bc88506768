"""Data for distillation: text from files, from the hub or embedded, and batches whose order can be resumed."""

from lightning_distill.data.embedded import embedded_corpus, train_tokenizer
from lightning_distill.data.sampler import BucketBatchSampler, ResumableDataLoader
from lightning_distill.data.text import TextClassificationData

__all__ = [
    "BucketBatchSampler",
    "ResumableDataLoader",
    "TextClassificationData",
    "embedded_corpus",
    "train_tokenizer",
]
