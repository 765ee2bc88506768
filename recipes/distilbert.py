r"""Distil a text classifier: take a teacher, make a student of fewer layers, measure both side by side.

python recipes/distilbert.py
    Real text that every installation has (docstrings, labelled by their package), a teacher trained on the spot,
    a student of half its layers. No network, no file, a few minutes on 2 cores.

python recipes/distilbert.py --model.teacher <folder or hub id> --model.num_layers 3 \
    --data.train_file train.tsv --data.val_file dev.tsv --data.test_file test.tsv \
    --data.text_columns sentence --data.label_column label --trainer.max_epochs 1
    Your own teacher and data. Every --trainer.* flag is the Trainer's.

Writes to --output_dir: student/ (for from_pretrained), summary.json, curves.png, checkpoints/, logs/.
"""

import time

import lightning as L
import torch
import transformers
from jsonargparse import ArgumentParser, Namespace

from lightning_distill import DistillationModule, student_from_teacher
from lightning_distill.cli import (
    best_checkpoint,
    linear_warmup,
    make_trainer,
    one_line_errors,
    quiet,
    recipe_parser,
)
from lightning_distill.data import TextClassificationData
from lightning_distill.measure import count_bytes, count_parameters, latency_ms
from lightning_distill.objectives import HardLabel, Objective
from lightning_distill.pretrained import has_head, load_pretrained
from lightning_distill.report import plot_curves, print_table, ratios, read_curves, versions, write_summary
from lightning_distill.teacher import has_placeholder_labels

# Small models from scratch want a higher learning rate than pretrained ones, and a teacher wants to be trained out.
LR, EPOCHS, TEACHER_EPOCHS = 8e-5, 3, 3
EMBEDDED = {"rows_per_class": 700, "lr": 1e-3, "epochs": 2, "teacher_epochs": 4}


def make_parser() -> ArgumentParser:
    defaults = {"trainer.enable_model_summary": False, "trainer.gradient_clip_val": 1.0}
    parser = recipe_parser(__doc__, output_dir="runs/distilbert", defaults=defaults)
    parser.add_argument("--model.teacher", type=str | None, help="folder or hub id; none: trained on the embedded text")
    parser.add_argument("--model.num_layers", type=int | None, help="layers of the student (default: half of them)")
    parser.add_argument("--model.width", type=float | None, help="width of the student as a share of the teacher's")
    parser.add_argument("--model.compression_ratio", type=float | None, help="teacher parameters / student parameters")
    parser.add_argument("--model.layers", type=str, default="uniform", help="layers kept: uniform, last, first, skip")
    parser.add_argument("--model.init", type=str, default="teacher", help="weights to begin with: teacher or random")
    parser.add_argument("--model.finetune_teacher", type=bool, default=False, help="fine-tune the teacher first")
    parser.add_argument("--model.teacher_epochs", type=int | None, help="epochs of a teacher trained here")
    parser.add_argument("--model.baseline", type=bool, default=False, help="train a student on the labels alone, too")
    parser.add_argument("--objectives", type=list[Objective] | None, help="what the student learns from (see README)")
    return parser


def embedded(config: Namespace) -> tuple[TextClassificationData, transformers.PreTrainedModel]:
    """Text of the installed packages, and an untrained small BERT for it."""
    data = TextClassificationData.embedded(
        max_rows_per_class=EMBEDDED["rows_per_class"], batch_size=config.data.batch_size, seed=config.seed
    )
    bert = transformers.BertConfig(
        vocab_size=len(data.tokenizer),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=128,
        pad_token_id=data.tokenizer.pad_token_id,
        id2label=data.id2label,
        label2id=data.label2id,
    )
    return data, transformers.BertForSequenceClassification(bert)


def given(config: Namespace) -> tuple[TextClassificationData, transformers.PreTrainedModel]:
    """The user's data and teacher; the data number their classes as the teacher does."""
    path = config.model.teacher
    if path is None or not (config.data.train_file or config.data.hub_dataset):
        raise ValueError("--model.teacher and --data.train_file (or --data.hub_dataset) go together; one is missing")
    arguments = config.data.as_dict() | {"tokenizer": path}
    if config.model.finetune_teacher:
        data = TextClassificationData(**arguments)
        names = {"id2label": data.id2label, "label2id": data.label2id} if data.label_names else {}
        teacher = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=data.num_labels, dtype="float32", use_safetensors=True, **names
        )
        return data, teacher
    if not has_head(transformers.AutoConfig.from_pretrained(path)):
        raise ValueError(
            f"{path}: the teacher has no fine-tuned head; --model.finetune_teacher true fine-tunes it on the data first"
        )
    teacher = load_pretrained(path, "--model.teacher")
    if arguments["label_names"] is None and not has_placeholder_labels(teacher.config.label2id):
        arguments["label_names"] = [teacher.config.id2label[index] for index in range(teacher.config.num_labels)]
    data = TextClassificationData(**arguments)
    if data.num_labels != teacher.config.num_labels:
        raise ValueError(
            f"the data have {data.num_labels} classes and the teacher {teacher.config.num_labels}; "
            "--model.finetune_teacher true gives it a new head"
        )
    return data, teacher


def make_student(config: Namespace, teacher: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    model = config.model
    num_layers = model.num_layers
    if num_layers is None and model.width is None and model.compression_ratio is None:
        num_layers = max(1, teacher.config.num_hidden_layers // 2)
    return student_from_teacher(
        teacher,
        num_layers=num_layers,
        width=model.width,
        compression_ratio=model.compression_ratio,
        layers=model.layers,
        init=model.init,
    )


def train(
    parser: ArgumentParser,
    config: Namespace,
    data: TextClassificationData,
    phase: str,
    *,
    student: transformers.PreTrainedModel,
    teacher: transformers.PreTrainedModel | None,
    objectives: list[Objective] | None,
    epochs: int,
    lr: float,
) -> tuple[L.Trainer, dict[str, float]]:
    """Fit one phase, go back to its best epoch, test it; returns the trainer and the scores."""
    L.seed_everything(config.seed, workers=True, verbose=False)
    checkpoint = best_checkpoint(config, phase, f"val_{metric_name(data)}")
    trainer = make_trainer(parser, config, phase, callbacks=[checkpoint], max_epochs=epochs)
    module = DistillationModule(
        teacher,
        student,
        objectives,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr, weight_decay=config.optimizer.weight_decay),
        lr_scheduler=linear_warmup(trainer, config.optimizer.warmup),
        tokenizer=data.tokenizer,
    )
    trainer.fit(module, datamodule=data)
    best = checkpoint.best_model_path or None
    (scores,) = trainer.test(module, datamodule=data, ckpt_path=best, weights_only=True, verbose=False)
    if trainer.is_global_zero:
        module.export(config.output_dir / phase)
    return trainer, dict(scores)


def metric_name(data: TextClassificationData) -> str:
    return "pearson" if data.task == "regression" else "accuracy"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    config = parser.parse_args(argv)
    started = time.perf_counter()
    quiet()
    L.seed_everything(config.seed, workers=True, verbose=False)

    # What can be wrong with the input is found here, before the first step and before anything is written.
    on_the_spot = not (config.model.teacher or config.data.train_file or config.data.hub_dataset)
    with one_line_errors(parser.prog):
        data, teacher = embedded(config) if on_the_spot else given(config)
        data.setup()
        make_student(config, teacher)
        objectives = parser.instantiate(config).objectives
    default = EMBEDDED if on_the_spot else {"lr": LR, "epochs": EPOCHS, "teacher_epochs": TEACHER_EPOCHS}
    lr = config.optimizer.lr or default["lr"]
    epochs = config.trainer.max_epochs or default["epochs"]
    teacher_epochs = config.model.teacher_epochs or default["teacher_epochs"]

    scores: dict[str, dict[str, float]] = {}
    if on_the_spot or config.model.finetune_teacher:
        print(f"\nTraining the teacher first, for {teacher_epochs} epochs: {describe(teacher)}")
        _, scores["teacher"] = train(
            parser,
            config,
            data,
            "teacher",
            student=teacher,
            teacher=None,
            objectives=None,
            epochs=teacher_epochs,
            lr=lr,
        )
    else:
        tester = make_trainer(parser, config, "teacher")
        (scores["teacher"],) = tester.test(DistillationModule(None, teacher), datamodule=data, verbose=False)

    models = {"teacher": teacher}
    plans = {"student": objectives}
    if config.model.baseline:
        plans["student_without_distillation"] = [HardLabel()]
    for phase, objectives in plans.items():
        L.seed_everything(config.seed, workers=True, verbose=False)
        models[phase] = make_student(config, teacher)
        print(f"\nTraining {phase.replace('_', ' ')}, for {epochs} epochs: {describe(models[phase])}")
        trainer, scores[phase] = train(
            parser,
            config,
            data,
            phase,
            student=models[phase],
            teacher=teacher,
            objectives=objectives,
            epochs=epochs,
            lr=lr,
        )
    if trainer.is_global_zero:
        report(config, data, models, scores, trainer.strategy.root_device, time.perf_counter() - started)


def describe(model: transformers.PreTrainedModel) -> str:
    config = model.config
    parameters = count_parameters(model) / 1e6
    return f"{config.num_hidden_layers} layers, width {config.hidden_size}, {parameters:.2f} M parameters"


def report(
    config: Namespace,
    data: TextClassificationData,
    models: dict[str, transformers.PreTrainedModel],
    scores: dict[str, dict[str, float]],
    device: torch.device,
    seconds: float,
) -> None:
    """Measure the models side by side; print the table, write summary.json and curves.png."""
    rows_of_test = data.predict_dataloader().dataset
    latency = {}
    for size, count in ((1, 64), (32, 8)):
        groups = [range(i, min(i + size, len(rows_of_test))) for i in range(0, len(rows_of_test), size)][:count]
        batches = [data.collate([rows_of_test[row] for row in group]) for group in groups]
        latency[size] = latency_ms(models, batches, device=device)
    metric = metric_name(data)
    rows = {
        name: {
            "parameters": count_parameters(model),
            "bytes": count_bytes(model),
            "metric_name": metric,
            "metric": scores[name][f"test_{metric}"],
            "agreement": scores[name].get("test_agreement", 1.0),
            "latency_ms_batch1": latency[1][name],
            "latency_ms_batch32": latency[32][name],
        }
        for name, model in models.items()
    }
    summary = rows | {
        "ratios": ratios(rows["student"], rows["teacher"]),
        "versions": versions(),
        "seed": config.seed,
        "seconds": round(seconds, 1),
    }
    write_summary(config.output_dir / "summary.json", summary)
    curves = {name: read_curves(config.output_dir / "logs" / name / "metrics.csv") for name in models}
    plot_curves(
        config.output_dir / "curves.png",
        curves,
        panels={
            "training loss": ["train_loss"],
            f"validation {metric}": [f"val_{metric}"],
            "agreement": ["val_agreement"],
        },
        lines={f"validation {metric}": {}},
    )
    print()
    print_table(rows, reference="teacher", title=f"{len(rows_of_test)} test rows, seed {config.seed}, {seconds:.0f} s")
    print(
        f"\nThe student is in {config.output_dir / 'student'}, the numbers are in {config.output_dir / 'summary.json'}."
    )


if __name__ == "__main__":
    main()
