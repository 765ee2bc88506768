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


def test_what_is_not_used_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.csv"
    file.write_text("id,sentence,other,label\n1,good film good film,x,a\n2,good,x,b\n")
    data = TextClassificationData(file, file, file, tokenizer=train_tokenizer(["good film"] * 3, 60), max_length=4)
    with caplog.at_level("INFO"):
        data.setup()
    said = [record.message for record in caplog.records if "a.csv" in record.message]
    assert said == [f"{file}: 1 of 2 texts are cut to 4 tokens; columns that are not used: id, other"]


@pytest.mark.parametrize("name", ["val_file", "test_file"])
def test_evaluation_files_need_a_training_file(name: str) -> None:
    for more, said in (({}, "but got none"), ({"hub_dataset": "glue/sst2"}, "which has its own splits")):
        with pytest.raises(ValueError, match=f"Expected argument `train_file` beside `{name}`.*{said}"):
            TextClassificationData(**{name: "a.tsv"}, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "found"),
    [("a", ["a"]), ("a,b", ["a", "b"]), ("a, b", ["a", "b"]), (["a", "b"], ["a", "b"]), (["a,b"], ["a,b"])],
)
def test_text_columns(columns: Any, found: list[str]) -> None:
    assert TextClassificationData("x.tsv", text_columns=columns).text_columns == found
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TextClassificationData, "data")
    given = columns if isinstance(columns, str) else f"[{','.join(map(repr, columns))}]"
    parsed = parser.parse_args([f"--data.text_columns={given}"])
    assert parser.instantiate_classes(parsed).data.text_columns == found


@pytest.mark.parametrize("columns", ["a,b,c", "a,", "", "a,a", "label", ["a", "label"]])
def test_text_columns_that_cannot_be_right(columns: Any) -> None:
    with pytest.raises(ValueError, match="Expected argument `text_columns`"):
        TextClassificationData("x.tsv", text_columns=columns)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    datasets, parquet = pytest.importorskip("datasets"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def make(**splits: Any) -> str:
        folder = tmp_path / f"set{len(list(tmp_path.iterdir()))}"  # a changed folder may be read from the cache
        folder.mkdir()
        files = "".join(f"  - split: {name}\n    path: {name}.parquet\n" for name in splits)
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
        for name, columns in splits.items():
            parquet.write_table(datasets.Dataset.from_dict(columns).data.table, folder / f"{name}.parquet")
        return str(folder)

    yield make
    datasets.enable_progress_bars()


def split(name: str, labels: list[Any]) -> dict[str, list[Any]]:
    return {"sentence": [f"{name} {i}" for i in range(len(labels))], "label": labels}


@pytest.mark.parametrize("name", ["validation", "valid", "eval", "dev", "val", "validation_matched"])
def test_splits_of_the_hub_of_any_name(hub: Any, name: str) -> None:
    data = TextClassificationData(hub_dataset=hub(train=split("train", [0, 1] * 4), **{name: split(name, [0, 1])}))
    assert [text for (text,), _ in data.rows("val")] == [f"{name} 0", f"{name} 1"]


def test_splits_of_the_hub_that_are_not_used_are_named(hub: Any) -> None:
    splits = {
        "train": split("train", [0, 1] * 4),
        "validation_matched": split("val", [0, 1]),
        "validation_mismatched": split("other", [0, 1]),
        "test_matched": split("test", [-1, -1]),
        "unsupervised": split("more", [0]),
    }
    data = TextClassificationData(hub_dataset=hub(**splits))
    with pytest.warns(UserWarning, match="not used: validation_mismatched, unsupervised, test_matched .*no labels"):
        assert data.rows("test") == data.rows("val")


def test_bad_data_sets_of_the_hub_are_one_line(hub: Any, tmp_path: Path) -> None:
    for splits, problem in (
        ({"validation": split("val", [0, 1])}, "there is no training split"),
        ({"train": {"text": ["a"], "label": [0]}}, r"\(train\): no column 'sentence'"),
        ({"train": split("train", [[0], [1]])}, r"\(train\):1: column 'label' holds \[0\], a list, where one"),
        ({"train": split("train", [b"0", b"1"])}, "'label' is of type binary"),
    ):
        with pytest.raises(ValueError, match=problem) as caught:
            TextClassificationData(hub_dataset=hub(**splits)).rows("train")
        assert str(caught.value).isprintable()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="the data set cannot be read"):
        TextClassificationData(hub_dataset=str(tmp_path / "broken")).rows("train")
    with pytest.raises(ValueError, match="no such data set"):
        TextClassificationData(hub_dataset=str(tmp_path / "nowhere")).rows("train")


def test_class_weights(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tsv", [("x", "few"), *[("x", "many")] * 3])
    assert TextClassificationData(file, file).class_weights is None
    assert TextClassificationData(file, file, class_weights="balanced").class_weights == [2.0, pytest.approx(2 / 3)]
    assert TextClassificationData(file, file, class_weights=[1, 0.5]).class_weights == [1.0, 0.5]
    for weights in ([1.0], [1.0] * 3):
        with pytest.raises(ValueError, match=r"`class_weights` to have 2 weights, one for each of few, many"):
            _ = TextClassificationData(file, file, class_weights=weights).class_weights
    absent = TextClassificationData(file, file, label_names=["few", "many", "none"], class_weights="balanced")
    with pytest.raises(ValueError, match="no training row is of the class 'none'"):
        _ = absent.class_weights
    for arguments in ({"class_weights": "balanced"}, {"balanced": True}):
        with pytest.raises(ValueError, match=f"Expected argument `{next(iter(arguments))}` to be left out"):
            TextClassificationData(file, task="regression", **arguments)  # type: ignore[arg-type]


def test_balanced_draws_classes_equally(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [(f"good {i}", "many") for i in range(90)] + [(f"bad {i}", "few") for i in range(6)]
    data = TextClassificationData.from_rows(rows, rows, tokenizer=tokenizer, balanced=True, batch_size=8)
    data.setup()
    epochs = []
    for epoch in (0, 1, 0):
        loader: Any = data.train_dataloader()
        loader.batch_sampler.set_epoch(epoch)
        epochs.append([index for batch in loader.batch_sampler for index in batch])
    assert epochs[0] == epochs[2] != epochs[1]
    for drawn in epochs[:2]:
        assert len(drawn) == 96
        assert sum(index >= 90 for index in drawn) == 48
        assert len({index for index in drawn if index < 90}) == 48  # none twice before all have been
        assert all(drawn.count(index) == 8 for index in range(90, 96))
    assert sum(len(batch["labels"]) for batch in data.val_dataloader()) == 96
