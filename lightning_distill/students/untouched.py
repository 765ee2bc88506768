"""Tell parameters that are as their layer drew them from those that were loaded, copied or trained."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_distill.functional.tensors import whole
from lightning_distill.students.activations import LAYERS
from lightning_distill.students.initialization import NORMS

_STACKS = (nn.TransformerEncoder, nn.TransformerDecoder)


def untouched_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of layers, embeddings and norms that are as their layer drew them: nothing is lost there.

    A parameter is touched if it is frozen, if transformers or :func:`~lightning_distill.students.student_from_teacher`
    marked it as loaded (a new head on a loaded body is untouched), if it is a copy, or if it was written to after its
    layer drew it, as an optimizer or ``load_state_dict`` does. In a model of transformers all counts as loaded if a
    norm's entries differ. In doubt a parameter is touched.

    Args:
        model: any module; what is on the meta device is untouched, since it has no value.

    Example:
        >>> head, loaded = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> _ = loaded.load_state_dict(head.state_dict())
        >>> sorted(untouched_parameters(nn.ModuleDict({"head": head, "loaded": loaded})))
        ['head.bias', 'head.weight']
    """
    named = [(f"{name}." if name else "", module) for name, module in model.named_modules()]
    parts = tuple(prefix for prefix, part in named if isinstance(part, PreTrainedModel))
    trained = tuple(prefix for prefix, part in named if isinstance(part, PreTrainedModel) and _has_trained_norm(part))
    clones = tuple(prefix for prefix, part in named if isinstance(part, _STACKS) and _are_equal(list(part.layers)))
    found, tied = set[str](), set[int]()
    for prefix, module in named:
        if not isinstance(module, (*LAYERS, *NORMS, nn.Embedding)) or prefix.startswith(trained):
            continue
        weight = module.weight
        for kind, parameter in module.named_parameters(recurse=False):
            free = parameter.requires_grad and not getattr(parameter, "_is_hf_initialized", False)
            # A weight that is tied to an untouched one is untouched, whatever this layer would have written to it.
            as_drawn = weight is None or id(weight) in tied or _is_as_drawn(module, weight, prefix.startswith(parts))
            if free and (parameter.is_meta or as_drawn or prefix.startswith(clones)):
                found.add(f"{prefix}{kind}")
                tied.add(id(parameter))
    return found


def _are_equal(layers: list[nn.Module]) -> bool:
    """Torch's stacks hold copies of one layer, which differ from the first step on."""
    if len(layers) < 2 or any(parameter.is_meta for parameter in layers[0].parameters()):
        return False
    first, *others = ([whole(parameter.detach()) for parameter in layer.parameters()] for layer in layers)
    return all(all(map(torch.equal, first, other)) for other in others)


def _is_as_drawn(module: nn.Module, weight: Tensor, of_transformers: bool) -> bool:
    """Whether a weight was written to in place as often as its constructor does, which torch counts.

    That is once, and once more for a padding row; a copy starts at 0 again. In transformers the model draws a second
    time, in steps that differ from model to model, so there only a copy can be told; its norms tell the rest.
    """
    if of_transformers:
        return weight._version > 0
    return weight._version == (2 if isinstance(module, nn.Embedding) and module.padding_idx is not None else 1)


def _has_trained_norm(model: nn.Module) -> bool:
    """A norm begins with ones (or zeros, where one is added to them), and leaves that with the first step."""
    weights = [getattr(module, "weight", None) for module in model.modules() if "Norm" in type(module).__name__]
    # What is marked says so itself, and may be only a part of the model.
    judged = [w for w in weights if w is not None and not w.is_meta and not getattr(w, "_is_hf_initialized", False)]
    return any(bool((weight != weight.flatten()[0]).any()) for weight in map(whole, judged))
