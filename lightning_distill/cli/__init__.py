"""The command line: flags from signatures, the Trainer they describe, resuming, one-line errors, reports.

Here belongs what nobody wants to read in a recipe. What a recipe teaches (data, models, objectives, the fit) belongs
into the recipe; nothing outside ``recipes/`` and ``__main__`` imports this room.
"""

from lightning_distill.cli.run_folder import begin_run, end_run, resume_from, run_command, say
from lightning_distill.cli.trainer import (
    best_checkpoint,
    build_callbacks,
    make_trainer,
    one_line_errors,
    optimizer_from_flags,
    quiet,
    recipe_parser,
    schedule_from_flags,
)

__all__ = [
    "begin_run",
    "best_checkpoint",
    "build_callbacks",
    "end_run",
    "make_trainer",
    "one_line_errors",
    "optimizer_from_flags",
    "quiet",
    "recipe_parser",
    "resume_from",
    "run_command",
    "say",
    "schedule_from_flags",
]
