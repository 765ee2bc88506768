"""The recipe: what it writes, what it says of wrong input, which flags reach the Trainer."""

import json
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lightning_distill import student_from_teacher
from lightning_distill.cli.report import read_curves
from lightning_distill.quantization import QuantLinear, load
from tests.helpers.models import bert
from tests.helpers.recipes import OF_A_FEW_ROWS, TRIAL, load_recipe, refusal, summary

pytestmark = OF_A_FEW_ROWS


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], None]:
    return load_recipe("distilbert")


def test_summary_student_and_curves(main: Any, files: list[str], tmp_path: Path, capsys: Any) -> None:
    main([*files, "--model.baseline=true"])
    found = summary(tmp_path)
    keys = {"parameters", "bytes", "metric_name", "metric", "agreement", "latency_ms_batch1", "latency_ms_batch32"}
    for model in ("teacher", "student", "student_without_distillation"):
        assert set(found[model]) == keys
    assert found["teacher"]["agreement"] == 1.0
    ratios, student, teacher = found["ratios"], found["student"], found["teacher"]
    assert ratios["parameters"] == pytest.approx(student["parameters"] / teacher["parameters"], abs=1e-4)
    assert ratios["metric_retained"] == pytest.approx(student["metric"] / teacher["metric"], abs=1e-4)
    assert {"bytes", "latency_batch1"} <= set(ratios)
    assert found["seed"] == 0
    assert found["versions"]["torch"] == torch.__version__
    assert found["seconds"] > 0

    folder = tmp_path / "out" / "student"
    student = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert student.config.num_hidden_layers == 2
    assert student.config.label2id == {"negative": 0, "positive": 1}
    assert sum(p.numel() for p in student.parameters()) == found["student"]["parameters"]
    assert (folder / "model.safetensors").stat().st_size == found["student"]["bytes"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert student(**tokenizer("a warm film", return_tensors="pt")).logits.shape == (1, 2)
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "student without distillation / teacher" in capsys.readouterr().out


def test_a_student_of_ones_own(main: Any, files: list[str], tmp_path: Path, capsys: Any) -> None:
    named = [*files, f"--model.student={tmp_path / 'own'}"]
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "teacher").vocab_size
    config = {"layers": 1, "hidden_size": 16, "vocab_size": words, "max_position_embeddings": 64}
    # A body alone gets a head for the teacher's classes.
    bert(**config).bert.save_pretrained(tmp_path / "own")
    main(named)
    student = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "student")
    assert student.config.label2id == {"negative": 0, "positive": 1}
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (1, 16)
    (tmp_path / "out").rename(tmp_path / "first")
    bert(**config, label2id={"positive": 0, "negative": 1}, id2label={0: "positive", 1: "negative"}).save_pretrained(
        tmp_path / "own"
    )
    assert "--model.student has the classes ['positive', 'negative'], and" in refusal(main, named, capsys)
    assert not (tmp_path / "out").exists()


def test_a_teacher_whose_classes_have_no_names(main: Any, files: list[str], tmp_path: Path, capsys: Any) -> None:
    bert(layers=4, vocab_size=80, max_position_embeddings=64).save_pretrained(tmp_path / "teacher")
    for file in tmp_path.glob("*.tsv"):
        file.write_text(file.read_text().replace("\t0\n", "\tnegative\n").replace("\t1\n", "\tpositive\n"))
    said = refusal(main, files, capsys)
    assert "does not name the teacher's classes, so the labels ['negative', 'positive'] of the data" in said
    names = {"id2label": {0: "negative", 1: "positive"}}
    bert(layers=4, vocab_size=80, max_position_embeddings=64, **names).save_pretrained(tmp_path / "teacher")
    said = refusal(main, [*files, "--data.label_names=[positive,negative]"], capsys)
    assert "--data.label_names has the classes ['positive', 'negative'], and --model.teacher ['negative'" in said


def test_the_same_seed_gives_the_same_student(main: Any, files: list[str], tmp_path: Path) -> None:
    weights = []
    for _ in range(2):
        main(files)
        weights.append((tmp_path / "out" / "student" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_embedded_default_runs_without_any_file(main: Any, tmp_path: Path, capsys: Any) -> None:
    main([f"--output_dir={tmp_path / 'out'}", *TRIAL])
    found = summary(tmp_path)
    assert found["student"]["parameters"] < found["teacher"]["parameters"]
    assert "Training the teacher first" in capsys.readouterr().out


def test_a_teacher_without_a_head_is_fine_tuned_and_that_is_said(
    main: Any, files: list[str], tmp_path: Path, capsys: Any
) -> None:
    body = bert(layers=4, vocab_size=80, max_position_embeddings=64).bert
    body.save_pretrained(tmp_path / "teacher")
    with pytest.raises(SystemExit, match="2"):
        main(files)
    assert "--model.finetune_teacher true" in capsys.readouterr().err
    main([*files, "--model.finetune_teacher=true", "--model.teacher_epochs=1"])
    assert "Training the teacher first" in capsys.readouterr().out
    assert summary(tmp_path)["student"]["metric_name"] == "accuracy"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train", "text\tlabel\na film\t1\n", r"train.tsv:1: .*sentence"),
        ("train", "", r"train.tsv"),
        ("train", "sentence\tlabel\na film\t1\nno label here\n", r"train.tsv:3: "),
        ("train", "sentence\tlabel\na film\t1\nanother\t1\n", r"train.tsv.*expected two labels"),
        ("test", "sentence\tlabel\na film\t1\nanother\t7\n", r"test.tsv:3: .*7"),
    ],
)
def test_wrong_files_are_one_line_and_exit_code_2(
    main: Any, files: list[str], tmp_path: Path, capsys: Any, name: str, content: str, message: str
) -> None:
    (tmp_path / f"{name}.tsv").write_text(content)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text("earlier")
    with pytest.raises(SystemExit, match="2"):
        main(files)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.count("error:") == 1
    assert re.search(message, error), error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["summary.json"]
    assert (tmp_path / "out" / "summary.json").read_text() == "earlier"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.num_layers=9"], "num_layers"),
        (["--model.num_decoder_layers=1"], "`num_decoder_layers` to be None for a `BertForSequenceClassification`"),
        (["--model.width=0.3"], "width"),
        (["--data.val_file=nowhere.tsv"], "nowhere.tsv"),
        (["--trainer.max_epochs=many"], "max_epochs"),
        (["--model.nonsense=1"], "nonsense"),
        (["--model.teacher=nowhere"], "`--model.teacher` to be a folder or hub id .* but got 'nowhere'"),
        (["--gradient_clipping.algorithm=norm", "--gradient_clipping.threshold=-1"], "`threshold`"),
        (["--gradient_clipping.algorithm=norm", "--trainer.gradient_clip_val=0.3"], "clip twice"),
        (["--optimizer=adamax"], "optimizer.name"),
        (["--optimizer=sgd", "--optimizer.betas=[0.9,0.99]"], "`betas` to be left out for 'sgd'"),
        (["--optimizer=adamw_8bit"], "needs CUDA"),
        (["--trainer.strategy=fsdp"], "requires a GPU accelerator"),
        (["--model.teacher_precision=int4"], "teacher_precision"),
        (["--lr_scheduler=zigzag"], "`name` to be one of"),
        (["--lr_scheduler=reduce_on_plateau"], "`monitor`"),
        (["--output_dir=."], "is the working folder or holds it"),
        (["--output_dir=/"], "is the working folder or holds it"),
        (["--teacher_cache.path=/dev/null/x"], "`path` to be a cache, or a new folder for one"),
        (["--trainer.limit_test_batches=0"], "trains and tests on at least a batch"),
        (["--trainer.enable_checkpointing=false"], "found `ModelCheckpoint`"),
        (["--trainer.barebones=true"], "a recipe needs both"),
        (["--trainer.val_check_interval=99999"], "must be less than or equal to the number of the training batches"),
        (["--trainer.strategy=ddp_spawn"], "ddp_fork has it"),
        (["--trainer.precision=16-true"], "`eps` of the optimizer to be above 0"),
        (["--lr_scheduler.warmup=1000000"], "`warmup` to be shorter than"),
        (["--optimizer.lr=0"], "`lr` to be above 0"),
        (["--trainer.max_epochs=0"], "--trainer.max_epochs` to be at least 1"),
        (["--model.finetune_teacher=true", "--model.teacher_epochs=0"], "--model.teacher_epochs` to be at least 1"),
        (["--objectives=[{}]"], "which computes nothing"),
    ],
)
def test_wrong_flags_exit_with_2(
    main: Any, files: list[str], tmp_path: Path, capsys: Any, flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*files, *flags])
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_objectives_and_a_config_file_from_the_command_line(main: Any, files: list[str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "objectives:\n"
        "- class_path: lightning_distill.objectives.SoftTarget\n  init_args: {temperature: 4.0, weight: 0.3}\n"
        "- class_path: lightning_distill.objectives.HiddenState\n  init_args: {layers: last, weight: 0.2}\n"
        "model: {width: 0.5}\n"
    )
    main([f"--config={config}", *files, "--trainer.precision=bf16-mixed", "--trainer.log_every_n_steps=1"])
    header = (tmp_path / "out" / "logs" / "student" / "metrics.csv").read_text().splitlines()[0]
    assert {"train_hidden_state", "train_soft_target"} <= set(header.split(","))
    student = transformers.AutoConfig.from_pretrained(tmp_path / "out" / "student")
    assert student.hidden_size == 8


def test_help_and_print_config(main: Any, capsys: Any) -> None:
    for flag, expected in (("--help", "--trainer.precision"), ("--print_config", "max_epochs")):
        with pytest.raises(SystemExit, match="0"):
            main([flag])
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize("name", ["distilbert", "tinybert", "minilm", "fastbert", "causal_lm"])
def test_help_is_one_screen_and_names_the_groups_of_the_rest(name: str, capsys: Any) -> None:
    main = load_recipe(name)
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 44
    assert all(len(line) <= 120 for line in said.splitlines())
    assert "--model.teacher " in said
    assert "--model.num_layers              layers of the student (default: half of them)" in said
    groups = said.split("followed by one of")[1].replace("\n", " ").split(",")
    for group in map(str.strip, groups):
        with pytest.raises(SystemExit, match="0"):
            main(["--help", group])
        flags = re.findall(r"^ +--(\w+)", capsys.readouterr().out, re.MULTILINE)
        assert set(flags) == {group}
    with pytest.raises(SystemExit, match="0"):
        main(["--help=trainer"])
    assert "--trainer.accumulate_grad_batches" in capsys.readouterr().out
    said = refusal(main, ["--help", "optimzer"], capsys)
    assert "there is no group 'optimzer' for --help: expected one of data, optimizer, " in said


@pytest.mark.parametrize(
    ("flags", "times"), [([], 1), (["--model.baseline=true"], 2), (["--model.finetune_teacher=true"], 2)]
)
def test_a_student_is_built_once_and_once_more_where_it_has_to_be_another(
    main: Any, flags: list[str], times: int, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names, built = main.__wrapped__.__globals__, []

    def build(*arguments: Any, **options: Any) -> Any:
        built.append(options)
        return student_from_teacher(*arguments, **options)

    monkeypatch.setitem(names, "student_from_teacher", build)
    main([*files, *flags, "--model.teacher_epochs=1"])
    assert len(built) == times


def test_a_recipe_silences_nothing_beyond_its_end(main: Any, files: list[str]) -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = (list(warnings.filters), list(logger.filters), transformers.utils.logging.is_progress_bar_enabled())
    main(files)
    after = (list(warnings.filters), list(logger.filters), transformers.utils.logging.is_progress_bar_enabled())
    assert after == before


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_by_flag(main: Any, files: list[str], tmp_path: Path) -> None:
    main([*files, "--trainer.strategy=ddp_fork", "--trainer.devices=2", "--trainer.precision=bf16-mixed"])
    found = summary(tmp_path)
    steps, _ = read_curves(tmp_path / "out" / "logs" / "student" / "metrics.csv")["val_loss"]
    assert steps == [1]  # 24 rows are two steps of 8 in each of two processes
    assert found["student"]["metric"] >= 0.5
    student = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "student")
    start = student_from_teacher(str(tmp_path / "teacher"), num_layers=2)
    assert not torch.equal(student.classifier.weight, start.classifier.weight)


def test_gptq_writes_a_student_that_loads_and_says_what_it_cost(main: Any, files: list[str], tmp_path: Path) -> None:
    wide = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
    config = transformers.AutoConfig.from_pretrained(tmp_path / "teacher")
    names = {"id2label": config.id2label, "label2id": config.label2id}
    bert(layers=4, vocab_size=config.vocab_size, **names, **wide).save_pretrained(tmp_path / "teacher")
    with pytest.raises(SystemExit, match="2"):
        main([*files, "--gptq.bits=5"])
    assert not (tmp_path / "out").exists()
    main([*files, "--gptq.bits=4", "--gptq.group_size=32"])
    found = summary(tmp_path)["gptq"]
    assert list(found) == [
        "bits", "group_size", "bytes", "metric", "metric_before", "seconds", "latency_ms_batch1"
    ]  # fmt: skip
    assert (found["bits"], found["group_size"]) == (4, 32)
    assert found["metric_before"] == summary(tmp_path)["student"]["metric"]
    assert found["latency_ms_batch1"] > 0
    folder = tmp_path / "out" / "student-gptq"
    assert found["bytes"] == (folder / "model.safetensors").stat().st_size < summary(tmp_path)["student"]["bytes"]
    assert isinstance(load(folder).bert.encoder.layer[1].output.dense, QuantLinear)
    assert transformers.AutoTokenizer.from_pretrained(folder)("a warm film")["input_ids"]
    student = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "student")
    assert isinstance(student.bert.encoder.layer[1].output.dense, torch.nn.Linear)


def test_callbacks_optimizer_and_schedule_by_flag(main: Any, files: list[str], tmp_path: Path) -> None:
    flags = ["--gradient_clipping.algorithm", "zscore", "--gradient_clipping.warmup_steps=2"]
    flags += ["--lr_finder.suggestion", "valley", "--lr_finder.num_steps=64", "--lr_finder.min_lr=1e-5"]
    flags += ["--init_policy", "auto", "--model.init=random", "--optimizer", "lion", "--lr_scheduler=cosine"]
    with pytest.warns(UserWarning, match="LRFinder keeps the configured"):  # 24 rows of noise
        main([*files, *flags, "--trainer.log_every_n_steps=1", "--lr_finder.max_lr=2e-5"])
    logs = tmp_path / "out" / "logs" / "student"
    for name in ("init_policy.json", "init_policy.png", "lr_finder.json", "lr_finder.png"):
        assert (logs / name).stat().st_size > 0
    header = (logs / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"grad_norm", "clip_coefficient", "clipped_share"} <= set(header)
    checkpoint = torch.load(tmp_path / "out" / "checkpoints" / "student" / "last.ckpt", weights_only=True)
    assert {name.split("{")[0] for name in checkpoint["callbacks"]} >= {"GradientClipping", "LRFinder"}
    assert [group["name"] for group in checkpoint["optimizer_states"][0]["param_groups"]] == ["all", "all/no_decay"]


def test_every_optimizer_without_a_schedule_too(main: Any, files: list[str], tmp_path: Path) -> None:
    main([*files, "--optimizer=schedule_free_adamw"])
    checkpoint = torch.load(tmp_path / "out" / "checkpoints" / "student" / "last.ckpt", weights_only=True)
    assert checkpoint["lr_schedulers"] == []
    assert "z" in checkpoint["optimizer_states"][0]["state"][0]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_teachers_precision_and_gradient_checkpointing_by_flag(
    main: Any, files: list[str], tmp_path: Path, precision: str
) -> None:
    config = transformers.AutoConfig.from_pretrained(tmp_path / "teacher")
    names = {"id2label": config.id2label, "label2id": config.label2id}
    wide = {"hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 64}
    bert(layers=4, vocab_size=config.vocab_size, **names, **wide).save_pretrained(tmp_path / "teacher")
    main([*files, f"--model.teacher_precision={precision}", "--model.gradient_checkpointing=true"])
    # The report is of the teacher as it was given, and the student is in float32.
    student = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "student")
    assert student.dtype == torch.float32
    assert summary(tmp_path)["teacher"]["bytes"] > 4 * summary(tmp_path)["teacher"]["parameters"] * 0.9


def test_weights_from_the_teacher_by_flag(main: Any, files: list[str], tmp_path: Path) -> None:
    main([*files, "--model.init=random", "--init_policy=from_teacher", "--init_policy.layers=last"])
    audit = json.loads((tmp_path / "out" / "logs" / "student" / "init_policy.json").read_text())
    assert {line["rule"] for line in audit["weights"]} == {"from_teacher"}


def test_folders_of_others_in_the_output_folder_stay(main: Any, files: list[str], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out" / "student").mkdir(parents=True)
    (tmp_path / "out" / "student" / "grades.csv").write_text("mine")
    assert "`--output_dir`" in (said := refusal(main, files, capsys))
    assert "out/student, which holds grades.csv" in said
    (tmp_path / "out" / "student").rename(tmp_path / "out" / "teacher")
    here = [flag.replace(f"={tmp_path / 'out'}", f"={tmp_path}") for flag in files]
    assert "the model that is read" in refusal(main, [*here, "--model.finetune_teacher=true"], capsys)
    assert (tmp_path / "out" / "teacher" / "grades.csv").read_text() == "mine"
    assert not (tmp_path / "out" / "unfinished.yaml").exists()
