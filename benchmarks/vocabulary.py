"""The loss of a language model's head: whole logits against chunks, ours, Liger's and TRL's, forward and backward.

OMP_NUM_THREADS=2 python benchmarks/vocabulary.py      # prints the table, writes benchmarks/results/vocabulary.json
python benchmarks/vocabulary.py --tokens 512 --words 32000 --rounds 5 --only time

Each loss is 0.5 forward KL + 0.5 cross entropy at temperature 1, where all of them mean the same (TRL's has the KL
alone). Times are medians of rounds in which the losses take turns in one process, after one round that compiles. Memory
is the peak above what was there before the call, in a process of its own: all of it, and without the gradients of the
hidden states and of the weight, which every one of them hands over. Widths: 576 and 960, as SmolLM2 at 135 and 360
million parameters.

Needs `pip install --no-deps -r benchmarks/requirements.txt`; a peer that is absent is left out and named.
"""

import argparse
import gc
import json
import logging
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill import functional

WIDTH, TEACHER_WIDTH = 576, 960
SIZES = {"cpu": [(512, 32_000), (512, 128_256), (1024, 32_000), (1024, 128_256)]}
SIZES["cuda"] = [(4096, 32_000), (4096, 128_256), (8192, 128_256)]
Loss = Callable[[], Tensor]


def inputs(tokens: int, words: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def normal(rows: int, width: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(rows, width, generator=generator)).to(device, dtype)

    return {
        "student": normal(tokens, WIDTH).requires_grad_(),
        "student_weight": normal(words, WIDTH, 0.05).requires_grad_(),
        "teacher": normal(tokens, TEACHER_WIDTH),
        "teacher_weight": normal(words, TEACHER_WIDTH, 0.05),
        "labels": torch.randint(0, words, (tokens,), generator=generator).to(device),
    }


def losses(given: dict[str, Tensor]) -> dict[str, Loss]:
    models = [given[name] for name in ("student", "student_weight", "teacher", "teacher_weight")]
    labels = given["labels"]

    def eager() -> Tensor:
        student, teacher = F.linear(models[0], models[1]), F.linear(models[2], models[3])
        return 0.5 * functional.soft_target(student, teacher) + 0.5 * functional.hard_label(student, labels)

    def ours() -> Tensor:
        return functional.linear_soft_target(*models, labels, soft_weight=0.5, hard_weight=0.5).loss

    found: dict[str, Loss] = {"eager": eager, "ours": ours}
    found["ours, KL alone"] = lambda: functional.linear_soft_target(*models).loss
    try:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        print(f"without liger-kernel: {error}")
    else:
        for chunk in (1024, 256):
            liger = LigerFusedLinearJSDLoss(beta=0.0, chunk_size=chunk)
            found[f"liger, chunks of {chunk}"] = lambda liger=liger: liger(*models, labels)
    try:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss
    except ImportError as error:
        print(f"without trl: {error}")
    else:
        mask = torch.ones_like(labels)[None]
        found["trl, KL alone"] = lambda: _chunked_divergence_loss(
            models[0][None], models[2][None], models[1], models[3], mask, beta=0.0
        )[0]
    return found


def step(loss: Loss, given: dict[str, Tensor]) -> float:
    for name in ("student", "student_weight"):
        given[name].grad = None
    value = loss()
    value.backward()
    if value.device.type == "cuda":
        torch.cuda.synchronize()
    return float(value)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def peak(tokens: int, words: int, device: str, name: str, answer: Any) -> None:
    """Bytes at the peak of one forward and backward above what was there before."""
    quiet()
    small = inputs(64, 512, device)
    step(losses(small)[name], small)
    given = inputs(tokens, words, device)
    loss = losses(given)[name]
    if "liger" in name:
        # It compiles for these sizes, and the compiler's memory is not the loss's.
        step(loss, given)
        given["student"].grad = given["student_weight"].grad = None
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, given)
        answer.put(torch.cuda.max_memory_allocated() - before)
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        step(loss, given)
        answer.put(resident("VmHWM") - before)


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def times(tokens: int, words: int, device: str, rounds: int) -> dict[str, dict[str, float]]:
    given = inputs(tokens, words, device)
    found = losses(given)
    values = {name: step(loss, given) for name, loss in found.items()}
    seconds: dict[str, list[float]] = {name: [] for name in found}
    order = list(found.items())
    for _ in range(rounds):
        # Each comes after another in each round: what runs after the whole logits finds the memory torn up.
        order = [*order[2:], *order[:2]][::-1]
        for name, loss in order:
            began = time.perf_counter()
            step(loss, given)
            seconds[name].append(time.perf_counter() - began)
    return {name: {"seconds": statistics.median(taken), "loss": values[name]} for name, taken in seconds.items()}


def memory(tokens: int, words: int, device: str) -> dict[str, dict[str, float]]:
    handed_over = (words * WIDTH + tokens * WIDTH) * (4 if device == "cpu" else 2)
    context = multiprocessing.get_context("spawn")
    result = {}
    for name in losses(inputs(8, 16, device)):
        answer = context.Queue()
        process = context.Process(target=peak, args=(tokens, words, device, name, answer))
        process.start()
        found = answer.get(timeout=600)
        process.join()
        result[name] = {"peak": found, "peak_without_gradients": found - handed_over}
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| tokens x words | loss | seconds | of eager | peak MB | of eager | without gradients | of eager |"]
    lines.append("|" + "---|" * 8)
    for size, losses_ in results.items():
        base = losses_["eager"]
        for name, row in losses_.items():
            cells = [size, name]
            for kind, unit in (("seconds", 1.0), ("peak", 1e6), ("peak_without_gradients", 1e6)):
                known = kind in row and kind in base
                cells += [f"{row[kind] / unit:.3g}", f"{row[kind] / base[kind]:.3f}"] if known else ["", ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--words", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["time", "memory"], help="measure this alone; the file keeps the other")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "vocabulary.json")
    options = parser.parse_args()
    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [(options.tokens, options.words)] if options.tokens and options.words else SIZES[device]
    options.output.parent.mkdir(exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    if options.only and options.output.exists():
        results = json.loads(options.output.read_text())["sizes"]
    for tokens, words in sizes:
        size = results.setdefault(f"{tokens} x {words}", {})
        measured = [] if options.only == "memory" else [times(tokens, words, device, options.rounds)]
        measured += [] if options.only == "time" else [memory(tokens, words, device)]
        for part in measured:
            for name, row in part.items():
                size[name] = size.get(name, {}) | row
        print(table({f"{tokens} x {words}": size}), flush=True)
        options.output.write_text(json.dumps({"device": device, "sizes": results}, indent=1))
        gc.collect()


if __name__ == "__main__":
    main()
