"""GPTQ against rounding, against the paper's algorithm as written, and against gptqmodel and optimum.

    pip install -c constraints.txt ".[gptq,int8,onnx,bitsandbytes]"
    python benchmarks/gptq.py quality    error of layers and perplexity at 4, 3 and 2 bits (needs ../shared)
    python benchmarks/gptq.py layers     seconds for single layers, and the share that is matrix work
    python benchmarks/gptq.py model      seconds for a whole model of 12 layers
    python benchmarks/gptq.py student --student <folder>   accuracy, bytes, latency on SST-2
    python benchmarks/gptq.py plot       docs/images/gptq.png from what the others wrote

Each writes its numbers to --output (json). One process per command, one thread unless --threads says otherwise.
Latencies are of models in turns; `layers` and `model` count CPU seconds, which a busy machine changes least.
"""

import argparse
import contextlib
import copy
import io
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the paper's algorithm is kept with the tests

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from lightning_distill.data import train_tokenizer  # noqa: E402
from lightning_distill.measure import count_bytes, latency_ms  # noqa: E402
from lightning_distill.quantization import (  # noqa: E402
    Hessian,
    QuantLinear,
    export_onnx_int8,
    gptq_layer,
    load,
    load_in_4bit,
    load_in_8bit,
    quantize,
    quantize_int8,
    save,
    use_kernels,
)
from lightning_distill.quantization.calibration import calibrate  # noqa: E402
from tests.quantization.paper import paper_gptq  # noqa: E402

SHARED = ROOT.parent / "shared"
LENGTH = 256


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Peers print tables and progress; only what this script prints is wanted."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def write(options: argparse.Namespace, part: str, value: Any) -> None:
    found = json.loads(options.output.read_text()) if options.output.exists() else {}
    found[part] = value
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n")


def table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        print(f"| {' | '.join(cells)} |", flush=True)


# -- quality ---------------------------------------------------------------------------------------------------------


def windows(tokenizer: Any, text: str, count: int) -> list[Tensor]:
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    return [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(min(count, len(ids) // LENGTH))]


@torch.no_grad()
def perplexity(model: nn.Module, rows: list[Tensor]) -> float:
    model.eval()
    total = sum(float(model(input_ids=row[None], labels=row[None]).loss) for row in rows)
    return float(torch.tensor(total / len(rows)).exp())


def text_llama(folder: Path, steps: int) -> Path:
    """A Llama of 4 layers trained on the first 90 % of TinyStories, kept for the next run."""
    if (folder / "model.safetensors").exists():
        return folder
    text = (SHARED / "data" / "text" / "tinystories.txt").read_text()
    text = text[: int(0.9 * len(text))]
    tokenizer = train_tokenizer(text.split("\n"), vocab_size=1024)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).train()
    rows = torch.stack(windows(tokenizer, text, 10**6))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        batch = rows[torch.randint(len(rows), (8,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"text llama: step {step}, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def by_paper(model: nn.Module, names: list[str], data: list[dict[str, Tensor]], bits: int, group: int) -> nn.Module:
    """The whole model by the transcription of the paper's Algorithm 1, in float64, without packing."""
    model = copy.deepcopy(model)
    layers = {name: model.get_submodule(name) for name in names}
    for together, inputs in calibrate(model, layers, data):
        hessian = Hessian(inputs[0].shape[-1])
        for rows in inputs:
            hessian.update(rows)
        for name in together:
            weight = layers[name].weight
            weight.data.copy_(paper_gptq(weight.detach(), hessian.matrix(), bits, group).float())
    return model


def by_gptqmodel(folder: Path, rows: list[Tensor], bits: int, group: int, skip: str | None, out: Path) -> nn.Module:
    from gptqmodel import GPTQModel, QuantizeConfig

    settings = QuantizeConfig(
        bits=bits, group_size=group, sym=True, offload_to_disk=False, dynamic={f"-:{skip}": {}} if skip else None
    )
    model = GPTQModel.load(str(folder), settings, device="cpu", dtype=torch.float32)
    examples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]
    model.quantize(
        examples, batch_size=8, tokenizer=transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    )
    model.save(str(out))
    return load(out)


def mean_error(model: nn.Module, quantized: nn.Module, names: list[str], data: list[dict[str, Tensor]]) -> float:
    """Mean over layers of the relative squared error of their outputs on the float model's inputs."""
    weights: dict[str, Tensor] = {}
    for name in names:
        layer = quantized.get_submodule(name)
        weights[name] = layer.dequantize() if isinstance(layer, QuantLinear) else layer.weight.detach()
    errors = []
    for together, inputs in calibrate(model, {name: model.get_submodule(name) for name in names}, data):
        rows = torch.cat(inputs)
        for name in together:
            weight = model.get_submodule(name).weight.detach()
            errors.append(float(((weight - weights[name]) @ rows.T).square().sum() / (weight @ rows.T).square().sum()))
    return statistics.mean(errors)


def quality(options: argparse.Namespace) -> None:
    text = (SHARED / "data" / "text" / "tinystories.txt").read_text()
    split = int(0.9 * len(text))
    # The feed-forward layers of stories260k are 172 wide, which the format cannot hold.
    models = {
        "stories260k, attention": (SHARED / "data" / "stories260k", 32, ".*mlp.*"),
        "text llama": (lambda: text_llama(options.cache / "text-llama", options.steps), 64, None),
    }
    rows = []
    for title, (folder, group, skip) in models.items():
        folder = folder() if callable(folder) else folder
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = transformers.LlamaForCausalLM.from_pretrained(
            folder, trust_remote_code=False, dtype=torch.float32
        ).eval()
        calibration, held_out = windows(tokenizer, text[:split], 64), windows(tokenizer, text[split:], 32)
        data = [{"input_ids": torch.stack(calibration[i : i + 8])} for i in range(0, 64, 8)]
        rows.append({"model": title, "bits": 32, "method": "float", "error %": 0.0,
                     "perplexity": perplexity(model, held_out)})  # fmt: skip
        exclude = ("lm_head", "mlp") if skip else ("lm_head",)
        for bits in (4, 3, 2):
            settings = {"bits": bits, "group_size": group, "exclude": exclude}
            ours, report = quantize(model, data, **settings)
            names = [layer.name for layer in report if layer.bits]
            worse = [layer.name for layer in report if layer.error > layer.rounding_error]
            assert not worse, worse
            made = {
                "rounding": quantize(model, None, **settings)[0],
                "the paper's, float64": by_paper(model, names, data, bits, group),
                "ours": ours,
                f"ours, asymmetric={bits > 2}": quantize(model, data, asymmetric=bits > 2, **settings)[0],
            }
            with quiet():
                out = options.cache / "gptqmodel" / f"{title.split()[0]}-{bits}"
                made["gptqmodel"] = by_gptqmodel(folder, calibration, bits, group, skip, out)
            for method, quantized in made.items():
                error = 100 * mean_error(model, quantized, names, data)
                rows.append({"model": title, "bits": bits, "method": method, "error %": error,
                             "perplexity": perplexity(quantized, held_out)})  # fmt: skip
                print(rows[-1], flush=True)
        write(options, "quality", rows)
    table("Mean error of the layers on calibration inputs, and perplexity on held-out text", rows)


# -- time ------------------------------------------------------------------------------------------------------------

MATRIX_WORK = ("mm", "addmm", "addmm_", "addmv", "bmm", "mv", "cholesky", "triangular")


def matrix_share(call: Callable[[], object]) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        started = time.perf_counter()  # the profiler's clock
        call()
        total = time.perf_counter() - started
    names = tuple(f"aten::{name}" for name in MATRIX_WORK)
    busy = sum(
        event.self_cpu_time_total
        for event in profile.key_averages()
        if event.key in names or "cholesky" in event.key or "triangular" in event.key
    )
    return busy / 1e6 / total


def layers(options: argparse.Namespace) -> None:
    from gptqmodel.quantization import GPTQ, QuantizeConfig

    settings = QuantizeConfig(bits=4, group_size=128, desc_act=False, sym=True)
    rows = []
    sizes = ((768, 768), (768, 3072), (3072, 768), (4096, 4096))
    for width, out in [size for size in sizes if max(size) <= options.largest]:
        torch.manual_seed(0)
        linear = nn.Linear(width, out, bias=False)
        inputs = torch.randn(4, 2048, width) * torch.rand(width).mul(2).exp()

        def ours(linear: nn.Linear = linear, inputs: Tensor = inputs, width: int = width) -> None:
            hessian = Hessian(width)
            for batch in inputs:
                hessian.update(batch)
            gptq_layer(linear.weight, hessian.matrix(), bits=4, group_size=128)

        def theirs(linear: nn.Linear = linear, inputs: Tensor = inputs) -> None:
            module = copy.deepcopy(linear)
            gptq = GPTQ(module, qcfg=copy.deepcopy(settings))
            gptq.quantizer.configure(bits=4, sym=True, perchannel=True)
            with torch.no_grad():
                for batch in inputs:
                    gptq.add_batch(batch[None], torch.empty(1, len(batch), 1))
                gptq.fasterquant(percdamp=0.01, group_size=128, actorder=False)

        times: dict[str, list[float]] = {"ours": [], "gptqmodel": []}
        for _ in range(options.rounds):
            for name, call in (("ours", ours), ("gptqmodel", theirs)):
                started = time.process_time()
                with quiet():
                    call()
                times[name].append(time.process_time() - started)
        seconds = {name: statistics.median(values) for name, values in times.items()}
        rows.append({"inputs": width, "outputs": out, "ours s": seconds["ours"], "gptqmodel s": seconds["gptqmodel"],
                     "ours / gptqmodel": seconds["ours"] / seconds["gptqmodel"],
                     "matrix work %": 100 * matrix_share(ours)})  # fmt: skip
    write(options, "layers", rows)
    table(f"4 bits, group 128, 8,192 tokens, median of {options.rounds}", rows)


def model(options: argparse.Namespace) -> None:
    from optimum.gptq import GPTQQuantizer

    width = options.width
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=12,
        num_attention_heads=width // 64, max_position_embeddings=LENGTH,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = options.cache / f"llama-{width}"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    train_tokenizer(["a few words"], vocab_size=300).save_pretrained(folder)
    rows = list(torch.randint(5, 1000, (options.samples, LENGTH)))
    fresh = transformers.LlamaForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32).eval()
    data = [{"input_ids": torch.stack(rows[i : i + 8])} for i in range(0, len(rows), 8)]

    def theirs() -> None:
        examples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]
        quantizer = GPTQQuantizer(
            bits=4, dataset=examples, group_size=128, damp_percent=0.01, batch_size=8, pad_token_id=0
        )
        quantizer.quantize_model(copy.deepcopy(fresh))

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: save(quantize(fresh, data, num_samples=len(rows))[0], options.cache / "ours"),
        "optimum": theirs,
        "gptqmodel": lambda: by_gptqmodel(folder, rows, 4, 128, None, options.cache / "theirs"),
    }
    seconds = {}
    for name, call in calls.items():
        started = time.process_time()
        with quiet():
            call()
        seconds[name] = time.process_time() - started
        print(f"{name}: {seconds[name]:.1f} s", flush=True)
    share = matrix_share(lambda: quantize(fresh, data[:1], num_samples=8)) if options.share else None
    found = [{"tool": name, "s": value, "ours / it": seconds["ours"] / value} for name, value in seconds.items()]
    write(options, "model", {"width": width, "tokens": options.samples * LENGTH, "rows": found, "share": share})
    table(f"Llama, 12 layers, width {width}, {options.samples * LENGTH:,} tokens, 4 bits, group 128", found)
    if share is not None:
        print(f"\nmatrix work: {100 * share:.0f} % of our time")


# -- a real student --------------------------------------------------------------------------------------------------


def student(options: argparse.Namespace) -> None:
    import onnxruntime

    folder = options.student
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    floats = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=False, dtype=torch.float32
    ).eval()

    def read(name: str) -> list[tuple[str, int]]:
        lines = (SHARED / "data" / "sst2" / name).read_text().splitlines()[1:]
        return [(line.split("\t")[0], int(line.split("\t")[1])) for line in lines]

    def encode(pairs: list[tuple[str, int]], size: int) -> list[dict[str, Tensor]]:
        groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
        return [dict(tokenizer([text for text, _ in group], padding=True, return_tensors="pt")) for group in groups]

    training, tested = read("train.tsv"), read("test.tsv") + read("dev.tsv")
    calibration = encode(training[:: len(training) // 256][:256], 16)
    singles, batches = encode(tested[:32], 1), encode(tested[:128], 32)
    tested.sort(key=lambda pair: len(pair[0]))  # little padding
    test, labels = encode(tested, 64), torch.tensor([label for _, label in tested])
    made: dict[str, tuple[nn.Module, int]] = {"float32": (floats, count_bytes(floats))}
    for title, settings in {
        "rounding, 4 bits, group 64": {"group_size": 64, "dataloader": None},
        "GPTQ, 4 bits, group 64": {"group_size": 64},
        "GPTQ, 4 bits, group 64, embeddings 8": {"group_size": 64, "embedding_bits": 8},
        "GPTQ, 3 bits, group 64, embeddings 8": {"bits": 3, "group_size": 64, "embedding_bits": 8},
    }.items():
        quantized, _ = quantize(floats, **{"dataloader": calibration, **settings})
        path = save(quantized, options.cache / "student")
        made[title] = (load(path), sum(file.stat().st_size for file in path.glob("*.safetensors")))
    fast = load(save(quantize(floats, calibration, group_size=64, embedding_bits=8)[0], options.cache / "student"))
    use_kernels(fast)
    made["... with torch's int4 kernel"] = (fast, made["GPTQ, 4 bits, group 64, embeddings 8"][1])
    made["int8, torchao"] = (quantize_int8(floats), 0)
    made["8 bits, bitsandbytes"] = (load_in_8bit(folder), 0)
    made["nf4, bitsandbytes"] = (load_in_4bit(folder), 0)
    path = export_onnx_int8(floats, test[0], options.cache / "student.onnx")
    made["int8, onnxruntime"] = (_Onnx(onnxruntime, path, options.threads), path.stat().st_size)

    modules = {title: model for title, (model, _) in made.items()}
    ones, many = latency_ms(modules, singles, repeats=3), latency_ms(modules, batches, repeats=3)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for title, (model, size) in made.items():
            right = torch.cat([model(**batch)["logits"].argmax(1) for batch in test]) == labels
            rows.append({"student": title, "MB": size / 1e6 or "-", "share": size / made["float32"][1] or "-",
                         "accuracy %": 100 * float(right.float().mean()), "batch 1 ms": ones[title],
                         "batch 32 ms": many[title]})  # fmt: skip
            print(rows[-1], flush=True)
    write(options, "student", rows)
    table(f"SST-2, {len(tested)} sentences of test and dev", rows)


class _Onnx(nn.Module):
    def __init__(self, onnxruntime: Any, path: Path, threads: int) -> None:
        super().__init__()
        self.settings = onnxruntime.SessionOptions()
        self.settings.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, self.settings, providers=["CPUExecutionProvider"])
        self.device = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        feed = {item.name: given[item.name].numpy() for item in self.session.get_inputs()}
        return {"logits": torch.from_numpy(self.session.run(["logits"], feed)[0])}


# -- plot ------------------------------------------------------------------------------------------------------------


def plot(options: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    found = json.loads(options.output.read_text())
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colors = {"rounding": "#b0b0b0", "gptqmodel": "#d98c21", "ours": "#1f5fa8"}
    name = found["quality"][-1]["model"]
    rows = [row for row in found["quality"] if row["model"] == name]
    for axes, key, label in ((left, "error %", "error of the layers (%)"), (middle, "perplexity", "perplexity")):
        for method, color in colors.items():
            points = [(row["bits"], row[key]) for row in rows if row["method"] == method]
            axes.plot(*zip(*points, strict=True), "o-", color=color, label=method)
        axes.set_xticks([2, 3, 4])
        axes.set_xlabel("bits")
        axes.set_title(f"{label}, {name}", fontsize=9)
        axes.set_yscale("log" if axes is left else "linear")
    (base,) = [row["perplexity"] for row in rows if row["method"] == "float"]
    middle.axhline(base, color="black", linewidth=0.8, linestyle=":")
    left.legend(frameon=False)
    bars = found["model"]["rows"]
    right.barh([row["tool"] for row in bars], [row["s"] for row in bars], color=[
        colors.get(row["tool"], "#b0b0b0") for row in bars])  # fmt: skip
    right.invert_yaxis()
    right.set_title(f"CPU seconds, 12 layers, width {found['model']['width']}", fontsize=10)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    path = ROOT / "docs" / "images" / "gptq.png"
    figure.savefig(path, dpi=120)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {call.__name__: call for call in (quality, layers, model, student, plot)}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="of `layers`")
    parser.add_argument("--largest", type=int, default=4096, help="width of `layers`")
    parser.add_argument("--steps", type=int, default=600, help="to train the Llama of `quality`")
    parser.add_argument("--width", type=int, default=768, help="of `model`")
    parser.add_argument("--samples", type=int, default=32, help="of `model`, 256 tokens each")
    parser.add_argument("--share", action="store_true", help="profile `model` too")
    parser.add_argument("--student", type=Path, help="folder of a student for SST-2")
    parser.add_argument("--cache", type=Path, default=Path("runs/gptq"), help="for models that are made on the way")
    parser.add_argument("--output", type=Path, default=Path("runs/gptq/benchmark.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger().setLevel(logging.ERROR)
    commands[options.command](options)


if __name__ == "__main__":
    main()
