"""The command line: flags from signatures, the Trainer they describe, resuming, one-line errors, reports.

Here belongs what nobody wants to read in a recipe, as plain functions. What a recipe teaches (data, models, objectives,
the fit) belongs into the recipe; nothing outside ``recipes/`` and ``__main__`` imports this room. A recipe of a new
task takes :func:`task_parser` with its data module: metric, head, report and checks follow from the data's ``task``.
"""

from lightning_distill.cli.dry_run import dry_run
from lightning_distill.cli.embedded import embedded_digits, embedded_names, embedded_text
from lightning_distill.cli.flags import (
    BASELINE,
    check_flags,
    language_parser,
    names_nothing,
    set_defaults,
    task_parser,
    text_parser,
    trains_teacher,
)
from lightning_distill.cli.language import (
    check_lengths,
    embedded_documents,
    measure_draft,
    on_policy_arguments,
    prompts_of,
    report_language,
    sampling,
    writer,
)
from lightning_distill.cli.models import align, in_own_precision, named_student, student_size, with_new_head
from lightning_distill.cli.ramps import begin_ramps, check_ramps, measure_ramps
from lightning_distill.cli.run_folder import begin_run, command, resume_from
from lightning_distill.cli.screen import begin_training, one_line_errors, quiet, say, shows_progress
from lightning_distill.cli.task import metric_of, metrics_of, monitor_of, report_task, test_batches
from lightning_distill.cli.trainer import (
    build_callbacks,
    load_best,
    module_arguments,
    objectives_of,
    trainer_arguments,
)

__all__ = [
    "BASELINE",
    "align",
    "begin_ramps",
    "begin_run",
    "begin_training",
    "build_callbacks",
    "check_flags",
    "check_lengths",
    "check_ramps",
    "command",
    "dry_run",
    "embedded_digits",
    "embedded_documents",
    "embedded_names",
    "embedded_text",
    "in_own_precision",
    "language_parser",
    "load_best",
    "measure_draft",
    "measure_ramps",
    "metric_of",
    "metrics_of",
    "module_arguments",
    "monitor_of",
    "named_student",
    "names_nothing",
    "objectives_of",
    "on_policy_arguments",
    "one_line_errors",
    "prompts_of",
    "quiet",
    "report_language",
    "report_task",
    "resume_from",
    "sampling",
    "say",
    "set_defaults",
    "shows_progress",
    "student_size",
    "task_parser",
    "test_batches",
    "text_parser",
    "trainer_arguments",
    "trains_teacher",
    "with_new_head",
    "writer",
]
