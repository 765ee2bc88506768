"""Data for distillation: text from files, from the hub or embedded, and batches whose order can be resumed.

Here belongs what reads, tokenises, buckets and packs, as LightningDataModules. What a batch means belongs into
``tasks/``; what writes text with a model into ``generation/``. A data module of rows is a :class:`RowData`: it says
which columns it reads and makes a dataset of a table; files, hub, splits, class names and loaders are there.
"""

from lightning_distill.data.embedded import embedded_corpus, train_causal_tokenizer, train_tokenizer
from lightning_distill.data.image import ImageData
from lightning_distill.data.language import LanguageModelData
from lightning_distill.data.packing import Document, PackedText
from lightning_distill.data.rows import RowData
from lightning_distill.data.sampler import BucketBatchSampler, ResumableDataLoader
from lightning_distill.data.sequence_to_sequence import SequenceToSequenceData
from lightning_distill.data.text import TextClassificationData
from lightning_distill.data.token_classification import TokenClassificationData

__all__ = [
    "BucketBatchSampler",
    "Document",
    "ImageData",
    "LanguageModelData",
    "PackedText",
    "ResumableDataLoader",
    "RowData",
    "SequenceToSequenceData",
    "TextClassificationData",
    "TokenClassificationData",
    "embedded_corpus",
    "train_causal_tokenizer",
    "train_tokenizer",
]
