"""Teachers: frozen, in a precision of their own, several as one, or answered from the disk.

A teacher is what gives the signals of a batch with its classes in its own order; what stands in its place (a cache, a
committee) does the same. Nothing here knows the student or an objective.
"""

from lightning_distill.teachers.ensemble import TeacherEnsemble
from lightning_distill.teachers.module import freeze
from lightning_distill.teachers.precision import TeacherPrecision, load_teacher

__all__ = ["TeacherEnsemble", "TeacherPrecision", "freeze", "load_teacher"]
