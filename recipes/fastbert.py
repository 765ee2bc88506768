r"""Early exit: ramps on a text classifier and on its distilled student, and how much faster both are for it (FastBERT).

python recipes/fastbert.py
    Real text that every installation has, a teacher trained on the spot, a student of half its layers.

python recipes/fastbert.py --model.teacher <folder or hub id> --model.num_layers 3 \
    --data.train_file train.tsv --data.val_file dev.tsv --data.test_file test.tsv \
    --data.text_columns sentence --data.label_column label --trainer.max_epochs 1
    Your own teacher and data. Every --trainer.* flag is the Trainer's.

The ramps and all layers learn together what the model answered before (--model.ramp_training joint), so that low layers
become good at the task; with self_distill the model stays as it is and only the ramps move. No labels are used. The
validation rows then choose the thresholds: with 95 % confidence at most --model.max_drop of the accuracy is lost, or
nothing leaves early, and the recipe says how many rows that promise would take.

After a crash, a kill or Ctrl-C: the same command with --resume. See docs/reliability.md.

Writes to --output_dir: student/, early_exit_teacher/ and early_exit_student/ (for EarlyExitModel.from_pretrained, with
early_exit.png), summary.json (`early_exit` is the teacher's, `early_exit_student` the student's; `metric_full` is that
of the model before it had ramps), curves.png.

Source: Liu et al., "FastBERT: a Self-distilling BERT with Adaptive Inference Time", 2020.
"""

import copy
from dataclasses import asdict
from typing import Any, Literal

import lightning as L
import transformers

from lightning_distill.arguments import between
from lightning_distill.callbacks import EarlyExit
from lightning_distill.cli.text_run import TextRun, text_parser
from lightning_distill.cli.trainer import (
    best_checkpoint,
    make_trainer,
    one_line_errors,
    resume_from,
    run_command,
    say,
)
from lightning_distill.early_exit import EarlyExitModel
from lightning_distill.early_exit.ramps import resolve_exits
from lightning_distill.measure import throughput
from lightning_distill.models.folders import check_folder
from lightning_distill.objectives import SoftTarget

LR = 1e-3  # of the ramps, which are small and new
TEMPERATURE = 2.0


@run_command()
def main(argv: list[str] | None = None) -> None:
    parser = text_parser(__doc__, output_dir="runs/fastbert")
    parser.add_argument("--model.exits", type=str, default="all", help="layers with a ramp: all or every_<n>")
    parser.add_argument(
        "--model.ramp_training",
        type=Literal["joint", "self_distill"],
        default="joint",
        help="what learns: all, or ramps",
    )
    parser.add_argument("--model.ramp_epochs", type=int | None, help="epochs of the ramps (default: the student's)")
    parser.add_argument("--model.max_drop", type=float, default=0.02, help="accuracy that may be lost")
    run = TextRun.start(parser, argv)
    with one_line_errors(parser.prog):
        if run.data.task == "regression":
            raise ValueError("--data.*: early exit by confidence needs classes, and these labels are numbers")
        between("--model.max_drop", run.config.model.max_drop, 0, 1)
        if len({label for _, label in run.data.rows("val")}) < 2:
            raise ValueError(
                "--data.val_file: thresholds are chosen on validation rows of at least two classes, and these have one"
            )
        for name in ("teacher", "student"):
            check_folder(run.config.output_dir / f"early_exit_{name}", "--output_dir")
        for model in (run.teacher, run.new_student()):
            resolve_exits(run.config.model.exits, model.config.num_hidden_layers)
    run.prepare()
    run.fit("student", run.new_student(), run.objectives)
    run.fit_baseline()
    found = {name: early_exit(run, name, run.models[name]) for name in ("teacher", "student")}
    run.report(early_exit=found["teacher"], early_exit_student=found["student"])
    for name, row in found.items():
        if row:
            say(
                f"Early exit of the {name}: {row['mean_depth']:.2f} layers on average, {run.metric} "
                f"{row['metric_full']:.4f} -> {row['metric_early']:.4f}, throughput "
                f"x {row['throughput_ratio_batch1']:.2f} (batch 1), x {row['throughput_ratio_batch32']:.2f} (batch 32)"
            )


def early_exit(run: TextRun, name: str, model: transformers.PreTrainedModel) -> dict[str, Any]:
    """Train ramps, choose thresholds, measure; the numbers, on rank 0."""
    config, phase = run.config, f"early_exit_{name}"
    before, model = model, copy.deepcopy(model)  # the report is of the models without ramps
    epochs = run.epochs if config.model.ramp_epochs is None else config.model.ramp_epochs
    say(f"\nTraining ramps of the {name}, for {epochs} epochs")
    L.seed_everything(config.seed, workers=True, verbose=False)
    if config.model.ramp_training == "joint":
        module = run.module(before, model, [SoftTarget(temperature=TEMPERATURE)])
        learning = {"training": "joint", "teacher_weight": 1.0, "temperature": TEMPERATURE}
    else:
        module, learning = run.module(None, model, None), {"training": "self_distill"}
    module.student.requires_grad_(True)  # a teacher comes frozen; where only ramps learn, the callback freezes the rest
    ramps = EarlyExit(config.model.exits, lr=LR, **learning)
    checkpoint = best_checkpoint(config, phase, "val_loss")
    trainer = make_trainer(run.parser, config, phase, callbacks=[checkpoint, ramps], max_epochs=epochs)
    trainer.fit(module, datamodule=run.data, ckpt_path=resume_from(config, phase))
    if not trainer.is_global_zero:
        return {}

    device = trainer.strategy.root_device
    early = EarlyExitModel(model.to(device))
    report = early.calibrate(run.data.val_dataloader(), max_drop=config.model.max_drop)
    folder = early.save_pretrained(config.output_dir / phase, run.data.tokenizer)
    report.write(early, folder)
    tester = L.Trainer(accelerator="cpu" if device.type == "cpu" else "auto", devices=1, logger=False,
                       enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                       limit_test_batches=config.trainer.limit_test_batches)  # fmt: skip
    (scores,) = tester.test(early, datamodule=run.data, verbose=False)
    ratios = {}
    for size, count in ((1, 64), (32, 8)):
        batches, progress = run.test_batches(size, count), run.shows_progress
        rates = throughput({"full": model, "early": early}, batches, device=device, progress=progress)
        ratios[f"throughput_ratio_batch{size}"] = round(rates["early"] / rates["full"], 4)
    full_metric, early_metric = run.scores[name][f"test_{run.metric}"], scores[f"test_{run.metric}"]
    return {
        "metric_full": full_metric,
        "metric_early": early_metric,
        "metric_drop": full_metric - early_metric,
        "mean_depth": scores["test_mean_depth"],
        **ratios,
        "guarantee": asdict(report)["guarantee"],
    }


if __name__ == "__main__":
    main()
