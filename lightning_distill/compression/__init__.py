"""Techniques that make a model smaller without training it, one file each: model in, model out.

Here belongs what takes a trained model and gives one that is smaller and nearly the same: it may be used before a
distillation or after it. Students that will learn are made in ``students/``; fewer bits are in ``quantization/``.
"""

from lightning_distill.compression.vocabulary import PrunedVocabulary, prune_vocabulary

__all__ = ["PrunedVocabulary", "prune_vocabulary"]
