r"""Distil a causal language model: a student of half the layers, beside the same student trained without a teacher.

python recipes/causal_lm.py
    Real text that every installation has (docstrings), a tokenizer and a small Llama trained on the spot. No network,
    no file, a few minutes on 2 cores.

python recipes/causal_lm.py --model.teacher <folder or hub id> --data.text_files stories.txt
    Your own teacher and text, or --data.hub_dataset. Documents are packed into rows of --data.max_length tokens and
    do not attend to each other. Every --trainer.* flag is the Trainer's, such as --trainer.precision bf16-mixed on a
    GPU or a CPU with instructions for bfloat16.

python recipes/causal_lm.py --generation.on_policy 0.5
    Half of the batches are written by the student and scored by the teacher (GKD). With --generation.sequence_level
    true the student trains on text that the teacher writes once. See docs/language-models.md.

Writes to --output_dir: student/ (for from_pretrained), summary.json, curves.png, checkpoints/, logs/.
"""

from lightning_distill.cli.language_run import LanguageRun, language_parser
from lightning_distill.cli.trainer import run_command


@run_command()
def main(argv: list[str] | None = None) -> None:
    run = LanguageRun.start(language_parser(__doc__, output_dir="runs/causal_lm"), argv)
    run.prepare()
    run.fit_baseline()
    run.write_training_text()
    run.fit("student", run.new_student(), run.objectives)
    run.report()


if __name__ == "__main__":
    main()
