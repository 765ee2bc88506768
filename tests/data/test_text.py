import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from transformers import PreTrainedTokenizerFast

from lightning_distill.data import TextClassificationData, train_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:\\s*By default only one Jsonargparse"),
    pytest.mark.filterwarnings("ignore:\\s*.*instantiate"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:You requested to overfit"),
]

WORDS = [("good", "pos"), ("bad", "neg"), ("fine", "pos"), ("awful", "neg")]
ROWS = [(" ".join([word] * (1 + i % 7)) + f" {i}", label) for i in range(15) for word, label in WORDS]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([text for text, _ in ROWS], vocab_size=80)


def write(path: Path, rows: list[tuple[str, str]], header: str = "sentence\tlabel") -> Path:
    path.write_text(header + "\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return path


def test_batches_hold_every_row_once(tokenizer: PreTrainedTokenizerFast) -> None:
    data = TextClassificationData.from_rows(ROWS, ROWS[:13], ROWS[:9], tokenizer=tokenizer, batch_size=4)
    data.setup()
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()]
    for loader, rows in zip(loaders, (ROWS, ROWS[:13], ROWS[:9], ROWS[:9]), strict=True):
        seen = []
        for batch in loader:
            assert batch["input_ids"].dtype == batch["attention_mask"].dtype == batch["labels"].dtype == torch.int64
            assert batch["input_ids"].shape == batch["token_type_ids"].shape == batch["attention_mask"].shape
            assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
            assert torch.equal(batch["input_ids"] != tokenizer.pad_token_id, batch["attention_mask"].bool())
            texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
            seen += [(text, data.id2label[label]) for text, label in zip(texts, batch["labels"].tolist(), strict=True)]
        assert sorted(seen) == sorted(rows)
    assert seen == ROWS[:9]  # the rows to predict are in the order of the file
    assert (data.label_names, data.num_labels, data.label2id) == (["neg", "pos"], 2, {"neg": 0, "pos": 1})


def test_a_validation_split_is_held_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = write(tmp_path / "train.tsv", ROWS)
    data = TextClassificationData(file, tokenizer=tokenizer, val_split=0.2, seed=1, max_train_rows=20)
    train, val = data.rows("train"), data.rows("val")
    assert (len(train), len(val)) == (20, 12)
    assert not set(train) & set(val)
    assert data.rows("test") == val
    again = TextClassificationData(file, tokenizer=tokenizer, val_split=0.2, seed=1, max_train_rows=20)
    assert again.rows("train") == train
    other = TextClassificationData(file, tokenizer=tokenizer, val_split=0.2, seed=2)
    assert other.rows("val") != val
    # the classes are those of the whole file, even if the rows drawn are of one class
    assert TextClassificationData(file, max_train_rows=1).label_names == ["neg", "pos"]


def test_pairs_are_cut_to_the_length(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [("good good good", "bad fine", "a"), ("bad " * 40, "fine " * 40, "b")]
    data = TextClassificationData.from_rows(
        rows, rows, tokenizer=tokenizer, text_columns=["first", "second"], max_length=16
    )
    data.setup()
    batch = next(iter(data.predict_dataloader()))
    expected = tokenizer(*zip(*[row[:2] for row in rows], strict=True), truncation=True, max_length=16, padding=True)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert batch[name].tolist() == expected[name]
    assert batch["input_ids"].shape == (2, 16)
    assert batch["token_type_ids"].max() == 1


def test_left_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    left = train_tokenizer([text for text, _ in ROWS], vocab_size=80)
    left.padding_side = "left"
    data = TextClassificationData.from_rows(ROWS, ROWS[:8], tokenizer=left)
    data.setup()
    batch = next(iter(data.predict_dataloader()))
    assert batch["input_ids"].tolist() == left([text for text, _ in ROWS[:8]], padding=True)["input_ids"]


def test_regression(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = write(tmp_path / "a.tsv", [("good", "4.5"), ("bad", "-1"), ("fine", "3")])
    data = TextClassificationData(file, file, tokenizer=tokenizer, task="regression")
    data.setup()
    labels = next(iter(data.predict_dataloader()))["labels"]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [4.5, -1.0, 3.0]
    assert (data.label_names, data.num_labels) == ([], 1)
    with pytest.raises(ValueError, match=r"a\.tsv:2: the label '4\.5' is a fraction"):
        _ = TextClassificationData(file, file, tokenizer=tokenizer).label_names


def test_given_label_names(tmp_path: Path) -> None:
    strings = write(tmp_path / "strings.tsv", [("a", "neg"), ("b", "pos")])
    data = TextClassificationData(strings, strings, label_names=["pos", "neg"])
    assert [label for _, label in data.rows("train")] == [1, 0]
    numbers = write(tmp_path / "numbers.tsv", [("a", "1"), ("b", "0")])
    data = TextClassificationData(numbers, numbers, label_names=["negative", "positive"])
    assert [label for _, label in data.rows("train")] == [1, 0]
    assert data.id2label == {0: "negative", 1: "positive"}
    stars = write(tmp_path / "stars.tsv", [("a", "5"), ("b", "1")])
    assert [label for _, label in TextClassificationData(stars, stars).rows("train")] == [1, 0]
    with pytest.raises(ValueError, match=r"stars\.tsv:2: unknown label '5' .* the labels of `label_names` are 0, 1"):
        TextClassificationData(stars, stars, label_names=["bad", "good"]).rows("train")


def test_errors_name_file_and_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train = write(tmp_path / "train.tsv", ROWS)
    one = write(tmp_path / "one.tsv", [("a", "x"), ("b", "x")])
    strange = write(tmp_path / "strange.tsv", [*ROWS[:3], ("c", "maybe")])
    with pytest.raises(ValueError, match=r"one\.tsv: every row has the label 'x'"):
        TextClassificationData(one, tokenizer=tokenizer).setup()
    with pytest.raises(ValueError, match=r"strange\.tsv:5: unknown label 'maybe' .* of .*train\.tsv are neg, pos"):
        TextClassificationData(train, test_file=strange, tokenizer=tokenizer).setup()
    with pytest.raises(ValueError, match=r"train rows:2: 3 fields, expected 2: sentence, label"):
        TextClassificationData.from_rows([("a", "x"), ("b", "c", "y")]).rows("train")
    with pytest.raises(ValueError, match="There is no training data"):
        TextClassificationData().rows("train")
    with pytest.raises(ValueError, match="`tokenizer`"):
        TextClassificationData(train).setup()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"batch_size": 0},
        {"max_length": 0},
        {"max_train_rows": 0},
        {"val_split": 1.0},
        {"text_columns": ["a", "b", "c"]},
        {"text_columns": []},
        {"task": "ranking"},
    ],
)
def test_bad_arguments(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Expected argument `{next(iter(kwargs))}`"):
        TextClassificationData("a.tsv", **kwargs)
    with pytest.raises(ValueError, match="got both"):
        TextClassificationData("a.tsv", hub_dataset="glue/sst2")


def test_a_tokenizer_without_padding_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no padding token"):
        TextClassificationData.from_rows(ROWS, tokenizer=bare).setup()


def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for module in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-distill\[parquet\]"'):
        TextClassificationData(tmp_path / "a.parquet").rows("train")
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-distill\[hub\]"'):
        TextClassificationData(hub_dataset="glue/sst2").rows("train")


def test_tokenizer_from_a_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(tmp_path)
    data = TextClassificationData.from_rows(ROWS, tokenizer=str(tmp_path), val_split=0.5)
    data.setup()
    assert data.tokenizer("good bad 3").data == tokenizer("good bad 3").data
    assert data.tokenizer.special_tokens_map == tokenizer.special_tokens_map


def test_command_line(tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TextClassificationData, "data")
    file = write(tmp_path / "a.tsv", [("a", "x"), ("b", "y")], header="text\tkind")
    given = [
        f"--data.train_file={file}",
        "--data.text_columns=text",
        "--data.label_column=kind",
        "--data.val_split=0.5",
    ]
    data = parser.instantiate_classes(parser.parse_args(given)).data
    assert data.rows("train") + data.rows("val")
    pair = parser.parse_args(["--data.text_columns=[premise,hypothesis]", "--data.label_names=[con,pro]"])
    assert parser.instantiate_classes(pair).data.text_columns == ["premise", "hypothesis"]
    assert pair.data.label_names == ["con", "pro"]
    assert "val_split" in parser.dump(pair)


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Embedding(80, 2)
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"].flatten().tolist())
        return torch.nn.functional.cross_entropy(self.layer(batch["input_ids"]).mean(1), batch["labels"])

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None: ...

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return batch["labels"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("overfit", [0.0, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_under_a_trainer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, overfit: float, num_workers: int) -> None:
    data = TextClassificationData.from_rows(ROWS, tokenizer=tokenizer, batch_size=8, num_workers=num_workers)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        overfit_batches=overfit,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = Module()
    trainer.fit(module, datamodule=data)
    first, second = module.seen[: len(module.seen) // 2], module.seen[len(module.seen) // 2 :]
    assert len(first) == (2 if overfit else 7)
    assert (first == second) == bool(overfit)
    labels = torch.cat(trainer.predict(module, datamodule=data))  # type: ignore[arg-type]
    assert labels.tolist() == [label for _, label in data.rows("test")]


def test_hub_dataset_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:5])):
        (folder / f"{split}.csv").write_text("sentence,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    data = TextClassificationData(hub_dataset=str(folder))
    assert len(data.rows("train")) + len(data.rows("val")) == len(ROWS)
    assert len(data.rows("test")) == 5
    assert data.label_names == ["neg", "pos"]
    with pytest.raises(ValueError, match=r"reviews \(train\): no column 'sentense' \(did you mean 'sentence'\?\)"):
        TextClassificationData(hub_dataset=str(folder), text_columns="sentense").rows("train")
