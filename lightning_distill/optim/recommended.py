"""Learning rates commonly recommended, with where they come from."""

import warnings
from typing import Literal, NamedTuple

from torch.optim import SGD, Optimizer

from lightning_distill.arguments import between, one_of, typed


class LRRange(NamedTuple):
    """A range of learning rates and its source."""

    low: float
    high: float
    source: str

    def warn_if_far(self, lr: float) -> None:
        """Warn if a learning rate is more than ten times outside."""
        if not self.low / 10 <= lr <= self.high * 10:
            warnings.warn(
                f"The learning rate {lr:g} is more than ten times outside the recommended range from {self.low:g} to "
                f"{self.high:g} ({self.source}).",
                stacklevel=2,
            )


_FULL = "Devlin et al. 2019, appendix A.3 (2e-5 to 5e-5), and common practice by task"
_LORA = "Hu et al. 2021, appendix D: RoBERTa 2e-4 to 5e-4, GPT-2 and GPT-3 2e-4, DeBERTa XXL 6e-5 to 2e-4"
_TASKS = {
    "classification": LRRange(1e-5, 3e-5, _FULL),
    "multi_label": LRRange(1e-5, 3e-5, _FULL),
    "regression": LRRange(1e-5, 3e-5, _FULL),
    "token_classification": LRRange(3e-5, 5e-5, _FULL),
    "question_answering": LRRange(3e-5, 5e-5, _FULL),
    "generation": LRRange(5e-5, 1e-4, _FULL),
}
_METHODS = {
    "head": LRRange(1e-4, 5e-4, "common practice for a new head on a frozen body"),
    "lora": LRRange(6e-5, 5e-4, _LORA),
}
_SGD = LRRange(1e-3, 1e-2, "common practice for fine-tuning with momentum")


@typed
def recommended_lr(
    task: Literal[
        "classification", "multi_label", "regression", "token_classification", "question_answering", "generation"
    ] = "classification",
    method: Literal["full", "head", "lora"] = "full",
    optimizer: str | type[Optimizer] = "adamw",
    num_examples: int | None = None,
) -> LRRange:
    """The range of learning rates commonly recommended for fine-tuning a transformer.

    Args:
        task: What the model learns; it matters for full fine-tuning.
        method: Whether all weights, only a head, or LoRA adapters are trained.
        optimizer: As in :func:`build_optimizer`. For SGD the range is its own; the others share Adam's.
        num_examples: Size of the training data: below 1,000 the lower half of the range (on a logarithmic scale), above
            100,000 the upper half.

    Returns:
        The range.

    Raises:
        ValueError: If an argument is not one of those listed.

    Example:
        >>> from lightning_distill.optim import recommended_lr
        >>> recommended_lr("classification", num_examples=50_000)[:2]
        (1e-05, 3e-05)
        >>> recommended_lr("classification", "lora")[:2]
        (6e-05, 0.0005)
    """
    one_of("task", task, _TASKS)
    one_of("method", method, ("full", *_METHODS))
    low, high, source = _SGD if optimizer in ("sgd", SGD) else _METHODS.get(method, _TASKS[task])
    if num_examples is not None:
        between("num_examples", num_examples, 0)
        middle = (low * high) ** 0.5
        low, high = (low, middle) if num_examples < 1_000 else (middle, high) if num_examples > 100_000 else (low, high)
    return LRRange(low, high, source)
