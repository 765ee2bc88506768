r"""Distil a tagger of words: named entities, parts of speech. Take a teacher, make a smaller student, measure both.

python recipes/ner.py
    Statements of the Python sources that every installation has, whose names are tagged by their role (argument,
    attribute, class, function, module, variable), a teacher trained on the spot, a student of half its layers.

python recipes/ner.py --model.teacher <folder or hub id> --model.finetune_teacher true --model.num_layers 3 \
    --data.train_file train.conll --data.val_file dev.conll --data.test_file test.conll
    Your own data, of one token a line with its tag, or jsonl and parquet with lists of tokens and tags; a teacher
    that is a tagger, or any encoder that is trained on them first. `--help data` says more. All other flags are those
    of recipes/distilbert.py.

Writes to --output_dir: student/ (for from_pretrained), summary.json, curves.png, checkpoints/, logs/.
"""

import copy
import time

import lightning as L

from lightning_distill import DistillationModule, cli, student_from_teacher
from lightning_distill.callbacks import GPTQ
from lightning_distill.data import TokenClassificationData
from lightning_distill.measure import latency_ms
from lightning_distill.models.pretrained import load_pretrained
from lightning_distill.objectives import HardLabel, SoftTarget
from lightning_distill.quantization import load, use_kernels


@cli.command()
def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    flags = cli.task_parser(__doc__, output_dir="runs/ner", data=TokenClassificationData).parse_args(argv)

    with cli.one_line_errors():  # what is wrong is said in one line, before anything is written
        cli.check_flags(flags)
        L.seed_everything(flags.seed, workers=True, verbose=False)

        # A batch is input_ids, attention_mask, labels [B, T]; the teacher makes logits [B, T, classes] of it. A word's
        # first piece has its label; other pieces and padding have -100, and count nowhere.
        if cli.names_nothing(flags):  # Python's names, and a small BERT that has yet to learn their roles
            data, teacher = cli.embedded_names(flags)
            cli.set_defaults(flags, lr=1e-3, max_epochs=2, teacher_epochs=4)
        else:
            data = TokenClassificationData(**flags.data.as_dict(), seed=flags.seed)
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
        # The teacher's probabilities of each word, softened by the temperature, and the labels (Hinton et al., 2015).
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
        module = DistillationModule(None, copy.deepcopy(models["student"]), tokenizer=data.tokenizer)
        trainer.validate(module, datamodule=data, verbose=False)
        models["student-gptq"] = quantized = load(flags.output_dir / "student-gptq")
        use_kernels(quantized)
        module = DistillationModule(None, quantized)
        (scores["student-gptq"],) = L.Trainer(**cli.trainer_arguments(flags)).test(module, data, verbose=False)

    if trainer.is_global_zero:
        seconds, batches = time.perf_counter() - started, cli.test_batches(flags, data)  # of 1 row and of 32 rows
        timing = {"device": trainer.strategy.root_device, "progress": cli.shows_progress(flags)}
        latency = {size: latency_ms(models, some, **timing) for size, some in batches.items()}
        cli.report_task(flags, data, models, scores, latency, seconds=seconds)


if __name__ == "__main__":
    main()
