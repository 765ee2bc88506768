"""Pictures: what is read, how it is normalised, views that are the same whoever reads them, what is refused."""

import io
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from lightning_distill import DistillationModule
from lightning_distill.callbacks import TeacherCache
from lightning_distill.data import ImageData
from lightning_distill.data.pictures import random_view
from lightning_distill.models.cifar_resnet import CifarResNet

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10"
PROCESSOR = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor


def pixels(count: int, size: tuple[int, int] = (8, 8)) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(256, size=(*size, 3)).astype(np.uint8) for _ in range(count)]


def encoded(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return file.getvalue()


ROWS = list(zip(pixels(12), [0, 1, 2] * 4, strict=True))


def refused(data: ImageData) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is what is tested
        data.setup()
    said = str(error.value)
    assert "\n" not in said
    return said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, picture in enumerate(pixels(8)):
        file = tmp_path / "pictures" / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(picture))
    return tmp_path / "pictures"


def write_parquet(path: Path, columns: dict[str, list[Any]], metadata: dict[str, str] | None = None) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns).replace_schema_metadata(metadata), path)
    return path


def test_the_same_pictures_from_a_folder_a_table_and_memory(folder: Path, tmp_path: Path) -> None:
    files = sorted(folder.rglob("*.png"))
    labels = [file.parent.name for file in files]
    images = [file.read_bytes() for file in files]
    (tmp_path / "p.jsonl").write_text(
        "".join(f'{{"image": "pictures/{f.parent.name}/{f.name}", "label": "{f.parent.name}"}}\n' for f in files)
    )
    sources = [
        ImageData(train_file=folder),
        ImageData(train_file=write_parquet(tmp_path / "bytes.parquet", {"image": images, "label": labels})),
        ImageData(train_file=write_parquet(
            tmp_path / "p.parquet", {"image": [{"bytes": b, "path": None} for b in images], "label": labels}
        )),
        ImageData(train_file=tmp_path / "p.jsonl"),
        ImageData.from_rows([(Image.open(file), file.parent.name) for file in files]),
    ]  # fmt: skip
    for data in sources:
        data.setup()
        assert data.label_names == ["cat", "dog"]
    first, *others = ([data._datasets["train"][row] for row in range(7)] for data in sources)
    for other in others:
        torch.testing.assert_close(other, first)


def test_names_in_the_metadata_of_a_schema_are_those_of_the_numbers(tmp_path: Path) -> None:
    columns = {"image": [encoded(picture) for picture, _ in ROWS], "label": [label for _, label in ROWS]}
    data = ImageData(train_file=write_parquet(tmp_path / "p.parquet", columns, {"label_names": "red,green,blue"}))
    data.setup()
    assert data.label_names == ["red", "green", "blue"]
    # In a teacher's order the numbers are other classes.
    data = ImageData(train_file=tmp_path / "p.parquet", label_names=["blue", "red", "green"])
    data.setup()
    assert data.label_ids(data._tables["test"]) == [(label + 1) % 3 for label in data._tables["test"].columns["label"]]


@pytest.mark.parametrize(
    "processor",
    [
        PROCESSOR(size=4, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]),
        PROCESSOR(do_resize=False, do_normalize=False),
    ],
)
def test_pictures_are_as_the_teacher_s_processor_makes_them(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    data = ImageData.from_rows(ROWS, ROWS)
    data.read_as(str(tmp_path), "teacher", nn.Identity())
    data.setup()
    for row, (picture, _) in enumerate(ROWS):
        expected = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(data._datasets["val"][row]["pixel_values"], expected)


def test_mean_and_deviation_that_are_given_go_first_and_imagenet_s_are_warned_of(tmp_path: Path) -> None:
    PROCESSOR(size=4).save_pretrained(tmp_path / "has")
    given = ImageData.from_rows(ROWS, mean=[0.0] * 3, std=[1.0] * 3, image_size=8)
    given.read_as(str(tmp_path / "has"), "teacher", nn.Identity())
    given.setup()
    expected = torch.from_numpy(given._tables["train"].columns["image"][0]).permute(2, 0, 1) / 255
    torch.testing.assert_close(given._datasets["train"][0]["pixel_values"], expected)
    (tmp_path / "none").mkdir()
    with pytest.warns(UserWarning, match=r"--model\.teacher .*none has no image processor"):
        ImageData.from_rows(ROWS).read_as(str(tmp_path / "none"), "--model.teacher", nn.Identity())


def test_grey() -> None:
    data = ImageData.from_rows(ROWS, channels=1, mean=[0.0], std=[1.0])
    data.setup()
    grey = np.asarray(Image.fromarray(data._tables["train"].columns["image"][0]).convert("L"))
    expected = torch.from_numpy(grey.copy())[None] / 255
    torch.testing.assert_close(data._datasets["train"][0]["pixel_values"], expected)


def epoch(data: ImageData, number: int, skip: int = 0) -> list[torch.Tensor]:
    """The batches of an epoch, without the first of them."""
    loader: Any = data.train_dataloader()
    loader.sampler.set_epoch(number)
    if skip:
        loader.load_state_dict({"epoch": number, "position": skip, "global_batch_size": data.batch_size})
    return [batch["pixel_values"] for batch in loader]


def test_views_depend_on_seed_epoch_and_row_alone() -> None:
    options: dict[str, Any] = {"batch_size": 3, "padding": 2, "flip": True}
    data = ImageData.from_rows(ROWS, ROWS, seed=1, **options)
    data.setup()
    first, second = epoch(data, 0), epoch(data, 1)
    dataset = data._datasets["train"]
    assert not any(torch.equal(dataset[row, 0]["pixel_values"], dataset[row, 1]["pixel_values"]) for row in range(6))
    torch.testing.assert_close(epoch(data, 1, skip=2), second[2:])  # resumed
    workers = ImageData.from_rows(ROWS, ROWS, seed=1, num_workers=2, **options)
    workers.setup()
    loader: Any = workers.train_dataloader()
    for number, expected in enumerate((first, second)):  # workers stay from one epoch to the next
        loader.sampler.set_epoch(number)
        torch.testing.assert_close([batch["pixel_values"] for batch in loader], expected)
    other = ImageData.from_rows(ROWS, ROWS, seed=2, **options)
    other.setup()
    assert not torch.equal(other._datasets["train"][0, 0]["pixel_values"], dataset[0, 0]["pixel_values"])
    plain = ImageData.from_rows(ROWS, ROWS, seed=1)
    plain.setup()
    validated, expected = (data._datasets["val"][0]["pixel_values"] for data in (data, plain))
    torch.testing.assert_close(validated, expected)  # no view


def test_a_view_is_a_window_of_the_picture_with_a_border() -> None:
    picture = torch.randn(3, 5, 7)
    padded = nn.functional.pad(picture, [2] * 4)
    windows = [padded[:, y : y + 5, x : x + 7] for y in range(5) for x in range(5)]
    windows += [window.flip(2) for window in windows]
    views = [random_view(picture, padding=2, flip=True, epoch=number) for number in range(400)]
    found = {next(i for i, window in enumerate(windows) if torch.equal(window, view)) for view in views}
    assert len(found) == len(windows) == 50


@pytest.mark.parametrize(("flip", "misses"), [(False, 12 + 12), (True, None)])
def test_cached_answers_are_those_of_the_view(flip: bool, misses: int | None, tmp_path: Path) -> None:
    def losses(cached: bool) -> tuple[list[torch.Tensor], Any]:
        L.seed_everything(0, verbose=False)
        data = ImageData.from_rows(ROWS, pixels_and_labels(), batch_size=6, flip=flip, padding=2 * flip)
        module = DistillationModule(CifarResNet(8, 3), CifarResNet(8, 3))
        cache = TeacherCache(tmp_path, top_k=None, dtype="float32")
        trainer = L.Trainer(
            max_epochs=2, callbacks=[cache] if cached else [], accelerator="cpu", logger=False, num_sanity_val_steps=0,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        return list(module.student.parameters()), cache

    plain, _ = losses(cached=False)
    filled, cache = losses(cached=True)
    if misses is not None:
        assert cache.misses == misses
    read, again = losses(cached=True)
    assert again.misses == 0  # a second run with the same seed sees the same views
    torch.testing.assert_close(filled, plain)
    torch.testing.assert_close(read, plain)


def pixels_and_labels() -> list[tuple[np.ndarray, int]]:
    random = np.random.default_rng(1)
    return [(random.integers(256, size=(8, 8, 3)).astype(np.uint8), label % 3) for label in range(12)]


def test_the_digits() -> None:
    pytest.importorskip("sklearn")
    data = ImageData.embedded()
    data.setup()
    assert [data.num_rows(split) for split in ("train", "val", "test")] == [1260, 179, 358]
    assert data.label_names == [str(digit) for digit in range(10)]
    assert data._datasets["train"][0]["pixel_values"].shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (b"no picture", r"train rows:3: the picture cannot be read: not a picture of a known kind"),
        (encoded(pixels(1)[0])[:60], r"train rows:3: the picture cannot be read: "),
        (None, r"train rows:3: the picture cannot be read: None is no picture"),
        ("no/where.png", r"train rows:3: the picture cannot be read: no/where\.png: No such file"),
        (np.zeros((8, 8)), r"train rows:3: .* an array of float64; expected uint8"),
        (Image.new("F", (8, 8)), r"train rows:3: .* mode 'F'; expected 8 bits a channel"),
        (pixels(1, (8, 9))[0], r"train rows:3: a picture of 9 x 8 pixels, and the first has 8 x 8; give `image_size`"),
    ],
)
def test_what_does_not_decode_is_one_line_with_its_row(picture: Any, message: str) -> None:
    rows: list[Any] = list(ROWS)
    rows[2] = (picture, 1)
    with pytest.raises(ValueError, match=message):
        ImageData.from_rows(rows, ROWS).setup()


def test_folders_that_are_wrong(folder: Path, tmp_path: Path) -> None:
    (folder / "dog" / "9.png").write_bytes(b"\x89PNG")
    assert "pictures:9: the picture cannot be read" in refused(ImageData(train_file=folder))
    assert "9.png" in refused(ImageData(train_file=folder))
    (tmp_path / "flat").mkdir()
    assert "expected one for each class" in refused(ImageData(train_file=tmp_path / "flat"))
    (tmp_path / "flat" / "train").mkdir()
    assert "its folders are splits, train" in refused(ImageData(train_file=tmp_path / "flat"))
    (folder / "bird").mkdir()
    assert "bird: there are no pictures in it" in refused(ImageData(train_file=folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": -1}, "`padding`"),
        ({"image_size": 0}, "`image_size`"),
        ({"mean": [0.5]}, r"`mean` to have 3 values, one a channel, but got \[0\.5\]"),
        ({"std": [1.0, 0.0, 1.0]}, "`std` to be above 0"),
        ({"image_column": "label"}, "`label_column` to be another one"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageData.from_rows(ROWS, **options)


@pytest.mark.filterwarnings(
    "ignore:The .*_dataloader' does not have many workers", "ignore:The number of training batches"
)
def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    guide = Path(__file__).resolve().parents[2] / "docs" / "vision.md"
    snippets = re.findall(r"^```python\n(.*?)^```", guide.read_text(), flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "guide"}
    for snippet in snippets:
        exec(compile(snippet, guide.name, "exec"), names)
    assert len(snippets) == 2
    pixel_values = names["batch"]["pixel_values"]
    torch.testing.assert_close(names["again"].eval()(pixel_values), names["student"].eval()(pixel_values))


@pytest.mark.skipif(not CIFAR.is_dir(), reason="the real pictures are not here")
def test_a_published_network_reads_real_pictures() -> None:
    pytest.importorskip("pyarrow")
    weights = CIFAR.parents[1] / "models" / "cifar10-resnet56" / "resnet20.safetensors"
    data = ImageData(train_file=CIFAR / "test.parquet", max_train_rows=200)
    data.setup()
    model = CifarResNet.from_pretrained(weights).eval()
    assert data.label_names[:2] == ["airplane", "automobile"]
    with torch.inference_mode():
        right = [(model(b["pixel_values"]).argmax(-1) == b["labels"]) for b in data.train_dataloader()]
    assert torch.cat(right).float().mean() > 0.75  # 0.815 of the first 2,000
