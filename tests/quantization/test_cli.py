import json
from pathlib import Path

import pytest

from lightning_distill.__main__ import main
from lightning_distill.quantization import QuantLinear, load
from tests.helpers.models import bert
from tests.helpers.text import sentiment, write_tokenizer

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = write_tokenizer(tmp_path / "model")
    bert(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64).save_pretrained(tmp_path / "model")
    secret = "\n".join(f"{text}\t{label}" for text, label in sentiment(40))
    (tmp_path / "data.tsv").write_text(secret + "\n")
    return tmp_path


def test_a_folder_in_a_gptq_folder_out(folder: Path, capsys: pytest.CaptureFixture) -> None:
    main(["quantize", "--model", str(folder / "model"), "--data", str(folder / "data.tsv"), "--group-size", "32"])
    assert "12 layers quantised" in capsys.readouterr().out
    model = load(folder / "model-gptq")
    assert isinstance(model.bert.encoder.layer[1].output.dense, QuantLinear)
    # The tokenizer knows the words; the calibration sentences are nowhere.
    for name in ("config.json", "quantize_config.json"):
        text = (folder / "model-gptq" / name).read_text()
        assert not any(word in text for line, _ in sentiment(40) for word in (line, "film", "number"))
    config = json.loads((folder / "model-gptq" / "config.json").read_text())["quantization_config"]
    assert config["block_name_to_quantize"] == "bert.encoder.layer"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--bits": "5"}, "`bits`"),
        ({"--data": "nowhere.txt"}, "nowhere.txt"),
        ({"--model": "no/such/folder"}, "no/such/folder"),
    ],
    ids=str,
)
def test_wrong_input_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture, change: dict, message: str
) -> None:
    given = {"--model": str(folder / "model"), "--data": str(folder / "data.tsv"), "--group-size": "32", **change}
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", *(part for pair in given.items() for part in pair)])
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert message in error
    assert not (folder / "model-gptq").exists()


@pytest.mark.parametrize("output", ["home", "model", ".", "..", "data.tsv", "home/thesis.txt/model"])
def test_what_others_wrote_is_not_replaced(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    (folder / "home").mkdir()
    (folder / "home" / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(folder / "home" if output == ".." else folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    given = ["--model", str(folder / "model"), "--data", str(folder / "data.tsv"), "--output", output]
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", *given, "--group-size", "32"])
    assert (
        f"`--output` to be a new folder, or one with nothing but what lightning-distill wrote there, but got {output}"
        in (error := capsys.readouterr().err)
    )
    assert error.count("\n") == 1
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_an_earlier_call_wrote_is_replaced(folder: Path) -> None:
    given = ["--model", str(folder / "model"), "--data", str(folder / "data.tsv"), "--group-size", "32"]
    for bits in ("4", "8"):
        main(["quantize", *given, "--bits", bits])
    assert json.loads((folder / "model-gptq" / "quantize_config.json").read_text())["bits"] == 8
    assert sorted(path.name for path in folder.iterdir()) == ["data.tsv", "model", "model-gptq"]


def test_the_command_is_there(capsys: pytest.CaptureFixture) -> None:
    assert 'lightning-distill = "lightning_distill.__main__:main"' in PYPROJECT.read_text()
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "quantize" in capsys.readouterr().out
