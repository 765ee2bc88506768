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

import time
from functools import partial

import lightning as L

from lightning_distill import DistillationModule, cli, student_from_teacher
from lightning_distill.data import LanguageModelData
from lightning_distill.generation import OnPolicyDistillation, teacher_documents
from lightning_distill.generation.speed import tokens_per_second
from lightning_distill.models.pretrained import load_pretrained, load_tokenizer
from lightning_distill.models.tokenizers import shared_vocab_size
from lightning_distill.objectives import HardLabel, SoftTarget


@cli.command()
def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    flags = cli.language_parser(__doc__, output_dir="runs/causal_lm").parse_args(argv)

    with cli.one_line_errors():  # what is wrong is said in one line, before anything is written
        cli.check_flags(flags)
        L.seed_everything(flags.seed, workers=True, verbose=False)

        # A batch is input_ids, position_ids and labels, each [B, max_length]; logits are [B, max_length, words].
        if cli.names_nothing(flags):  # docstrings, and a small Llama that has yet to learn them
            data, teacher = cli.embedded_documents(flags)
            # The teacher is trained until it learns no more: a student begins with its weights, and one of a teacher
            # that is still learning does better on the text alone.
            cli.set_defaults(flags, lr=2e-3, max_epochs=2, teacher_epochs=7)
        else:
            teacher = load_pretrained(flags.model.teacher, "--model.teacher")
            tokenizer = load_tokenizer(flags.model.teacher, "--model.teacher", teacher)
            data = LanguageModelData(**flags.data.as_dict(), tokenizer=tokenizer, seed=flags.seed)
            cli.set_defaults(flags, lr=3e-4, max_epochs=1, teacher_epochs=1)
        data.setup()

        def new_student():  # half of the teacher's layers, with its weights, unless flags say otherwise
            L.seed_everything(flags.seed, workers=True, verbose=False)
            if flags.model.student is not None:
                return cli.named_student(flags, teacher, data)
            return student_from_teacher(teacher, **cli.student_size(flags, teacher))

        student = new_student()
        cli.check_lengths(flags, data, {"teacher": teacher, "student": student})
        # The teacher's distribution over the next word, and some of the text itself.
        mixed = [SoftTarget(temperature=1.0, weight=0.9), HardLabel(weight=0.1)]
        objectives, distillation = cli.objectives_of(flags, data, mixed), DistillationModule
        if flags.generation.on_policy:  # some batches are written by the student and scored by the teacher
            distillation = partial(OnPolicyDistillation, **cli.on_policy_arguments(flags, objectives))
        cli.dry_run(flags, data, teacher, student, objectives, make=distillation)
        cli.begin_run(flags, data, teacher)

    # The teacher, where it does not know its task yet. A module without a teacher learns from the text alone.
    models, scores = {"teacher": teacher}, {}
    trainer = L.Trainer(**cli.trainer_arguments(flags, "teacher", monitor="val_perplexity"))
    labels = [HardLabel()]
    module = DistillationModule(None, teacher, labels, **cli.module_arguments(flags, data, trainer, with_teacher=False))
    if cli.trains_teacher(flags):
        cli.begin_training(flags, "teacher", teacher)
        trainer.fit(module, datamodule=data, ckpt_path=cli.resume_from(flags, "teacher"))
        cli.load_best(module, trainer)
        if trainer.is_global_zero:
            module.export(flags.output_dir / "teacher")
        student = new_student()  # of what the teacher knows now
    (scores["teacher"],) = L.Trainer(**cli.trainer_arguments(flags)).test(module, data, verbose=False)

    # A student on the text alone, which distillation has to beat, then the student: from the same weights.
    imitated = cli.in_own_precision(flags, teacher)
    learning = {cli.BASELINE: (DistillationModule, new_student(), labels)} if flags.model.baseline else {}
    learning["student"] = (distillation, student, objectives)
    for name, (make, student, objectives) in learning.items():
        if name == "student" and flags.generation.sequence_level:  # on text that the teacher writes once
            documents, folder = data.documents("train"), flags.output_dir / "teacher_text"
            cli.say(f"\nThe teacher writes {len(documents)} documents, into {folder}")
            writing = {**cli.sampling(flags), "vocab_size": shared_vocab_size(student, teacher), "seed": flags.seed}
            data.replace_training_documents(
                teacher_documents(teacher, cli.prompts_of(flags, documents), folder, **writing)
            )
        cli.begin_training(flags, name, student)
        trainer = L.Trainer(**cli.trainer_arguments(flags, name, monitor="val_perplexity"))
        module = make(imitated, student, objectives, **cli.module_arguments(flags, data, trainer))
        trainer.fit(module, datamodule=data, ckpt_path=cli.resume_from(flags, name))
        cli.load_best(module, trainer)
        (scores[name],) = L.Trainer(**cli.trainer_arguments(flags)).test(module, data, verbose=False)
        if trainer.is_global_zero:
            module.export(flags.output_dir / name)
        models[name] = student

    if trainer.is_global_zero:
        seconds, device = time.perf_counter() - started, trainer.strategy.root_device
        prompts = cli.prompts_of(flags, data.documents("test")[: flags.generation.num_prompts])
        speed, more = {}, {}
        if prompts:
            writers = {name: cli.writer(flags, model.to(device), prompts) for name, model in models.items()}
            speed = tokens_per_second(writers, repeats=3, device=device, progress=cli.shows_progress(flags))
            more["speculative"] = cli.measure_draft(flags, models, new_student().to(device), prompts)
        cli.report_language(flags, data, models, scores, speed, seconds=seconds, **more)


if __name__ == "__main__":
    main()
