r"""Distil a text classifier by the relations in its self-attention, then fine-tune the student (MiniLMv2).

python recipes/minilm.py
    Real text that every installation has, a teacher trained on the spot, a student of half its layers.

python recipes/minilm.py --model.teacher <folder or hub id> --model.num_layers 3 --model.width 0.5 \
    --data.train_file train.tsv --data.val_file dev.tsv --data.test_file test.tsv --trainer.max_epochs 1
    Your own teacher and data. Every --trainer.* flag is the Trainer's.

Stage 1 needs no label: how each token's query, key and value stand to those of the others, in one layer of each model,
becomes the teacher's. Heads and width may differ. Stage 2 is fine-tuning, with the teacher's predictions beside the
labels.

After a crash, a kill or Ctrl-C: the same command with --resume. See docs/reliability.md.

Writes to --output_dir: student/ (for from_pretrained), summary.json, curves.png, checkpoints/, logs/.

Source: Wang et al., "MiniLM", 2020, and "MiniLMv2: Multi-Head Self-Attention Relation Distillation", 2021.
"""

from lightning_distill.cli.text_run import TextRun, text_parser
from lightning_distill.cli.trainer import run_command
from lightning_distill.objectives import AttentionRelation


@run_command()
def main(argv: list[str] | None = None) -> None:
    parser = text_parser(__doc__, output_dir="runs/minilm")
    parser.add_argument("--model.stage_1_epochs", type=int | None, help="epochs of stage 1 (default: those of stage 2)")
    parser.add_argument("--model.relation_layer", type=int | None, help="teacher layer, from 0 (default: the last)")
    parser.add_argument("--model.relation_heads", type=int | None, help="default: what divides the heads of both")
    run = TextRun.start(parser, argv)

    model = run.config.model
    last, depth = run.new_student().config.num_hidden_layers - 1, run.teacher.config.num_hidden_layers
    layer = depth - 1 if model.relation_layer is None else model.relation_layer
    relations = AttentionRelation([(last, layer)], ("qq", "kk", "vv"), relation_heads=model.relation_heads)
    run.prepare([relations])
    student = run.new_student()
    run.fit("stage_1", student, [relations], epochs=model.stage_1_epochs, monitor="val_loss", report=False)
    run.fit("student", student, run.objectives)
    run.fit_baseline()
    run.quantize()
    run.report()


if __name__ == "__main__":
    main()
