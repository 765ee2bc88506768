r"""Distil a text classifier in two stages: first what the layers hold, then what the teacher answers (TinyBERT).

python recipes/tinybert.py
    Real text that every installation has, a teacher trained on the spot, a student of half its layers.

python recipes/tinybert.py --model.teacher <folder or hub id> --model.num_layers 3 --model.width 0.5 \
    --data.train_file train.tsv --data.val_file dev.tsv --data.test_file test.tsv --trainer.max_epochs 1
    Your own teacher and data. Every --trainer.* flag is the Trainer's.

Stage 1 needs no label: the student's embedding, hidden states and attention maps come near those of the mapped teacher
layers. Stage 2 learns the predictions. Both go into the time of the run, and --model.stage_1_epochs says how long
the first one is.

After a crash, a kill or Ctrl-C: the same command with --resume. See docs/reliability.md.

Writes to --output_dir: student/ (for from_pretrained), summary.json, curves.png, checkpoints/, logs/.

Source: Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", 2020.
"""

from lightning_distill.cli.text_run import TextRun, text_parser
from lightning_distill.cli.trainer import run_command
from lightning_distill.objectives import AttentionMap, HiddenState, SoftTarget


@run_command()
def main(argv: list[str] | None = None) -> None:
    parser = text_parser(__doc__, output_dir="runs/tinybert")
    parser.add_argument("--model.stage_1_epochs", type=int | None, help="epochs of stage 1 (default: those of stage 2)")
    run = TextRun.start(parser, argv)

    # The paper weighs the parts equally. Its stage 1 fits scores before the softmax; maps after it are what every
    # attention function agrees on, and what the paper's first version fitted.
    features = [HiddenState("uniform", embedding=True), AttentionMap("uniform")]
    run.prepare(features)
    student = run.new_student()
    run.fit("stage_1", student, features, epochs=run.config.model.stage_1_epochs, monitor="val_loss", report=False)
    run.fit("student", student, run.objectives or [SoftTarget(temperature=1.0)])
    run.fit_baseline()
    run.quantize()
    run.report()


if __name__ == "__main__":
    main()
