r"""Distil a text classifier: take a teacher, make a student of fewer layers, measure both side by side.

python recipes/distilbert.py
    Real text that every installation has (docstrings, labelled by their package), a teacher trained on the spot,
    a student of half its layers. No network, no file, a few minutes on 2 cores.

python recipes/distilbert.py --model.teacher <folder or hub id> --model.num_layers 3 \
    --data.train_file train.tsv --data.val_file dev.tsv --data.test_file test.tsv \
    --data.text_columns sentence --data.label_column label --trainer.max_epochs 1
    Your own teacher and data. Every --trainer.* flag is the Trainer's. With --gptq.bits 4 the student is quantised
    in the end, to student-gptq/.

python recipes/distilbert.py --gradient_clipping.algorithm zscore --lr_finder.suggestion valley --init_policy auto \
    --model.init random --optimizer lion --lr_scheduler cosine
    Callbacks by flag, each with flags of its own; optimizer and schedule by name. See docs/optimization.md.

After a crash, a kill or Ctrl-C: the same command with --resume. See docs/reliability.md.

Writes to --output_dir: student/ (for from_pretrained), summary.json, curves.png, checkpoints/, logs/.
"""

from lightning_distill.cli.text_run import TextRun, text_parser
from lightning_distill.cli.trainer import run_command


@run_command()
def main(argv: list[str] | None = None) -> None:
    run = TextRun.start(text_parser(__doc__, output_dir="runs/distilbert"), argv)
    run.prepare()
    run.fit("student", run.new_student(), run.objectives)
    run.fit_baseline()
    run.quantize()
    run.report()


if __name__ == "__main__":
    main()
