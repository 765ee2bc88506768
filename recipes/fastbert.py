r"""Early exit: ramps on a text classifier and on its distilled student, and how much faster both are for it (FastBERT).

python recipes/fastbert.py --model.teacher <folder or hub id> --model.num_layers 3 \
    --data.train_file train.tsv --data.val_file dev.tsv --data.test_file test.tsv --trainer.max_epochs 1

Teacher, student and default text are those of recipes/distilbert.py. Then ramps and all layers learn together what the
model answered before, so that low layers become good at the task; with --model.ramp_training self_distill only ramps
move. Thresholds: with 95 % confidence at most --model.max_drop of the accuracy is lost, or nothing leaves early.

Writes early_exit_teacher/ and early_exit_student/ (for EarlyExitModel.from_pretrained) beside what the others write.
Source: Liu et al., "FastBERT: a Self-distilling BERT with Adaptive Inference Time", 2020.
"""

import copy
import time
from typing import Literal

import lightning as L

from lightning_distill import DistillationModule, cli, student_from_teacher
from lightning_distill.callbacks import EarlyExit
from lightning_distill.data import TextClassificationData
from lightning_distill.early_exit import EarlyExitModel
from lightning_distill.measure import latency_ms
from lightning_distill.models.pretrained import load_pretrained
from lightning_distill.objectives import HardLabel, SoftTarget


@cli.command()
def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    parser = cli.text_parser(__doc__, output_dir="runs/fastbert")
    parser.add_argument("--model.exits", type=str, default="all", help="layers with a ramp: all or every_<n>")
    kinds, text = Literal["joint", "self_distill"], "what learns: all layers and ramps, or ramps"
    parser.add_argument("--model.ramp_training", type=kinds, default="joint", help=text)
    parser.add_argument("--model.ramp_epochs", type=int | None, help="epochs of the ramps (default: the student's)")
    parser.add_argument("--model.max_drop", type=float, default=0.02, help="accuracy that may be lost")
    flags = parser.parse_args(argv)

    with cli.one_line_errors():  # what is wrong is said in one line, before anything is written
        cli.check_flags(flags, "early_exit_teacher", "early_exit_student")
        L.seed_everything(flags.seed, workers=True, verbose=False)
        if cli.names_nothing(flags):  # docstrings, and a small BERT that has yet to learn them
            data, teacher = cli.embedded_text(flags)
            cli.set_defaults(flags, lr=1e-3, max_epochs=2, teacher_epochs=4)
        else:
            data = TextClassificationData(**flags.data.as_dict(), seed=flags.seed)
            teacher = cli.with_new_head(flags, data) or load_pretrained(flags.model.teacher, "--model.teacher")
            cli.align(flags, data, teacher)  # one tokenizer; class 1 of the data is class 1 of the teacher
            cli.set_defaults(flags, lr=8e-5, max_epochs=3, teacher_epochs=3, rows=data)
        data.setup()

        def new_student():  # half of the teacher's layers, with its weights, unless flags say otherwise
            L.seed_everything(flags.seed, workers=True, verbose=False)
            if flags.model.student is not None:
                return cli.named_student(flags, teacher, data)
            return student_from_teacher(teacher, **cli.student_size(flags, teacher))

        student, labels = new_student(), [HardLabel(**data.label_weights)]
        objectives = cli.objectives_of(flags, data, [SoftTarget(temperature=2.0, weight=0.7), HardLabel(weight=0.3)])
        cli.check_ramps(flags, data, teacher, student)
        cli.dry_run(flags, data, teacher, student, objectives)
        cli.begin_run(flags, data, teacher)

    # Teacher and student, as in recipes/distilbert.py.
    monitor, models, scores, found = cli.monitor_of(flags, data), {"teacher": teacher}, {}, {}
    trainer = L.Trainer(**cli.trainer_arguments(flags, "teacher", monitor=monitor))
    module = DistillationModule(None, teacher, labels, **cli.module_arguments(flags, data, trainer, with_teacher=False))
    if cli.trains_teacher(flags):
        cli.begin_training(flags, "teacher", teacher)
        trainer.fit(module, datamodule=data, ckpt_path=cli.resume_from(flags, "teacher"))
        cli.load_best(module, trainer)
        if trainer.is_global_zero:
            module.export(flags.output_dir / "teacher")
        student = new_student()  # of what the teacher knows now
    (scores["teacher"],) = L.Trainer(**cli.trainer_arguments(flags)).test(module, data, verbose=False)
    imitated = cli.in_own_precision(flags, teacher)
    learning = {"student": (student, objectives)}
    if flags.model.baseline:
        learning[cli.BASELINE] = (new_student(), labels)
    for name, (student, objectives) in learning.items():
        cli.begin_training(flags, name, student)
        trainer = L.Trainer(**cli.trainer_arguments(flags, name, monitor=monitor))
        module = DistillationModule(imitated, student, objectives, **cli.module_arguments(flags, data, trainer))
        trainer.fit(module, datamodule=data, ckpt_path=cli.resume_from(flags, name))
        cli.load_best(module, trainer)
        (scores[name],) = L.Trainer(**cli.trainer_arguments(flags)).test(module, data, verbose=False)
        if trainer.is_global_zero:
            module.export(flags.output_dir / name)
        models[name] = student

    # Ramps on a copy of each: the report is of the models without. Jointly, the model as it was teaches all of it.
    joint = flags.model.ramp_training == "joint"
    how = {"teacher_weight": 1.0, "temperature": 2.0} if joint else {}
    memory = {"gradient_checkpointing": joint and flags.model.gradient_checkpointing}
    for name, key in (("teacher", "early_exit"), ("student", "early_exit_student")):
        model, phase = copy.deepcopy(models[name]).requires_grad_(True), f"early_exit_{name}"
        cli.begin_ramps(flags, name)
        ramps = EarlyExit(flags.model.exits, training=flags.model.ramp_training, lr=1e-3, **how)  # small and new ones
        trainer = L.Trainer(**cli.trainer_arguments(flags, phase, callbacks=[ramps]))
        taught = (models[name], model, [SoftTarget(temperature=2.0)]) if joint else (None, model, labels)
        options = cli.module_arguments(flags, data, trainer, with_teacher=False)
        module = DistillationModule(*taught, **options | memory)
        trainer.fit(module, datamodule=data, ckpt_path=cli.resume_from(flags, phase))
        if trainer.is_global_zero:  # thresholds by the validation rows, what they cost and save by the test rows
            early = EarlyExitModel(model.to(trainer.strategy.root_device))
            report = early.calibrate(data.val_dataloader(), max_drop=flags.model.max_drop)
            report.write(early, early.save_pretrained(flags.output_dir / phase, data.tokenizer))
            found[key] = cli.measure_ramps(flags, data, early, model, report, scores[name])

    if trainer.is_global_zero:
        seconds, batches = time.perf_counter() - started, cli.test_batches(flags, data)  # of 1 row and of 32 rows
        timing = {"device": trainer.strategy.root_device, "progress": cli.shows_progress(flags)}
        latency = {size: latency_ms(models, some, **timing) for size, some in batches.items()}
        cli.report_task(flags, data, models, scores, latency, seconds=seconds, **found)


if __name__ == "__main__":
    main()
