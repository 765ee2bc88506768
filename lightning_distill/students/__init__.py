"""Students: made of a teacher, smaller, with its weights, or drawn anew.

Here belongs what makes or initialises a model that will learn. How it learns belongs into ``objectives/`` and
``module.py``; loading and saving into ``models/``.
"""

from lightning_distill.students.from_teacher import student_from_teacher
from lightning_distill.students.layer_map import layer_map

__all__ = ["layer_map", "student_from_teacher"]
