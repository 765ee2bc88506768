r"""Early exit: ramps on a text classifier and on its distilled student, and how much faster both are for it (FastBERT).

python recipes/fastbert.py
    Real text that every installation has, a teacher trained on the spot, a student of half its layers.

python recipes/fastbert.py --model.teacher <folder or hub id> --model.num_layers 3 \
    --data.train_file train.tsv --data.val_file dev.tsv --data.test_file test.tsv \
    --data.text_columns sentence --data.label_column label --trainer.max_epochs 1
    Your own teacher and data. Every --trainer.* flag is the Trainer's.

The ramps learn what the last layer answers, without labels and without touching the model. The validation rows then
choose the thresholds: with 95 % confidence at most --model.max_drop of the accuracy is lost, or nothing leaves early,
and the recipe says how many rows that promise would take.

Writes to --output_dir: student/, early_exit_teacher/ and early_exit_student/ (for EarlyExitModel.from_pretrained, with
early_exit.png), summary.json (`early_exit` is the teacher's, `early_exit_student` the student's), curves.png.

Source: Liu et al., "FastBERT: a Self-distilling BERT with Adaptive Inference Time", 2020.
"""

import copy
from dataclasses import asdict
from typing import Any

import lightning as L
import transformers

from lightning_distill.callbacks import EarlyExit
from lightning_distill.cli import best_checkpoint, make_trainer, one_line_errors
from lightning_distill.early_exit import EarlyExitModel
from lightning_distill.early_exit.ramps import resolve_exits
from lightning_distill.measure import throughput
from lightning_distill.phases import say
from lightning_distill.recipe import TextRun, text_parser

LR = 2e-3  # ramps are small and new; the models they stand on do not move


def main(argv: list[str] | None = None) -> None:
    parser = text_parser(__doc__, output_dir="runs/fastbert")
    parser.add_argument("--model.exits", type=str, default="all", help="layers with a ramp: all or every_<n>")
    parser.add_argument("--model.ramp_epochs", type=int | None, help="epochs of the ramps (default: the student's)")
    parser.add_argument("--model.max_drop", type=float, default=0.02, help="accuracy that may be lost")
    run = TextRun.start(parser, argv)
    with one_line_errors(parser.prog):
        if run.data.task == "regression":
            raise ValueError("--data.*: early exit by confidence needs classes, and these labels are numbers")
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
    model = copy.deepcopy(model)  # the report is of the models without ramps
    epochs = config.model.ramp_epochs or run.epochs
    say(f"\nTraining ramps of the {name}, for {epochs} epochs")
    L.seed_everything(config.seed, workers=True, verbose=False)
    ramps = EarlyExit(config.model.exits, training="self_distill", lr=LR)
    checkpoint = best_checkpoint(config, phase, "val_loss")
    trainer = make_trainer(run.parser, config, phase, callbacks=[checkpoint, ramps], max_epochs=epochs)
    module = run.module(None, model, None)
    module.requires_grad_(True)  # a teacher comes frozen; the callback freezes all but the ramps itself
    trainer.fit(module, datamodule=run.data)
    if not trainer.is_global_zero:
        return {}

    device = trainer.strategy.root_device
    early = EarlyExitModel(model.to(device))
    report = early.calibrate(run.data.val_dataloader(), max_drop=config.model.max_drop)
    folder = early.save_pretrained(config.output_dir / phase, run.data.tokenizer)
    report.write(early, folder)
    scores = {}
    for kind, one in (("full", EarlyExitModel(model)), ("early", early)):  # the first has no thresholds: nothing leaves
        tester = L.Trainer(accelerator="cpu" if device.type == "cpu" else "auto", devices=1, logger=False,
                           enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                           limit_test_batches=config.trainer.limit_test_batches)  # fmt: skip
        (scores[kind],) = tester.test(one, datamodule=run.data, verbose=False)
    ratios = {}
    for size, count in ((1, 64), (32, 8)):
        rates = throughput({"full": model, "early": early}, run.test_batches(size, count), device=device)
        ratios[f"throughput_ratio_batch{size}"] = round(rates["early"] / rates["full"], 4)
    full_metric, early_metric = (scores[kind][f"test_{run.metric}"] for kind in ("full", "early"))
    return {
        "metric_full": full_metric,
        "metric_early": early_metric,
        "metric_drop": full_metric - early_metric,
        "mean_depth": scores["early"]["test_mean_depth"],
        **ratios,
        "guarantee": asdict(report)["guarantee"],
    }


if __name__ == "__main__":
    main()
