r"""Distil a text classifier: take a teacher, make a student of fewer layers, measure both side by side.

python recipes/distilbert.py
    Real text that every installation has (docstrings, labelled by their package), a teacher trained on the spot,
    a student of half its layers. No network, no file, a few minutes on 2 cores.

python recipes/distilbert.py --model.teacher <folder or hub id> --model.num_layers 3 \
    --data.train_file train.tsv --data.val_file dev.tsv --data.test_file test.tsv \
    --data.text_columns sentence --data.label_column label --trainer.max_epochs 1
    Your own teacher and data; where a row has several labels, --data.label_separator "," too. Every --trainer.* flag is
    the Trainer's. With --gptq.bits 4 the student is quantised in the end, to student-gptq/. Callbacks, optimizer and
    schedule are flags too: see docs/optimization.md. After a crash, a kill or Ctrl-C: the same command with --resume,
    see docs/reliability.md.

Writes to --output_dir: student/ (for from_pretrained), summary.json, curves.png, checkpoints/, logs/.
"""

import copy
import time

import lightning as L

from lightning_distill import DistillationModule, cli, student_from_teacher
from lightning_distill.callbacks import GPTQ
from lightning_distill.data import TextClassificationData
from lightning_distill.measure import latency_ms
from lightning_distill.models.pretrained import load_pretrained
from lightning_distill.objectives import HardLabel, SoftTarget
from lightning_distill.quantization import load, use_kernels


@cli.command()
def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    flags = cli.text_parser(__doc__, output_dir="runs/distilbert").parse_args(argv)

    with cli.one_line_errors():  # what is wrong is said in one line, before anything is written
        cli.check_flags(flags)
        L.seed_everything(flags.seed, workers=True, verbose=False)

        # A batch is input_ids and attention_mask [B, T] and labels [B]; the teacher makes logits [B, classes] of it.
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

        student = new_student()
        # The teacher's probabilities, softened by the temperature, and the labels (Hinton et al., 2015).
        mixed = [SoftTarget(temperature=2.0, weight=0.7), HardLabel(weight=0.3)]
        objectives = cli.objectives_of(flags, data, mixed)  # or those of --objectives
        cli.dry_run(flags, data, teacher, student, objectives)
        cli.begin_run(flags, data, teacher)

    monitor = cli.monitor_of(flags, data)  # the epoch that is best by it, on the validation rows, is the one that stays
    models, scores = {"teacher": teacher}, {}

    # The teacher, where it does not know its task yet. A module without a teacher learns from labels: fine-tuning.
    trainer = L.Trainer(**cli.trainer_arguments(flags, "teacher", monitor=monitor))
    labels = [HardLabel(**data.label_weights)]
    module = DistillationModule(None, teacher, labels, **cli.module_arguments(flags, data, trainer, with_teacher=False))
    if cli.trains_teacher(flags):
        cli.begin_training(flags, "teacher", teacher)
        trainer.fit(module, datamodule=data, ckpt_path=cli.resume_from(flags, "teacher"))
        cli.load_best(module, trainer)
        if trainer.is_global_zero:
            module.export(flags.output_dir / "teacher")
        student = new_student()  # of what the teacher knows now
    (scores["teacher"],) = L.Trainer(**cli.trainer_arguments(flags)).test(module, data, verbose=False)

    # The student, and where the flags ask for it the same one on labels alone: what distillation has to beat.
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

    # The student in few bits, calibrated on training rows: written to student-gptq/, and tested as it is read again.
    if flags.gptq.bits is not None:
        gptq = GPTQ(**flags.gptq.as_dict(), monitor=monitor, max_drop=None, folder=str(flags.output_dir))
        trainer = L.Trainer(**cli.trainer_arguments(flags, callbacks=[gptq]))
        own = {"tokenizer": data.tokenizer, "metrics": cli.metrics_of(flags, data)}
        module = DistillationModule(None, copy.deepcopy(models["student"]), **own)
        trainer.validate(module, datamodule=data, verbose=False)
        models["student-gptq"] = quantized = load(flags.output_dir / "student-gptq")
        use_kernels(quantized)
        module = DistillationModule(None, quantized, **own)
        (scores["student-gptq"],) = L.Trainer(**cli.trainer_arguments(flags)).test(module, data, verbose=False)

    if trainer.is_global_zero:
        seconds, batches = time.perf_counter() - started, cli.test_batches(flags, data)  # of 1 row and of 32 rows
        timing = {"device": trainer.strategy.root_device, "progress": cli.shows_progress(flags)}
        latency = {size: latency_ms(models, some, **timing) for size, some in batches.items()}
        cli.report_task(flags, data, models, scores, latency, seconds=seconds)


if __name__ == "__main__":
    main()
