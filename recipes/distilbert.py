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

from lightning_distill.recipe import TextRun, text_parser


def main(argv: list[str] | None = None) -> None:
    run = TextRun.start(text_parser(__doc__, output_dir="runs/distilbert"), argv)
    run.prepare()
    run.fit("student", run.new_student(), run.objectives)
    run.fit_baseline()
    run.report()


if __name__ == "__main__":
    main()
