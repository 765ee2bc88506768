r"""Distil a classifier of pictures. Take a teacher, make a smaller student, measure both.

python recipes/vision.py
    Handwritten digits of scikit-learn, a ResNet-20 trained on them on the spot, a ResNet-8 that learns from it.

python recipes/vision.py --model.teacher ../shared/models/cifar10-resnet56 --model.depth 20 --data.padding 4 \
    --data.flip true --data.train_file ../shared/data/cifar10/train.parquet \
    --data.test_file ../shared/data/cifar10/test.parquet --data.batch_size 128 --trainer.max_epochs 15
    A CIFAR ResNet (models/cifar_resnet.py: the place to change it, or to put another network beside it) teaches one
    of --model.depth layers. Pictures are cut and mirrored at random. A file may be a folder with one for each class.

python recipes/vision.py --model.teacher <folder or hub id> --model.num_layers 6 --data.train_file <...>
    An image classifier of transformers (ViT, DeiT, Swin ...); its student has fewer layers, or with --model.width
    narrower ones; with --model.depth it is a ResNet. --model.finetune_teacher true trains the teacher first.
    `--help data` says more. All other flags are those of recipes/distilbert.py, without --gptq.

Writes to --output_dir: student/ (for from_pretrained, or load_module), summary.json, curves.png, checkpoints/, logs/.
"""

import time

import lightning as L
import torch

from lightning_distill import DistillationModule, cli, student_from_teacher
from lightning_distill.data import ImageData
from lightning_distill.measure import latency_ms
from lightning_distill.models.cifar_resnet import CifarResNet
from lightning_distill.models.pretrained import is_of_module, load_pretrained
from lightning_distill.objectives import HardLabel, SoftTarget


@cli.command()
def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    parser = cli.task_parser(__doc__, output_dir="runs/vision", data=ImageData, quantises=False)
    parser.add_argument("--model.depth", type=int | None, help="layers of a CIFAR ResNet as student: 8, 14, 20 ...")
    flags = parser.parse_args(argv)

    with cli.one_line_errors():  # what is wrong is said in one line, before anything is written
        cli.check_flags(flags)
        L.seed_everything(flags.seed, workers=True, verbose=False)

        # A batch is pixel_values [B, C, H, W] and labels [B]; a model makes logits [B, classes] of it.
        if cli.names_nothing(flags):  # digits, and a small network that has yet to learn them
            data, teacher = cli.embedded_digits(flags)
            cli.set_defaults(flags, lr=3e-3, max_epochs=8, teacher_epochs=8)
        else:
            data, path = ImageData(**flags.data.as_dict(), seed=flags.seed), flags.model.teacher
            if is_of_module(path):
                teacher = CifarResNet.from_pretrained(path, "--model.teacher")
            else:
                teacher = cli.with_new_head(flags, data) or load_pretrained(path, "--model.teacher")
            cli.align(flags, data, teacher)  # the teacher's size and colours; class 1 of the data is class 1 of it
            lr = 3e-3 if isinstance(teacher, CifarResNet) or flags.model.depth else 1e-4
            cli.set_defaults(flags, lr=lr, max_epochs=10, teacher_epochs=10)
        data.setup()

        def new_student():  # a ResNet of a depth, or half of a transformer's layers with its weights
            L.seed_everything(flags.seed, workers=True, verbose=False)
            if flags.model.depth or isinstance(teacher, CifarResNet):
                return CifarResNet(flags.model.depth or 8, data.num_labels, data.channels, data.label_names)
            if flags.model.student is not None:
                return cli.named_student(flags, teacher, data)
            return student_from_teacher(teacher, **cli.student_size(flags, teacher))

        student = new_student()
        # The teacher's softened probabilities, and the labels (Hinton et al., 2015), as CIFAR's benchmarks weigh them.
        mixed = [SoftTarget(temperature=4.0, weight=0.9), HardLabel(weight=0.1)]
        objectives = cli.objectives_of(flags, data, mixed)  # or those of --objectives
        cli.dry_run(flags, data, teacher, student, objectives)
        cli.begin_run(flags, data, teacher)

    monitor = cli.monitor_of(flags, data)  # the epoch that is best by it, on the validation rows, is the one that stays
    models, scores = {"teacher": teacher}, {}

    # The teacher, where it does not know its task yet. A module without a teacher learns from labels: fine-tuning.
    trainer = L.Trainer(**cli.trainer_arguments(flags, "teacher", monitor=monitor))
    labels = [HardLabel(class_weights=data.class_weights)]
    channels_last = {"memory_format": torch.channels_last}  # the order in memory that convolutions are fastest in
    module = DistillationModule(
        None, teacher.to(**channels_last), labels, **cli.module_arguments(flags, data, trainer, with_teacher=False)
    )
    if cli.trains_teacher(flags):
        cli.begin_training(flags, "teacher", teacher)
        trainer.fit(module, datamodule=data, ckpt_path=cli.resume_from(flags, "teacher"))
        cli.load_best(module, trainer)
        if trainer.is_global_zero:
            module.export(flags.output_dir / "teacher")
        student = new_student()  # of what the teacher knows now
    (scores["teacher"],) = L.Trainer(**cli.trainer_arguments(flags)).test(module, data, verbose=False)

    # The student, and where the flags ask for it the same one on labels alone: what distillation has to beat.
    imitated = cli.in_own_precision(flags, teacher)
    learning = {"student": (student, objectives)}
    if flags.model.baseline:
        learning[cli.BASELINE] = (new_student(), labels)
    for name, (student, objectives) in learning.items():
        cli.begin_training(flags, name, student)
        trainer = L.Trainer(**cli.trainer_arguments(flags, name, monitor=monitor))
        module = DistillationModule(
            imitated, student.to(**channels_last), objectives, **cli.module_arguments(flags, data, trainer)
        )
        trainer.fit(module, datamodule=data, ckpt_path=cli.resume_from(flags, name))
        cli.load_best(module, trainer)
        (scores[name],) = L.Trainer(**cli.trainer_arguments(flags)).test(module, data, verbose=False)
        if trainer.is_global_zero:
            module.export(flags.output_dir / name)
        models[name] = student

    if trainer.is_global_zero:
        seconds, batches = time.perf_counter() - started, cli.test_batches(flags, data)  # of 1 row and of 32 rows
        timing = {"device": trainer.strategy.root_device, "progress": cli.shows_progress(flags)}
        latency = {size: latency_ms(models, some, **timing) for size, some in batches.items()}
        cli.report_task(flags, data, models, scores, latency, seconds=seconds)


if __name__ == "__main__":
    main()
