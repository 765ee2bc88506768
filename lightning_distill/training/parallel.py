"""Models over several devices: by shards of every layer (FSDP2), by a tensor-parallel plan, by copies (DDP)."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_distill.functional.tensors import local
from lightning_distill.objectives import Objective
from lightning_distill.teachers.precision import is_quantized

_STYLES = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
}


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Cut every parameter over the processes of a mesh (FSDP2), by layer.

    Each layer of a transformers model is a group of parameters, and what is left is one more.

    A group is put together only while it runs. Frozen parameters are cut too, and get no gradient. A module that is no
    transformers model is one group.

    Args:
        model: The model, in place, before its optimizer is made.
        mesh: One-dimensional, for example ``self.device_mesh["data_parallel"]`` in ``configure_model``.

    Returns:
        The same model.

    Example:
        >>> from lightning_distill.training.parallel import shard
        >>> student = shard(student, self.device_mesh["data_parallel"])  # doctest: +SKIP
    """
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer) and part is not model]
    for module in (*layers, model):
        module.register_forward_hook(_of_their_own)  # before FSDP2's own, which then finds no view
        fully_shard(module, mesh=mesh)
    return model


class _OfItsOwn(torch.autograd.Function):
    """A tensor in the same memory that is no view: FSDP2 hooks the outputs of a module, and warns of views."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _of_their_own(module: nn.Module, args: Any, output: Any) -> Any:
    return apply_to_collection(output, Tensor, lambda value: _OfItsOwn.apply(value) if value.requires_grad else value)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Split the matrices of each layer over the processes of a mesh, by the plan that transformers has for the model.

    Every process reads the same batch. What the plan leaves out (embeddings, norms) is the same on every process.

    Args:
        model: A model with a plan, such as Llama or Qwen3; in place, before its optimizer is made.
        mesh: One-dimensional, for example ``self.device_mesh["tensor_parallel"]`` in ``configure_model``.

    Returns:
        The same model.

    Raises:
        ValueError: If there is no plan, it asks for more than splitting matrices, or the heads cannot be divided.

    Example:
        >>> from lightning_distill.training.parallel import tensor_parallel
        >>> student = tensor_parallel(student, self.device_mesh["tensor_parallel"])  # doctest: +SKIP
    """
    _check_heads(model, mesh.size())
    plan = _plan(model)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, module in list(model.named_modules()):
        style = next((style for pattern, style in plan.items() if fnmatchcase(name, pattern)), None)
        if style is None:
            _replicate(module, mesh)
        else:
            parallelize_module(module, mesh, _STYLES[style]())  # type: ignore[operator]
    transformer: Any = model
    if transformer.config.tie_word_embeddings:
        # Each has got a parameter of its own above; both are cut by the words.
        transformer.get_output_embeddings().weight = transformer.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])  # a new parameter asks for a gradient, a teacher's too
    return model


def _replicate(module: nn.Module, mesh: DeviceMesh) -> None:
    """Hold a module's own parameters as DTensors too, for an optimizer cannot mix these with plain tensors."""
    if any(True for _ in module.parameters(recurse=False)):
        distribute_module(module, mesh, input_fn=_replicated, output_fn=_plain)  # type: ignore[arg-type]


def _plan(model: nn.Module) -> dict[str, str]:
    plan = dict(getattr(model, "_tp_plan", None) or {})
    unknown = sorted(set(plan.values()) - set(_STYLES))
    if not plan or unknown:
        raise ValueError(
            "Expected a model that transformers has a tensor-parallel plan for, such as Llama or Qwen3, but got a "
            f"{type(model).__name__} with {unknown or 'none'}; use `data_parallel_size` alone."
        )
    return plan


def _check_heads(model: nn.Module, size: int) -> None:
    config: Any = getattr(model, "config", None)
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (found := getattr(config, name, None) or 0) % size:
            raise ValueError(
                f"Expected `tensor_parallel_size` to divide the model's `{name}`, but got {size} and {found}; choose "
                "another size."
            )


def _replicated(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
    return tuple(
        DTensor.from_local(x, mesh, [Replicate()], run_check=False) if isinstance(x, torch.Tensor) else x
        for x in inputs
    )


def _plain(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
    return local(output)


def parallelize(student: nn.Module, teacher: nn.Module | None, objectives: nn.ModuleDict, mesh: DeviceMesh) -> None:
    """Split the models over ``mesh["tensor_parallel"]``, then shard all over ``mesh["data_parallel"]``.

    Args:
        student: In place, as all of them.
        teacher: Whole on every process where it is quantised or has no plan.
        objectives: Those with parameters of their own take part.
        mesh: Of two dimensions, as ``ModelParallelStrategy`` makes it.

    Raises:
        ValueError: If the student has no plan.
    """
    learning = [objective for objective in objectives.values() if any(True for _ in objective.parameters())]
    resting = [] if teacher is None or is_quantized(teacher) else [teacher]
    if mesh["tensor_parallel"].size() > 1:
        tensor_parallel(student, mesh["tensor_parallel"])
        for model in resting:
            if getattr(model, "_tp_plan", None):
                tensor_parallel(model, mesh["tensor_parallel"])
        for objective in learning:
            for module in objective.modules():
                _replicate(module, mesh["tensor_parallel"])
    if mesh["data_parallel"].size() > 1:
        for model in (student, *resting, *learning):
            shard(model, mesh["data_parallel"])


def check_requests(objectives: Iterable[Objective]) -> None:
    """Refuse, by a ValueError, objectives on attention where a process holds a part of the heads."""
    needy = [objective.name for objective in objectives if objective.student_request.attention]
    if needy:
        raise ValueError(
            "Expected argument `objectives` to read no attention under tensor parallelism, where a process has a part "
            f"of the heads, but got {needy}; use `tensor_parallel_size=1`."
        )


def is_parallel(module: nn.Module) -> bool:
    """Whether a module holds parts of parameters whose other parts are elsewhere."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def check_trainer(trainer: L.Trainer, student: nn.Module, teacher: nn.Module | None) -> None:
    """Refuse a Trainer, whose processes know each other, that would train or save something else than is meant.

    Raises:
        ValueError: If DeepSpeed would save the teacher, a static graph would meet accumulation, SyncBatchNorm would
            have to run on a CPU, or the teachers of two processes differ.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy) and teacher is not None and not strategy.exclude_frozen_parameters:
        raise ValueError(
            "Expected argument `strategy` of the Trainer to leave the frozen teacher out of checkpoints, but got a "
            "DeepSpeedStrategy that saves it; pass `DeepSpeedStrategy(..., exclude_frozen_parameters=True)`."
        )
    static = isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("static_graph")
    if static and trainer.accumulate_grad_batches > 1:
        raise ValueError(
            "Expected argument `accumulate_grad_batches` of the Trainer to be 1 with `DDPStrategy(static_graph=True)`, "
            f"but got {trainer.accumulate_grad_batches}: torch learns the graph in the first backward, which "
            "accumulation leaves without DDP. Use `strategy='ddp'`."
        )
    norm = next((name for name, module in student.named_modules() if isinstance(module, _BatchNorm)), None)
    if getattr(strategy, "_layer_sync", None) is not None and strategy.root_device.type == "cpu" and norm is not None:
        raise ValueError(
            "Expected argument `sync_batchnorm` of the Trainer to be False on a CPU, but got True and a student with "
            f"`{norm}`: torch's SyncBatchNorm needs a GPU. Leave it out, or use another norm."
        )
    if isinstance(strategy, DDPStrategy) and teacher is not None and trainer.world_size > 1:
        _check_same_on_every_process(strategy, teacher)


def look_for_unused(strategy: Strategy, objectives: Iterable[Objective]) -> None:
    """Tell DDP, before it wraps, that a student's head has no gradient where no objective reads its logits.

    What the strategy's user has said about unused parameters or a static graph holds. Of objectives that a callback
    adds it is not known whether they reach the head.
    """
    own = [objective for objective in objectives if objective.total == "loss"]
    if not isinstance(strategy, DDPStrategy) or any(objective.reads_logits for objective in own):
        return
    if not {"find_unused_parameters", "static_graph"} & strategy._ddp_kwargs.keys():
        strategy._ddp_kwargs["find_unused_parameters"] = True
        rank_zero_info(
            "No objective reads the student's logits, so DDP is told to look for parameters without gradient."
        )


def _check_same_on_every_process(strategy: DDPStrategy, teacher: nn.Module) -> None:
    """DDP is told not to broadcast the teacher, which each process has loaded: one number says that it is the same."""
    floats = [tensor.detach() for tensor in teacher.state_dict().values() if tensor.is_floating_point()]
    # A teacher whose answers are all in a cache has no weights, and is the same everywhere.
    nothing = torch.zeros((), dtype=torch.double, device=strategy.root_device)
    mine = sum((tensor.double().sum().to(strategy.root_device) for tensor in floats), nothing)
    highest, lowest = strategy.reduce(torch.stack([mine, -mine]), reduce_op="max").tolist()
    if highest != -lowest:
        raise ValueError(
            f"Expected argument `teacher` to be the same on every process, but got weights of the sums {-lowest} to "
            f"{highest}; load it from one folder, or seed its making."
        )
