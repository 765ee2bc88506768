"""Tell parameters that are as their layer drew them from those that were loaded, copied or trained."""

from torch import nn
from transformers import PreTrainedModel

from lightning_distill.following_activation import LAYERS
from lightning_distill.initialization import NORMS


def new_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of layers, embeddings and norms that hold nothing worth keeping.

    A parameter is not new if it is frozen, if transformers or :func:`~lightning_distill.student.student_from_teacher`
    marked it as loaded (a new head on a loaded body is new), if it is a copy, or if it was written to after its layer
    drew it, as an optimizer or ``load_state_dict`` does. In a model of transformers all counts as loaded if a norm's
    entries differ. In doubt a parameter is not new.

    Args:
        model: any module; what is on the meta device is new, since it has no value.

    Example:
        >>> head, loaded = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> _ = loaded.load_state_dict(head.state_dict())
        >>> sorted(new_parameters(nn.ModuleDict({"head": head, "loaded": loaded})))
        ['head.bias', 'head.weight']
    """
    parts = {
        f"{name}." if name else "": part for name, part in model.named_modules() if isinstance(part, PreTrainedModel)
    }
    trained = tuple(prefix for prefix, part in parts.items() if _has_trained_norm(part))
    new, weights = set[str](), set[int]()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if not isinstance(module, (*LAYERS, *NORMS, nn.Embedding)) or (trained and prefix.startswith(trained)):
            continue
        drawn = _versions(module, bool(parts) and prefix.startswith(tuple(parts)))
        weight = module.weight
        for kind, parameter in module.named_parameters(recurse=False):
            free = parameter.requires_grad and not getattr(parameter, "_is_hf_initialized", False)
            # A weight that is tied to a new one is new, whatever this layer would have written to it.
            untouched = weight is None or weight._version in drawn or id(weight) in weights
            if free and (parameter.is_meta or untouched):
                new.add(f"{prefix}{kind}")
                weights.add(id(parameter))
    return new


def _versions(module: nn.Module, in_transformers: bool) -> tuple[int, ...]:
    """How often the constructor writes to a weight in place, which torch counts: a copy starts at 0 again.

    Once, and once more for a padding row. Transformers does it a second time, and a third time where a model has a
    rule of its own for some weights, except for what a checkpoint lacked, which it draws on the meta device first.
    """
    once = 2 if isinstance(module, nn.Embedding) and module.padding_idx is not None else 1
    return (once, 2 * once, 2 * once + 1) if in_transformers else (once,)


def _has_trained_norm(model: nn.Module) -> bool:
    """A norm begins with ones (or zeros, where one is added to them), and leaves that with the first step."""
    weights = [getattr(module, "weight", None) for module in model.modules() if "Norm" in type(module).__name__]
    # What is marked says so itself, and may be only a part of the model.
    judged = [w for w in weights if w is not None and not w.is_meta and not getattr(w, "_is_hf_initialized", False)]
    return any(bool((weight != weight.flatten()[0]).any()) for weight in judged)
