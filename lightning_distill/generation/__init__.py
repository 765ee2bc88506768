"""Text that models write: for a student to learn from, and with the student as its teacher's draft.

Here belongs sampling and what trains or measures on it. Reading text that is there belongs into ``data/``.
"""

from lightning_distill.generation.on_policy import OnPolicyDistillation
from lightning_distill.generation.sampling import generate
from lightning_distill.generation.sequence_level import teacher_documents
from lightning_distill.generation.speculative import Speculation, speculative

__all__ = ["OnPolicyDistillation", "Speculation", "generate", "speculative", "teacher_documents"]
