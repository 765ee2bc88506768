r"""Distil a text classifier by the relations in its self-attention, then fine-tune the student (MiniLMv2).

python recipes/minilm.py
python recipes/minilm.py --model.teacher <folder or hub id> --model.num_layers 3 --model.width 0.5 \
    --data.train_file train.tsv --data.val_file dev.tsv --data.test_file test.tsv --trainer.max_epochs 1

Flags, the text without flags and what is written are those of recipes/distilbert.py.
Source: Wang et al., "MiniLM", 2020, and "MiniLMv2: Multi-Head Self-Attention Relation Distillation", 2021.
"""

import copy
import time

import lightning as L

from lightning_distill import DistillationModule, cli, student_from_teacher
from lightning_distill.callbacks import GPTQ
from lightning_distill.data import TextClassificationData
from lightning_distill.measure import latency_ms
from lightning_distill.models.pretrained import load_pretrained
from lightning_distill.objectives import AttentionRelation, HardLabel, SoftTarget
from lightning_distill.quantization import load, use_kernels


@cli.command()
def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    parser = cli.text_parser(__doc__, output_dir="runs/minilm")
    parser.add_argument("--model.stage_1_epochs", type=int | None, help="epochs of stage 1 (default: those of stage 2)")
    parser.add_argument("--model.relation_layer", type=int | None, help="teacher layer, from 0 (default: the last)")
    parser.add_argument("--model.relation_heads", type=int | None, help="default: what divides the heads of both")
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
        # Queries with queries, keys with keys, values with values: [B, relation heads, T, T] of one layer of each.
        last, layer = student.config.num_hidden_layers - 1, flags.model.relation_layer
        pair = (last, teacher.config.num_hidden_layers - 1 if layer is None else layer)
        relations = [AttentionRelation([pair], ("qq", "kk", "vv"), relation_heads=flags.model.relation_heads)]
        objectives = cli.objectives_of(flags, data, [SoftTarget(temperature=2.0, weight=0.7), HardLabel(weight=0.3)])
        cli.dry_run(flags, data, teacher, student, relations, objectives)
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
    stages = {"stage_1": (student, relations, "val_loss"), "student": (student, objectives, monitor)}
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
