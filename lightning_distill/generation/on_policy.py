"""Distillation on text that the student writes itself."""

import random
from typing import Any

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lightning_distill.arguments import between, integer
from lightning_distill.generation.prompts import prompts_of
from lightning_distill.generation.sampling import generate, settings
from lightning_distill.module import DistillationModule
from lightning_distill.objectives import Objective


class _Written(dict[str, Tensor]):
    """A batch that the student wrote."""


class OnPolicyDistillation(DistillationModule):
    r"""Trains a language model on its own text, as its teacher scores it, for a share of the batches (GKD).

    In training the student meets the data's text, in use its own, with its own mistakes. Here a batch is, with
    probability ``on_policy``, replaced by the student's continuations of prompts from that batch: student and teacher
    read them, and the objectives compare the two on the written tokens; prompts are masked. Which batches is the same
    on all ranks, and with the draws a function of the seed, the epoch and the batch, so that a resumed run does what
    one without a break does. The student writes in eval (dropout off), trains in train mode, and the random numbers of
    the training are those of a run that writes nothing.

    What the student wrote is no label of the data, so on these batches only the objectives that read the teacher are
    summed. With ``on_policy=1`` and a reverse Kullback-Leibler divergence this is what MiniLLM and GKD call on-policy
    distillation; with 0 it is :class:`DistillationModule`.

    Logged beside what :class:`DistillationModule` logs: ``train_on_policy``, 1 where the batch was written by the
    student.

    Args:
        teacher: As for :class:`DistillationModule`; its vocabulary is the student's.
        student: Likewise; a causal language model of transformers.
        objectives: Likewise, for example ``[SoftTarget(temperature=1.0, divergence="reverse_kl")]`` or ``"js"``; at
            least one reads the teacher.
        on_policy: Share of the batches that the student writes, in [0, 1].
        prompt_length: Tokens of a document that are the prompt, where the labels do not say.
        max_new_tokens: At most this many are written to each prompt.
        sampling_temperature: Divides the logits the student draws from, above 0; not the objectives' temperature.
        top_p: Only the most probable tokens whose mass reaches this are drawn from, in (0, 1].
        seed: Seed of which batches, which prompts and what is drawn.
        **kwargs: As for :class:`DistillationModule`.

    Raises:
        ValueError: If an argument is out of its range, or no objective reads the teacher.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_distill.generation import OnPolicyDistillation
        >>> from lightning_distill.objectives import SoftTarget
        >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=2, max_position_embeddings=32)
        >>> teacher, student = LlamaForCausalLM(config), LlamaForCausalLM(config)
        >>> objectives = [SoftTarget(temperature=1.0, divergence="js", beta=0.9)]
        >>> module = OnPolicyDistillation(teacher, student, objectives, prompt_length=2, max_new_tokens=4)
        >>> written = module.write({"input_ids": torch.tensor([[1, 5, 6, 7], [1, 4, 3, 8]])}, seed=0)
        >>> written["labels"][:, :2].unique().tolist()
        [-100]

    Source: Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", 2024;
    Gu et al., "MiniLLM", 2024.
    """

    def __init__(
        self,
        teacher: nn.Module | str,
        student: nn.Module | str,
        objectives: list[Objective] | dict[str, Objective] | None = None,
        *,
        on_policy: float = 0.5,
        prompt_length: int = 16,
        max_new_tokens: int = 64,
        sampling_temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, student, objectives, **kwargs)
        between("on_policy", on_policy, 0, 1, closed=True)
        integer("prompt_length", prompt_length, 1)
        if not self._needs_teacher:
            raise ValueError(
                "Expected argument `objectives` to have one that reads the teacher, because the student's own text has "
                f"no other score, but got {list(self.objectives)}. Add `SoftTarget(divergence=...)`."
            )
        self.on_policy, self.prompt_length, self.seed = on_policy, prompt_length, seed
        self.sampling = {
            "max_new_tokens": max_new_tokens,
            "do_sample": True,
            "temperature": sampling_temperature,
            "top_p": top_p,
            "vocab_size": self.forwards.shared_vocab_size,
        }
        settings(self.student, prompt_length, **self.sampling)  # type: ignore[arg-type]
        self._written = False

    def write(self, batch: Any, seed: int) -> dict[str, Tensor]:
        """The student's continuations of a prompt from each row of a batch.

        Args:
            batch: A mapping with ``input_ids`` and, where there are any, ``labels``, ``attention_mask`` and
                ``position_ids``.
            seed: Seed of the prompts and the draws.

        Returns:
            A batch, see :func:`lightning_distill.generation.generate`.
        """
        prompts = prompts_of(batch, self.prompt_length, random.Random(seed))
        # Ranks that hold parts of one model must run equally many forwards, or the first to end leaves the others.
        sharded = self._trainer is not None and isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy)
        return generate(self.student, prompts, **self.sampling, seed=seed, synced_gpus=sharded)  # type: ignore[arg-type]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The total loss of a batch, or of what the student writes to its prompts."""
        # All batches of a step are written before the first is trained on: a token weighs what the others leave it.
        place, batches = self._window.place, self._window.batches or [batch]
        for index, one in enumerate(batches):
            where = f"{self.seed} {self.current_epoch} {batch_idx - place + index}"
            if not isinstance(one, _Written) and random.Random(where).random() < self.on_policy:
                seed = random.Random(f"{where} {self.global_rank}").getrandbits(32)
                batches[index] = _Written(self.write(one, seed))
        self._written = isinstance(batches[place], _Written)
        self.log("train_on_policy", float(self._written), batch_size=1)
        try:
            return super().training_step(batches[place], batch_idx)
        finally:
            self._written = False

    def _counts(self, batch: Any) -> Tensor:
        counts = super()._counts(batch)
        if isinstance(batch, _Written):
            counts = counts * counts.new_tensor([each.needs_teacher for each in self._each_objective().values()])
        return counts

    def total_loss(self, losses: dict[str, Tensor]) -> Tensor:
        """Weighted sum of the objectives' losses; on the student's own text, of those that read the teacher."""
        if self._written:
            objectives = self._each_objective()
            losses = {name: loss for name, loss in losses.items() if objectives[name].needs_teacher}
        return super().total_loss(losses)
