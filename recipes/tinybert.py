r"""Distil a text classifier in two stages: first what the layers hold, then what the teacher answers (TinyBERT).

python recipes/tinybert.py
python recipes/tinybert.py --model.teacher <folder or hub id> --model.num_layers 3 --model.width 0.5 \
    --data.train_file train.tsv --data.val_file dev.tsv --data.test_file test.tsv --trainer.max_epochs 1

Flags, the text without flags and what is written are those of recipes/distilbert.py.
Source: Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", 2020.
"""

import copy
import time

import lightning as L

from lightning_distill import DistillationModule, cli, student_from_teacher
from lightning_distill.callbacks import GPTQ
from lightning_distill.data import TextClassificationData
from lightning_distill.measure import latency_ms
from lightning_distill.models.pretrained import load_pretrained
from lightning_distill.objectives import AttentionMap, HardLabel, HiddenState, SoftTarget
from lightning_distill.quantization import load, use_kernels


@cli.command()
def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    parser = cli.text_parser(__doc__, output_dir="runs/tinybert")
    parser.add_argument("--model.stage_1_epochs", type=int | None, help="epochs of stage 1 (default: those of stage 2)")
    flags = parser.parse_args(argv)

    with cli.one_line_errors():  # what is wrong is said in one line, before anything is written
        cli.check_flags(flags, "stage_1")
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
        # Of each mapped layer the hidden states [B, T, width] and the attention maps [B, heads, T, T], weighed equally
        # as in the paper. It fits scores before the softmax; maps after it are what every attention function agrees on.
        features = [HiddenState("uniform", embedding=True), AttentionMap("uniform")]
        objectives = cli.objectives_of(flags, data, [SoftTarget(temperature=1.0)])
        cli.dry_run(flags, data, teacher, student, features, objectives)
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

    # Stage 1 needs no label, stage 2 goes on with its student; what both have to beat is a student on labels alone.
    imitated = cli.in_own_precision(flags, teacher)
    stages = {"stage_1": (student, features, "val_loss"), "student": (student, objectives, monitor)}
    if flags.model.baseline:
        stages[cli.BASELINE] = (new_student(), labels, monitor)
    for name, (student, objectives, monitored) in stages.items():
        cli.begin_training(flags, name, student)
        trainer = L.Trainer(**cli.trainer_arguments(flags, name, monitor=monitored))
        module = DistillationModule(imitated, student, objectives, **cli.module_arguments(flags, data, trainer))
        trainer.fit(module, datamodule=data, ckpt_path=cli.resume_from(flags, name))
        cli.load_best(module, trainer)
        if trainer.is_global_zero:
            module.export(flags.output_dir / name)
        if name != "stage_1":
            models[name] = student
            (scores[name],) = L.Trainer(**cli.trainer_arguments(flags)).test(module, data, verbose=False)

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
