"""What a step of gradient clipping costs: GradientClipping against Lightning's own and torch's.

    python benchmarks/clipping.py [--rounds 100] [--threads 1]

One process; the three are called in turn, so that whatever else the machine does hits all alike; medians of processor
time, in which the work of others does not count. Every row is one call on the same gradients. Lightning's is what
`Trainer(gradient_clip_val=...)` calls before each step. The threshold is far above the norm (no step is clipped) or far
below it (every step is); gradients are put back in between.
"logged step" is ours on a step whose norm is logged (one in 50 by default; the logger itself is left out).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import lightning as L
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import nn

from lightning_distill.callbacks import GradientClipping


def medians(calls: dict[str, Callable[[], object]], reset: Callable[[], None], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, over rounds in which every one is called once."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for round_ in range(rounds + 5):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            reset()
            start = time.process_time()
            calls[name]()
            if round_ >= 5:
                times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def compare(algorithm: str, count: int, width: int, clipped: bool, rounds: int) -> dict[str, float]:
    module = L.LightningModule()
    module.weights = nn.ParameterList(torch.randn(width, width) for _ in range(count))
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    gradients = [torch.randn(width, width) for _ in range(count)]
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    threshold = 1e-3 if clipped else 1e9

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=10**9)
    trainer.strategy.optimizers = [optimizer]
    callback = GradientClipping(algorithm, threshold)  # type: ignore[arg-type]
    module.log_dict = lambda values: None  # type: ignore[method-assign, assignment]
    precision = Precision()
    if algorithm == "norm":
        kind, torchs = GradClipAlgorithmType.NORM, nn.utils.clip_grad_norm_
    else:
        kind, torchs = GradClipAlgorithmType.VALUE, nn.utils.clip_grad_value_

    def ours(log_every: int) -> None:
        trainer.log_every_n_steps = log_every
        callback.on_before_optimizer_step(trainer, module, optimizer)

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ours(10**9),
        "logged": lambda: ours(1),
        "lightning": lambda: precision.clip_gradients(optimizer, threshold, kind),
        "torch": lambda: torchs(module.parameters(), threshold),
    }

    def reset() -> None:
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter.grad.copy_(gradient)  # type: ignore[union-attr]

    return medians(calls, reset, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = f"{options.threads} threads, processor time, medians of {options.rounds} rounds, milliseconds"
    print(f"torch {torch.__version__}, {settings}\n")
    columns = ["algorithm", "tensors", "clipped", "ours", "logged step", "Lightning", "torch"]
    print("| " + " | ".join([*columns, "ours / Lightning", "ours / torch"]) + " |")
    print("|---" * 9 + "|")
    for algorithm in ("norm", "value"):
        for count, width in ((200, 64), (2000, 32)):
            for clipped in (False, True):
                ms = compare(algorithm, count, width, clipped, options.rounds)
                ours, lightning, plain = ms["ours"], ms["lightning"], ms["torch"]
                cells = [algorithm, f"{count} of {width} x {width}", "every step" if clipped else "never"]
                cells += [
                    f"{value:.2f}" for value in (ours, ms["logged"], lightning, plain, ours / lightning, ours / plain)
                ]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
