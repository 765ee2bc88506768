"""The recipe of pictures: digits, a ResNet from a file, a transformer and a folder of pictures, two processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from lightning_distill.data import ImageData
from lightning_distill.models.cifar_resnet import CifarResNet
from lightning_distill.models.pretrained import export, load_module
from tests.helpers.recipes import OF_A_FEW_ROWS, load_recipe, refusal, summary

pytestmark = OF_A_FEW_ROWS
PROCESSOR = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], None]:
    return load_recipe("vision")


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """A folder of dark and light pictures, as flags of a short run."""
    random = np.random.default_rng(0)
    for number in range(24):
        file = tmp_path / "pictures" / ("dark", "light")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((random.integers(100, size=(12, 10, 3)) + 100 * (number % 2)).astype(np.uint8)).save(file)
    return [
        f"--data.train_file={tmp_path / 'pictures'}", "--data.batch_size=8", "--trainer.max_epochs=1",
        f"--output_dir={tmp_path / 'out'}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip


@pytest.fixture
def resnet(tmp_path: Path) -> str:
    """A ResNet with its image processor, as the recipe writes it."""
    processor = PROCESSOR(do_resize=False, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    return str(export(CifarResNet(14, 2, class_names=["dark", "light"]), tmp_path / "teacher", processor))


def test_a_resnet_teaches_a_smaller_one(main: Any, pictures: list[str], resnet: str, tmp_path: Path) -> None:
    flags = [
        *pictures,
        f"--model.teacher={resnet}",
        "--data.padding=2",
        "--data.flip=true",
        "--metric=macro_f1,accuracy",
    ]
    main([*flags, f"--teacher_cache.path={tmp_path / 'cache'}", "--teacher_cache.top_k=null"])
    assert summary(tmp_path)["student"]["metric_name"] == "macro_f1"
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    student = load_module(CifarResNet, tmp_path / "out" / "student")
    assert student.hparams == {"depth": 8, "num_labels": 2, "channels": 3, "class_names": ["dark", "light"]}
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out" / "student")
    assert list(processor.image_std) == [0.25] * 3
    # What was written is a teacher.
    main([*pictures, f"--model.teacher={tmp_path / 'out' / 'student'}", f"--output_dir={tmp_path / 'second'}"])


def test_a_transformer_teaches_a_shallower_one_and_a_resnet(main: Any, pictures: list[str], tmp_path: Path) -> None:
    names = {"id2label": {0: "light", 1: "dark"}, "label2id": {"light": 0, "dark": 1}}
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, **names)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    PROCESSOR(size=8).save_pretrained(tmp_path / "vit")
    main([*pictures, f"--model.teacher={tmp_path / 'vit'}"])
    student = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "student")
    assert (student.config.num_hidden_layers, student.config.label2id) == (2, names["label2id"])
    other = [*pictures, f"--output_dir={tmp_path / 'second'}", "--model.depth=8"]
    main([*other, f"--model.teacher={tmp_path / 'vit'}"])
    assert load_module(CifarResNet, tmp_path / "second" / "student").class_names == ["light", "dark"]


def test_without_any_file(main: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    trial = ["--trainer.max_epochs=1", "--model.teacher_epochs=1", "--trainer.enable_progress_bar=false"]
    limits = [f"--trainer.limit_{split}_batches=2" for split in ("train", "val", "test")]
    main([f"--output_dir={tmp_path / 'out'}", *trial, *limits, "--trainer.accelerator=cpu"])
    assert summary(tmp_path)["student"]["metric_name"] == "accuracy"


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_two_processes(main: Any, pictures: list[str], resnet: str, tmp_path: Path) -> None:
    shared = ["--trainer.strategy=ddp_fork", "--trainer.devices=2", "--data.batch_size=4"]
    main([*pictures, f"--model.teacher={resnet}", "--data.flip=true", *shared])
    assert load_module(CifarResNet, tmp_path / "out" / "student").class_names == ["dark", "light"]


def test_a_finished_run_is_resumed_with_the_same_pictures_alone(
    main: Any, pictures: list[str], resnet: str, tmp_path: Path, capsys: Any
) -> None:
    flags = [*pictures, f"--model.teacher={resnet}"]
    main(flags)
    main([*flags, "--resume"])
    file = tmp_path / "pictures" / "dark" / "0.png"
    Image.new("RGB", (10, 12)).save(file)
    assert "the contents of these have changed since: --data.train_file" in refusal(main, [*flags, "--resume"], capsys)


def test_what_is_wrong_is_one_line(main: Any, pictures: list[str], resnet: str, tmp_path: Path, capsys: Any) -> None:
    flags = [*pictures, f"--model.teacher={resnet}"]
    assert "`depth` to be 6 n + 2 (8, 14, 20 ...), but got 12" in refusal(main, [*flags, "--model.depth=12"], capsys)
    missing = [*pictures, f"--model.teacher={tmp_path / 'nothing.safetensors'}"]
    assert "--model.teacher" in refusal(main, missing, capsys)
    (tmp_path / "pictures" / "dark" / "0.png").write_bytes(b"text")
    assert "0.png: not a picture of a known kind" in refusal(main, flags, capsys)


def test_a_folder_holds_another_class_or_no_weights(resnet: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`folder` to be a folder that `export` wrote of a Identity, .*a CifarResNet"):
        load_module(torch.nn.Identity, resnet)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`path` to hold weights of a CifarResNet"):
        CifarResNet.from_pretrained(tmp_path / "empty")


def test_the_embedded_digits_have_the_flags_of_the_data() -> None:
    pytest.importorskip("sklearn")
    assert ImageData.embedded(padding=1, batch_size=7).batch_size == 7
