"""``lightning-distill quantize``: a folder in, a GPTQ folder out."""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from lightning_distill.arguments import integer
from lightning_distill.cli.parser import FlagParser
from lightning_distill.cli.screen import quiet
from lightning_distill.models.folders import check_folder
from lightning_distill.models.pretrained import load_pretrained, load_tokenizer
from lightning_distill.quantization.checkpoint import save
from lightning_distill.quantization.model import LayerReport, quantize


def main(argv: Sequence[str] | None = None) -> None:
    """Quantise a transformers folder by GPTQ, calibrated on the lines of a text file.

    Args:
        argv: Arguments; None for those of the shell.

    Raises:
        ValueError: If the model or the data cannot be read, an option is outside its set, or ``--output`` holds what
            was not written here.
    """
    parser = FlagParser("lightning-distill quantize", description="Quantise a folder by GPTQ.")
    parser.add_argument("--model", required=True, help="folder of a transformers model with its tokenizer")
    parser.add_argument("--data", required=True, type=Path, help="text file; each line calibrates, up to its first tab")
    parser.add_argument("--output", type=Path | None, help="folder to write; default: the model's with -gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--embedding-bits", type=int | None)
    parser.add_argument("--num-samples", type=int, default=256)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args(None if argv is None else list(argv))
    for name in ("num_samples", "max_length", "batch_size"):
        integer(f"--{name.replace('_', '-')}", arguments[name], 1)
    output = arguments.output or Path(f"{arguments.model.rstrip('/')}-gptq")
    check_folder(output, "--output", sources=[arguments.model])
    if not arguments.data.is_file():
        raise ValueError(f"Expected argument `--data` to be a text file, but got {arguments.data}.")
    lines = [line.split("\t")[0].strip() for line in arguments.data.read_text().splitlines()]
    lines = [line for line in lines if line][: arguments.num_samples]
    with quiet():
        _quantize(arguments, lines, output)


def _quantize(arguments: Namespace, lines: list[str], output: Path) -> None:
    model = load_pretrained(arguments.model, "--model")
    tokenizer = load_tokenizer(arguments.model, "--model", model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = [
        dict(
            tokenizer(
                lines[start : start + arguments.batch_size],
                padding=True, truncation=True, max_length=arguments.max_length, return_tensors="pt",
            )
        )
        for start in range(0, len(lines), arguments.batch_size)
    ]  # fmt: skip
    quantized, report = quantize(
        model,
        encoded,
        bits=arguments.bits,
        group_size=arguments.group_size,
        embedding_bits=arguments.embedding_bits,
        num_samples=arguments.num_samples,
        on_layer=_say,
    )
    save(quantized, output, tokenizer)
    print(f"{sum(layer.bits > 0 for layer in report)} layers quantised, written to {output}")


def _say(layer: LayerReport, total: int) -> None:
    print(f"{layer.name}: error {layer.error:.2%}, rounding {layer.rounding_error:.2%} {layer.note}", flush=True)
