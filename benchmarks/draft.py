"""What a student is worth as the draft of a teacher that is several times slower, taught by it and on the text alone.

    OMP_NUM_THREADS=2 python benchmarks/draft.py ../shared/data/text/tinystories.txt --output_dir runs/draft
    python benchmarks/draft.py stories.txt --output_dir runs/small --num_layers 4 --teacher_epochs 1 --seeds 0

A tokenizer of 2,000 words and a Llama of 12 layers are trained on the text (5 % each held out for validation and test),
then students of 2 of its layers by recipes/causal_lm.py, one with each seed, on the labels alone and on teacher and
labels. What is there already is not run again, so that a run that was broken off goes on. Prints a table, writes
benchmarks/results/draft.json.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_distill.data import train_causal_tokenizer

RECIPE = Path(__file__).parents[1] / "recipes" / "causal_lm.py"
RESULTS = Path(__file__).parent / "results" / "draft.json"
SEPARATOR = "<|endoftext|>"
TRAINING = ["--data.max_length=256", "--data.batch_size=16", "--optimizer.lr=1.5e-3", "--optimizer.weight_decay=0.1"]
TRAINING += ["--trainer.precision=bf16-mixed", "--model.num_layers=2"]


def prepare(text: Path, folder: Path, num_layers: int) -> None:
    """Write the three parts of the text, and a teacher that has learned nothing yet."""
    texts = [part.strip() for part in text.read_text().split(SEPARATOR) if part.strip()]
    random.Random(0).shuffle(texts)
    size = round(0.05 * len(texts))
    parts = {"test": texts[:size], "val": texts[size : 2 * size], "train": texts[2 * size :]}
    for name, part in parts.items():
        (folder / f"{name}.txt").write_text(f"\n{SEPARATOR}\n".join(part))
    tokenizer = train_causal_tokenizer(parts["train"], 2000)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=704,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        attention_dropout=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "untrained")
    tokenizer.save_pretrained(folder / "untrained")


def recipe(folder: Path, name: str, *flags: str) -> dict[str, Any]:
    """Run the recipe into a folder, unless it has been, and read what it found."""
    summary = folder / name / "summary.json"
    if not summary.exists():
        texts = [f"--data.{part}_files={folder / file}.txt" for part, file in
                 (("text", "train"), ("val", "val"), ("test", "test"))]  # fmt: skip
        command = [sys.executable, str(RECIPE), *texts, *TRAINING, *flags, f"--output_dir={folder / name}"]
        subprocess.run(command, check=True)
    found: dict[str, Any] = json.loads(summary.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help=f"documents between lines of {SEPARATOR}")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--teacher_epochs", type=int, default=6)
    parser.add_argument("--epochs", type=int, nargs="+", default=[2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_draft_tokens", type=int, default=4)
    options = parser.parse_args()
    folder = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "untrained" / "tokenizer.json").exists():
        prepare(options.text, folder, options.num_layers)
    flags = [f"--model.teacher={folder / 'untrained'}", "--model.finetune_teacher=true", "--model.baseline=false"]
    flags += [
        f"--model.teacher_epochs={options.teacher_epochs}",
        "--trainer.max_epochs=1",
        "--generation.num_prompts=0",
    ]
    recipe(folder, "teacher", *flags)
    rows: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for epochs in options.epochs:
        for seed in options.seeds:
            flags = [f"--model.teacher={folder / 'teacher' / 'teacher'}", f"--trainer.max_epochs={epochs}"]
            flags += [f"--seed={seed}", f"--generation.num_draft_tokens={options.num_draft_tokens}"]
            found = recipe(folder, f"seed{seed}_epochs{epochs}", *flags)
            models = {name: found[name] for name in ("teacher", "student_without_distillation", "student")}
            rows[f"{epochs} epochs, seed {seed}"] = {**models, "speculative": found["speculative"]}
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n| student | perplexity: teacher | without | distilled | accepted: without | distilled | speed |")
    print("|" + "---|" * 7)
    for name, row in rows.items():
        draft = row["speculative"]
        cells = [f"{row[of]['perplexity']:.2f}" for of in ("teacher", "student_without_distillation", "student")]
        cells += [f"{draft[of]:.1%}" for of in ("acceptance_without_distillation", "acceptance")]
        print(f"| {name} | " + " | ".join(cells) + f" | {draft['speedup']:.2f} |")


if __name__ == "__main__":
    main()
