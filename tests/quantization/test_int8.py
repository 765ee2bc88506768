import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule
from lightning_distill.models.pretrained import export
from lightning_distill.quantization import export_onnx_int8, load_in_4bit, load_in_8bit, quantize_int8
from tests.quantization.test_model import batches, bert, distilbert, llama, logits


def needs(module: str, extra: str) -> pytest.MarkDecorator:
    absent = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(absent, reason=f"needs the extra `{extra}`: pip install 'lightning-distill[{extra}]'")


needs_torchao = needs("torchao", "int8")
needs_bitsandbytes = needs("bitsandbytes", "bitsandbytes")
needs_onnx = needs("onnxruntime", "onnx")


def far(model: nn.Module, other: nn.Module, batch: dict) -> float:
    expected = logits(model, batch)
    return float((logits(other, batch) - expected).norm() / expected.norm())


def wide(build) -> nn.Module:
    """At least one block of 64 weights in each row, as bitsandbytes needs."""
    model = build()
    return type(model)(type(model.config)(**{**model.config.to_diff_dict(), "hidden_size": 64, "head_dim": 32}))


@needs_torchao
@pytest.mark.parametrize("build", [bert, distilbert, llama], ids=lambda build: build.__name__)
def test_torchao_int8_answers_nearly_the_same(build) -> None:
    model = build()
    (batch,) = batches(model, 1)
    quantized = quantize_int8(model)
    assert 0 < far(model, quantized, batch) < 0.05
    kinds = {name: type(m.weight).__name__ for name, m in quantized.named_modules() if isinstance(m, nn.Linear)}
    left = {name for name, kind in kinds.items() if kind == "Parameter"}
    assert left
    assert all("classifier" in name or name in ("lm_head", "bert.pooler.dense") for name in left)
    assert all(kinds[name] == "Int8Tensor" for name in kinds.keys() - left)
    assert all(type(m.weight) is nn.Parameter for m in model.modules() if isinstance(m, nn.Linear))
    with pytest.raises(ValueError, match="leaves none"):
        quantize_int8(model, exclude=("*",))


@needs_torchao
def test_what_torchao_has_quantised_is_no_file(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    for model in (bert(), plain):
        quantized = quantize_int8(model, exclude=())
        for student in (quantized, torch.compile(quantized, backend="eager")):
            with pytest.raises(ValueError, match=r"Expected argument `model` .*Int8Tensor in `.*weight`.*before"):
                export(student, tmp_path / "student")
        with pytest.raises(ValueError, match="Int8Tensor"):
            export_onnx_int8(quantized, torch.ones(2, 64), tmp_path / "student.onnx")
    with pytest.raises(ValueError, match="Int8Tensor"):
        DistillationModule(None, quantize_int8(plain)).export(tmp_path / "student")
    assert not list(tmp_path.iterdir())


@needs_bitsandbytes
@pytest.mark.parametrize("load", [load_in_8bit, load_in_4bit, lambda path: load_in_4bit(path, "fp4")])
@pytest.mark.parametrize("build", [bert, llama], ids=lambda build: build.__name__)
def test_bitsandbytes_loads_and_answers_nearly_the_same(build, load, tmp_path: Path) -> None:
    model = wide(build)
    (batch,) = batches(model, 1)
    model.save_pretrained(tmp_path)
    quantized = load(tmp_path)
    assert 0 < far(model, quantized.cpu(), batch) < 0.25
    kinds = {name: type(m).__name__ for name, m in quantized.named_modules() if isinstance(m, nn.Linear)}
    assert {name for name, kind in kinds.items() if kind == "Linear"} <= {"classifier", "bert.pooler.dense", "lm_head"}
    assert sum(kind.startswith("Linear8bitLt") or kind.startswith("Linear4bit") for kind in kinds.values()) >= 12


@needs_bitsandbytes
def test_an_8_bit_teacher_teaches(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    teacher, student = load_in_8bit(tmp_path), bert()
    before = student.classifier.weight.detach().clone()
    rows = [{**batch, "labels": torch.zeros(4, dtype=torch.long)} for batch in batches(student)]
    module = DistillationModule(teacher, student)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=2, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(module, DataLoader(rows, batch_size=None))
    assert not torch.equal(before, student.classifier.weight)


@needs_onnx
@pytest.mark.parametrize("build", [bert, lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))])
def test_onnxruntime_answers_nearly_the_same_for_other_sizes(build, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    model = build().eval()
    text = isinstance(model, transformers.PreTrainedModel)
    example, other = batches(model, 2) if text else ({"input": torch.randn(n, 32)} for n in (4, 7))
    if text:
        other = {key: value[:3, :7] for key, value in other.items()}
    path = export_onnx_int8(model, example if text else example["input"], tmp_path / "deep" / "model.onnx")
    with torch.no_grad():
        expected = model(**other).logits if text else model(other["input"])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {name: value.numpy() for name, value in other.items()}
    got = torch.from_numpy(session.run(["logits"], feed)[0])
    assert got.shape == expected.shape
    assert 0 < (got - expected).norm() < 0.1 * expected.norm()
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert kinds.count("MatMulInteger") == linears


@needs_onnx
def test_onnx_is_written_whole_and_over_nothing_else(tmp_path: Path) -> None:
    model, example = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(2, 8)
    path, plain, text = (tmp_path / name for name in ("int8.onnx", "float.onnx", "thesis.txt"))
    export_onnx_int8(model, example, path)
    first = path.read_bytes()
    with torch.no_grad():
        model[0].weight.mul_(2)
    export_onnx_int8(model, example, path)
    assert path.read_bytes() != first
    assert [file.name for file in tmp_path.iterdir()] == ["int8.onnx"]

    torch.onnx.export(model, (example,), plain, dynamo=True, verbose=False, external_data=False)
    text.write_text("years of work")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(path)
    there = {file: file.read_bytes() for file in (path, plain, text)}
    for file in (plain, text, tmp_path / "folder", tmp_path / "link"):
        with pytest.raises(ValueError, match="Expected argument `path` to be a new file"):
            export_onnx_int8(model, example, file)
    assert there == {file: file.read_bytes() for file in there}

    with pytest.raises(RuntimeError):  # of a graph that cannot be made
        export_onnx_int8(nn.Sequential(nn.Linear(3, 3)), example, path)
    assert path.read_bytes() == there[path]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("call", "module", "extra"),
    [
        (lambda folder: quantize_int8(bert()), "torchao", "int8"),
        (load_in_8bit, "bitsandbytes", "bitsandbytes"),
        (load_in_4bit, "bitsandbytes", "bitsandbytes"),
        (lambda folder: export_onnx_int8(bert(), {}, folder / "x.onnx"), "onnxscript", "onnx"),
    ],
)
def test_a_missing_extra_is_named(call, module: str, extra: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    monkeypatch.setitem(__import__("sys").modules, f"{module}.quantization", None)
    with pytest.raises(ModuleNotFoundError, match=rf"\[{extra}\]"):
        call(tmp_path)


def test_another_type_of_4_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="`quant_type`"):
        load_in_4bit("anywhere", "int4")
