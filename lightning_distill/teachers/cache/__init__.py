"""A teacher's answers on disk: by the content of the rows, whole or refused, for any number of runs at once.

Here belongs how rows are known again, written, read and described. What a person adds to a Trainer is
``callbacks.TeacherCache``.
"""

from lightning_distill.teachers.cache.row_keys import row_keys
from lightning_distill.teachers.cache.signals import CacheCount, CachedSignals, KeptSignals
from lightning_distill.teachers.cache.store import SignalStore
from lightning_distill.teachers.cache.teacher import cached_teacher

__all__ = ["CacheCount", "CachedSignals", "KeptSignals", "SignalStore", "cached_teacher", "row_keys"]
