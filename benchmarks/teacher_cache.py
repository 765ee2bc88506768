"""A step of distillation from a filled cache, beside one of the student's own fine-tuning and one with a live teacher.

OMP_NUM_THREADS=2 python benchmarks/teacher_cache.py    # prints a table, writes benchmarks/results/teacher_cache.json

The three run in one process and take turns batch by batch: the same batches, three copies of one student, AdamW. In
every epoch the batches are drawn anew. Times are medians of a step (forward, loss, backward, optimizer) and are given
for the first epoch, which fills the cache, and for the second, which reads it. Two students: 3 of the 6 layers of a
real SST-2 teacher (../shared) on SST-2 rows, and a random Llama with 32,000 words, where the 64 best of them are kept.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lightning_distill import DistillationModule, student_from_teacher
from lightning_distill.callbacks import TeacherCache
from lightning_distill.data import TextClassificationData
from lightning_distill.objectives import HardLabel, SoftTarget

SHARED = Path(__file__).resolve().parents[2] / "shared"
Batch = dict[str, Tensor]
Case = tuple[nn.Module, nn.Module, Callable[[], Iterator[Batch]], dict[str, Any]]


def sst2(rows: int) -> Case:
    path = SHARED / "models" / "sst2-minilm-l6"
    teacher: Any = transformers.AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=False)
    data = TextClassificationData(
        train_file=SHARED / "data" / "sst2" / "train.tsv", tokenizer=path, max_train_rows=rows, batch_size=32
    )
    data.setup("fit")
    loader = data.train_dataloader()
    return teacher, student_from_teacher(teacher, num_layers=3), lambda: iter(loader), {}


def llama(rows: int, length: int = 64, words: int = 32_000) -> Case:
    torch.manual_seed(0)

    def model(width: int, layers: int) -> nn.Module:
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=words,
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                tie_word_embeddings=True,
            )
        )

    tokens = torch.randint(0, words, (rows // 8, length))

    def batches() -> Iterator[Batch]:
        for index in torch.randperm(len(tokens)).split(8):
            yield {"input_ids": tokens[index], "labels": tokens[index]}

    return model(512, 8), model(256, 4), batches, {"top_k": 64}


def race(case: Case, epochs: int) -> dict[str, Any]:
    teacher, student, batches, settings = case
    objectives = lambda: [SoftTarget(2.0, weight=0.7), HardLabel(weight=0.3)]  # noqa: E731
    modules = {
        "fine-tuning": DistillationModule(None, copy.deepcopy(student)),
        "teacher": DistillationModule(copy.deepcopy(teacher), copy.deepcopy(student), objectives()),
        "cache": DistillationModule(teacher, copy.deepcopy(student), objectives()),
    }
    folder = tempfile.mkdtemp()
    cache = TeacherCache(folder, **settings)
    cache.attach(modules["cache"])
    optimizers = {name: torch.optim.AdamW(module.student.parameters(), 1e-5) for name, module in modules.items()}
    result: dict[str, Any] = {}
    for epoch in range(epochs):
        seconds: dict[str, list[float]] = {name: [] for name in modules}
        for batch in batches():
            for name, module in modules.items():
                began = time.perf_counter()
                module.total_loss(module.losses(batch)).backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
                seconds[name].append(time.perf_counter() - began)
        base = seconds["fine-tuning"]
        result[f"epoch {epoch + 1}"] = {
            name: {
                "seconds": statistics.median(times),
                # Of each batch its own ratio: batches differ in length.
                "of fine-tuning": statistics.median(one / two for one, two in zip(times, base, strict=True)),
            }
            for name, times in seconds.items()
        }
    result["bytes"] = sum(path.stat().st_size for path in Path(folder).iterdir())
    result["rows"] = cache.misses
    cache.detach()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "teacher_cache.json")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    results = {}
    for name, case in {"SST-2, 3 of 6 layers": sst2, "Llama, 32,000 words": llama}.items():
        results[name] = race(case(options.rows), options.epochs)
        print(f"\n{name}: {results[name]['rows']} rows in {results[name]['bytes'] / 1e6:.2f} MB")
        print("| step | " + " | ".join(f"epoch {i + 1}: ms, of fine-tuning" for i in range(options.epochs)) + " |")
        print("|---" * (options.epochs + 1) + "|")
        for kind in ("fine-tuning", "teacher", "cache"):
            cells = [results[name][f"epoch {i + 1}"][kind] for i in range(options.epochs)]
            told = [f"{1000 * cell['seconds']:.1f}, {cell['of fine-tuning']:.3f}" for cell in cells]
            print(f"| {kind} | " + " | ".join(told) + " |")
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps({"threads": torch.get_num_threads(), "cases": results}, indent=1))


if __name__ == "__main__":
    main()
