"""``lightning-distill cache``: the teacher's signals of every row of a data set, before a training."""

import copy
from collections.abc import Sequence
from typing import Any

import lightning as L
from jsonargparse import Namespace

from lightning_distill.callbacks.resumable import Resumable
from lightning_distill.callbacks.teacher_cache import TeacherCache
from lightning_distill.cli.parser import FlagParser, Flags
from lightning_distill.cli.screen import quiet
from lightning_distill.models.pretrained import load_pretrained
from lightning_distill.module import DistillationModule
from lightning_distill.objectives import Objective
from lightning_distill.teachers.cache.format import check_folder
from lightning_distill.teachers.cache.teacher import bare


class _Fill(L.LightningModule):
    """Asks the teacher for every batch of training and validation, on as many processes as the Trainer has."""

    def __init__(self, module: DistillationModule, cache: TeacherCache, data: Any) -> None:
        super().__init__()
        self.module, self.cache, self.data = module, cache, data

    def val_dataloader(self) -> list[Any]:
        """The loaders, made where the processes are known."""
        self.data.trainer = self.trainer
        self.data.prepare_data()
        self.data.setup("fit")
        return [loader for loader in (self.data.train_dataloader(), self.data.val_dataloader()) if loader is not None]

    def on_validation_start(self) -> None:
        """Stand between the module and its teacher."""
        self.module.tokenizer = getattr(self.data, "tokenizer", None)
        with self.trainer.precision_plugin.forward_context():
            self.cache.attach(self.module, self.global_rank)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Write what is not there yet."""
        self.module.teacher_step(batch)

    def on_validation_end(self) -> None:
        """Close the files."""
        hits, misses = self.cache.hits, self.cache.misses
        print(f"process {self.global_rank}: {misses} rows written, {hits} were there", flush=True)
        self.cache.detach()


def main(argv: Sequence[str] | None = None) -> None:
    """Fill a cache with the signals of a transformers teacher.

    Args:
        argv: Arguments; None for those of the shell.

    Raises:
        ValueError: If the teacher or the data cannot be read, or the cache is another's.
    """
    parser = FlagParser("lightning-distill cache", description="Fill a TeacherCache before the training.")
    parser.add_argument("--teacher", type=str, required=True, help="folder or hub id of the teacher")
    parser.add_class_arguments(TeacherCache, "cache", instantiate=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=True)
    parser.add_argument("--objectives", type=list[Objective] | None, help="what the training will learn from")
    parser.add_class_arguments(L.Trainer, "trainer", instantiate=False)
    parser.set_defaults({"trainer.enable_model_summary": False, "trainer.logger": False})
    config = parser.parse_args(None if argv is None else list(argv))
    with quiet():
        _fill(config, parser.instantiate(config))


def _fill(config: Flags, made: Namespace) -> None:
    cache = TeacherCache(**config.cache.as_dict())
    check_folder(cache.path)
    teacher: Any = load_pretrained(config.teacher, "--teacher")
    if getattr(made.data, "tokenizer", "") is None:
        made.data.tokenizer = config.teacher
    plan = copy.deepcopy(teacher.config)
    plan.architectures = [type(teacher).__name__]
    module = DistillationModule(teacher, bare(plan), made.objectives)
    arguments = dict(made.trainer.as_dict()) | {"use_distributed_sampler": False}
    asked = arguments["callbacks"] or []
    # For its answer to signals, which does not make one process wait for another.
    arguments["callbacks"] = [*(asked if isinstance(asked, list) else [asked]), Resumable()]
    trainer = L.Trainer(**arguments)
    if trainer.limit_val_batches == 0:
        raise ValueError("Expected argument `--trainer.limit_val_batches` to let rows be asked for, but got 0.")
    # Validation, because Lightning takes the loaders of a prediction apart and makes them anew, in the order of rows.
    trainer.validate(_Fill(module, cache, made.data), verbose=False)
