"""Names of other libraries that begin with an underscore: what their next release may take away, and what breaks then.

A test holds the table against the code, so that a name that is new here needs a row with a reason, and against the
installed libraries, so that a release without one of the names is told by what it breaks, to users too.
"""

import inspect
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pkgutil import resolve_name
from types import CodeType
from typing import Any, NamedTuple


class PrivateName(NamedTuple):
    """A name that another library does not promise to keep.

    Attributes:
        owner: The module, or ``module:class``, that has it; its first word is the library.
        name: The name.
        files: Where it is used.
        reason: What it is needed to do, as the end of "needs it to".
    """

    owner: str
    name: str
    files: tuple[str, ...]
    reason: str

    def why_missing(self) -> str | None:
        """What an installed library lacks and what that breaks, in a sentence; None where the name is there.

        Example:
            >>> from lightning_distill.private_names import PrivateName
            >>> PrivateName("json", "_gone", ("cli/cache.py",), "read").why_missing()
            'json has no `json._gone`, which cli/cache.py needs to read.'
        """
        try:
            found = _has(resolve_name(self.owner), self.name)
        except (ImportError, AttributeError):
            found = False
        if found:
            return None
        library = self.owner.partition(".")[0].partition(":")[0]
        release = "" if library in sys.stdlib_module_names else f" {version(library)}"
        place = self.owner.replace(":", ".")
        return f"{library}{release} has no `{place}.{self.name}`, which {', '.join(self.files)} needs to {self.reason}."


def warn_of_missing_names() -> None:
    """Say, on import, what the installed libraries no longer have and what that breaks."""
    for name in PRIVATE_NAMES:
        library = name.owner.partition(".")[0].partition(":")[0]
        # An optional library that nobody has imported is nobody's.
        if library in sys.modules and (why := name.why_missing()) is not None:
            warnings.warn(why, RuntimeWarning, stacklevel=3)


def _has(owner: Any, name: str) -> bool:
    """Whether an object has a name, or is a class or a module whose code sets one on instances."""
    if hasattr(owner, name):
        return True
    places = owner.__mro__ if isinstance(owner, type) else (owner,)
    values = (value for place in places for value in vars(place).values())
    functions = (value.fget if isinstance(value, property) else value for value in values)
    codes = (inspect.unwrap(function).__code__ for function in functions if inspect.isfunction(function))
    return any(name in words for code in codes for words in _words(code))


def _words(code: CodeType) -> Iterator[tuple[Any, ...]]:
    yield code.co_names
    yield code.co_consts
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words(constant)


_LOOPS = "lightning.pytorch.loops"
_FIT = f"{_LOOPS}.fit_loop:_FitLoop"
_MODULE = "torch.nn:Module"
_CONFIG = "transformers:PretrainedConfig"

# fmt: off
PRIVATE_NAMES = [
    # -- Lightning: its loops. They carry most of the risk; the promises of Resumable and of a dry run stand on them.
    PrivateName(f"{_LOOPS}.fit_loop", "_FitLoop", ("training/dry_run.py",),
        "run steps in the Trainer's own loop, which ends when it is told to"),
    PrivateName(_FIT, "_data_source", ("training/dry_run.py",),
        "give the loop of a dry run copies of the loaders, so that those of the training stay where they are"),
    PrivateName(_FIT, "_combined_loader", ("step/accumulation.py", "training/dry_run.py"),
        "reach the loaders in use, with the mode in which they are combined (`train_dataloader` leaves it out)"),
    PrivateName(_FIT, "_data_fetcher", ("callbacks/resumable.py", "step/accumulation.py"),
        "know all batches of a step before the first, and begin a resumed epoch at its next batch"),
    PrivateName(f"{_LOOPS}.fetchers", "_PrefetchDataFetcher", ("step/accumulation.py",),
        "tell a loop that fetches batches from a step that does so itself, and fetch those of a step ahead"),
    PrivateName("lightning.pytorch.utilities:CombinedLoader", "_state_dicts", ("step/accumulation.py",),
        "keep where the loaders stand after each batch of a step that is fetched ahead"),
    PrivateName(_FIT, "_combined_loader_states_to_load", ("callbacks/resumable.py",),
        "see that Lightning has built the loaders before it read their state, and would begin the epoch anew"),
    PrivateName(_FIT, "_load_combined_loader_states", ("callbacks/resumable.py",),
        "give the loaders the state they missed"),
    PrivateName(_FIT, "_restarting", ("callbacks/resumable.py",),
        "let a plateau's schedule step after a resume (the setter of `restarting` keeps it True)"),
    PrivateName(_FIT, "_should_accumulate", ("callbacks/lr_finder.py", "callbacks/resumable.py"),
        "know whether a batch ended an optimizer step, as the loop decides it"),
    PrivateName(f"{_LOOPS}.training_epoch_loop:_TrainingEpochLoop", "_should_check_val_fx", ("callbacks/resumable.py",),
        "know whether a validation follows a batch, as the loop decides it"),
    # -- Lightning: the Trainer, its strategies and modules
    PrivateName("lightning.pytorch:Trainer", "_logger_connector", ("training/dry_run.py",),
        "keep what a dry run logs out of the metrics of the training"),
    PrivateName("lightning.pytorch.trainer.setup", "_val_check_time_interval", ("training/dry_run.py",),
        "validate after each step of a dry run, also where the training validates by the clock"),
    PrivateName("lightning.pytorch.strategies.launchers.multiprocessing", "_MultiProcessingLauncher",
        ("callbacks/gptq.py", "callbacks/resumable.py"),
        "tell processes that were forked from those that were started, as the former's results do not come back"),
    PrivateName("lightning.pytorch.strategies:DDPStrategy", "_ddp_kwargs", ("training/parallel.py",),
        "read and complete what DistributedDataParallel is made with, before it wraps the model"),
    PrivateName("lightning.pytorch.strategies:DDPStrategy", "_layer_sync", ("training/parallel.py",),
        "know that `sync_batchnorm` was asked for"),
    PrivateName("lightning.pytorch:LightningModule", "_trainer", ("generation/on_policy.py", "module.py",
        "optim/schedules.py", "step/accumulation.py", "step/checked_run.py"),
        "know whether a module has a Trainer (`trainer` raises where it has none)"),
    PrivateName("lightning.pytorch:LightningModule", "_on_before_batch_transfer", ("step/accumulation.py",),
        "begin a step before its first batch is moved, in a hook that no user overrides"),
    PrivateName("lightning.pytorch:LightningModule", "_apply_batch_transfer_handler", ("step/accumulation.py",),
        "move the batches of a step as Lightning would, once"),
    PrivateName("lightning.fabric.utilities.optimizer", "_optimizers_to_device", ("callbacks/lr_finder.py",),
        "move optimizers that are made anew to the device, as `Strategy.setup` does"),
    PrivateName("lightning.fabric.utilities.types", "_PATH", ("training/checkpoint.py",),
        "have the signature of Lightning's CheckpointIO"),
    PrivateName("lightning.pytorch.loggers:CSVLogger", "_experiment", ("cli/report.py",),
        "keep the rows that a resumed run has written"),
    # -- torch: what a module is made of
    PrivateName(_MODULE, "_parameters", ("quantization/experts.py", "quantization/replaceable.py",
        "teachers/cache/teacher.py"),
        "see and take away what a module has registered itself, entries of None too"),
    PrivateName(_MODULE, "_buffers", ("quantization/linear.py", "quantization/replaceable.py",
        "teachers/cache/teacher.py", "teachers/module.py"),
        "put another tensor in the place of a buffer, entries of None too"),
    PrivateName(_MODULE, "_modules", ("models/exporting.py", "models/wrapped.py", "quantization/replaceable.py"),
        "ask for a child by name past `__getattr__`, and take it out for a moment without losing its place"),
    *(
        PrivateName(
            _MODULE, name, ("quantization/replaceable.py",), "leave layers with hooks alone, which a copy would lose"
        )
        for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    ),
    PrivateName(_MODULE, "_apply", ("quantization/linear.py", "teachers/module.py"),
        "keep the type of tensors that `.to(dtype)` must not change, and move a teacher that is no submodule"),
    PrivateName(_MODULE, "_load_from_state_dict", ("early_exit/ramps.py", "quantization/linear.py",
        "training/adapters.py"),
        "take what a checkpoint has for one module in its own way"),
    PrivateName(_MODULE, "_call_impl", ("early_exit/walk.py", "models/wrapped.py"),
        "call a layer with its hooks from inside of what stands before its call"),
    PrivateName(_MODULE, "_compiled_call_impl", ("early_exit/walk.py", "models/wrapped.py"),
        "compile in place what `torch.compile` has wrapped, and stand before the calls of compiled layers"),
    PrivateName("torch._dynamo.eval_frame:OptimizedModule", "_orig_mod", ("models/exporting.py", "models/wrapped.py"),
        "find the model inside of what `torch.compile` returned"),
    PrivateName("torch.nn:MultiheadAttention", "_reset_parameters", ("students/initialization.py",),
        "draw its weights, as it has no public `reset_parameters`"),
    PrivateName("torch.nn.init", "_calculate_fan_in_and_fan_out", ("callbacks/init_policy.py",
        "students/initialization.py"),
        "scale by the fans that torch's own initialisations use"),
    PrivateName("torch.nn.modules.batchnorm", "_BatchNorm", ("training/parallel.py",),
        "know what SyncBatchNorm replaces, lazy and synchronised ones too"),
    PrivateName("torch.nn.modules.batchnorm", "_NormBase", ("students/initialization.py",),
        "know every batch and instance norm, of any dimension"),
    PrivateName("torch.nn.modules.dropout", "_DropoutNd", ("models/fingerprints.py",),
        "leave every dropout, of any dimension, out of a fingerprint"),
    # -- torch: tensors and kernels
    PrivateName("torch:Tensor", "_version", ("cli/dry_run.py", "quantization/calibration.py", "students/untouched.py"),
        "tell whether a tensor was written to in place"),
    PrivateName("torch:Tensor", "_values", ("functional/clipping.py", "training/finite_loss.py"),
        "reach the values of a sparse gradient in place, where `values` wants it coalesced"),
    PrivateName("torch:Tensor", "_indices", ("functional/clipping.py",),
        "clip a sparse gradient row by row"),
    PrivateName("torch:Tensor", "_make_wrapper_subclass", ("quantization/packed_weight.py",),
        "make a tensor that has a shape and no memory"),
    PrivateName("torch", "_C", ("quantization/packed_weight.py",),
        "answer with plain tensors (`DisableTorchFunctionSubclass`, which torch documents by this name)"),
    PrivateName("torch._ops:OpOverload", "_schema", ("quantization/packed_weight.py", "students/axes.py"),
        "refuse operations that write to a packed weight, and know which operator a forward has come to"),
    PrivateName("torch.utils", "_python_dispatch", ("students/axes.py",),
        "follow the operators of a forward by a `TorchDispatchMode`, which torch documents by this name"),
    PrivateName("torch.utils", "_pytree", ("cli/run_folder.py", "early_exit/losses.py", "early_exit/walk.py",
        "measure.py", "quantization/packed_weight.py", "step/counting.py", "students/axes.py"),
        "walk through nested batches and outputs, those of transformers too, which torch has no public module for"),
    *(
        PrivateName("torch", name, ("functional/clipping.py",), "clip many gradients by one kernel")
        for name in (
            "_foreach_norm",
            "_foreach_mul_",
            "_foreach_clamp_min_",
            "_foreach_clamp_max_",
            "_amp_foreach_non_finite_check_and_unscale_",
        )
    ),
    PrivateName("torch.ops:aten", "_softmax_backward_data", ("functional/attention_map.py",),
        "take the gradient of a softmax without keeping more than its output"),
    *(
        PrivateName("torch.ops:aten", name, ("quantization/linear.py",), "multiply by packed integers on a CPU")
        for name in ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm")
    ),
    PrivateName("torch.cpu", "_is_avx512_bf16_supported", ("teachers/precision.py",),
        "know whether the processor has bfloat16, before torch 2.13 made `get_capabilities` public"),
    # -- torch: optimizers, schedules, loaders
    PrivateName("torch.amp.grad_scaler:GradScaler", "_step_supports_amp_scaling", ("callbacks/gradient_clipping.py",
        "training/scaled_steps.py"),
        "know that a fused optimizer unscales the gradients itself"),
    PrivateName("torch.optim.lr_scheduler:LRScheduler", "_last_lr", ("optim/own_group.py", "optim/peak_lr.py"),
        "keep what a schedule says of its rates in step with a group that is added or scaled"),
    PrivateName("torch.optim.lr_scheduler:SequentialLR", "_schedulers", ("optim/peak_lr.py",),
        "reach the schedules that a sequence or a chain is made of"),
    PrivateName("torch.utils.data:DataLoader", "_iterator", ("training/dry_run.py",),
        "copy a loader without the workers that are alive"),
    # -- transformers, torchmetrics
    PrivateName(_CONFIG, "_attn_implementation", ("models/fingerprints.py", "signals/attention.py",
        "teachers/cache/teacher.py"),
        "read which attention a model runs, and change it for one layer (`set_attn_implementation` is of a model)"),
    PrivateName(_CONFIG, "_experts_implementation", ("students/sizes.py",),
        "know which models have experts, whose way of computing `set_experts_implementation` chooses"),
    PrivateName(_CONFIG, "_name_or_path", ("models/fingerprints.py", "teachers/precision.py"),
        "leave the folder out of a fingerprint, where it is a key of `to_dict`, and of a quantised copy"),
    PrivateName(_CONFIG, "_commit_hash", ("cli/run_folder.py",),
        "say in a report which version of a model was loaded"),
    PrivateName("transformers:PreTrainedModel", "_is_hf_initialized", ("students/carry.py",
        "students/initialization.py", "students/untouched.py"),
        "tell weights that were loaded from those that were drawn"),
    PrivateName("transformers:PreTrainedModel", "_keys_to_ignore_on_save", ("students/carry.py",),
        "know what a model computes for its own size and does not save"),
    PrivateName("transformers:PreTrainedModel", "_tp_plan", ("training/parallel.py",),
        "know how a model is cut over processes"),
    PrivateName("transformers:PreTrainedModel", "_hf_peft_config_loaded", ("models/exporting.py",),
        "save a model whose adapters were merged as one that has none"),
    PrivateName("transformers.integrations.moe", "_apply_gate", ("quantization/experts.py",),
        "put the model's own activation between an expert's two layers"),
    PrivateName("torchmetrics:Metric", "_reductions", ("tasks/metrics.py",),
        "make a state anew in another shape, reduced over processes as it was"),
    PrivateName("torchmetrics:Metric", "_persistent", ("tasks/metrics.py",),
        "make a state anew, saved as the first was"),
    # -- the standard library
    PrivateName("argparse:ArgumentParser", "_actions", ("cli/parser.py",),
        "suggest the flag that a misspelt one was to be"),
    PrivateName("argparse:HelpFormatter", "_fill_text", ("cli/parser.py",),
        "keep the paragraphs of a description in --help"),
    PrivateName("typing:Generic", "_is_protocol", ("arguments.py",),
        "leave a protocol to whoever calls its methods"),
]
# fmt: on
