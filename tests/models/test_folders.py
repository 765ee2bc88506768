"""What is written takes the place of nothing but what was written here, whole or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_distill import DistillationModule
from lightning_distill.early_exit import EarlyExitModel, make_ramps
from lightning_distill.models import folders
from lightning_distill.models.folders import check_folder, writing
from lightning_distill.models.pretrained import load_pretrained
from lightning_distill.quantization import quantize, save
from tests.helpers.models import bert, tokens


def write(folder: Path, text: str) -> None:
    with writing(folder) as draft:
        (draft / "weights").write_text(text)


def fail_writing(folder: Path) -> None:
    with writing(folder) as draft:
        (draft / "weights").write_text("tw")
        raise KeyError


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder but the manifest, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != folders.MANIFEST)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_what_was_written_is_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", "one")
    with writing(tmp_path / "a" / "b") as draft:
        (draft / "deep" / "er").mkdir(parents=True)
        (draft / "deep" / "er" / "other").write_text("two")
    assert content(tmp_path) == {"a/b/deep/er/other": "two"}
    (tmp_path / "empty").mkdir(mode=0o700)
    write(tmp_path / "empty", "three")
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o700


def test_files_that_are_not_written_anew_stay_where_asked(tmp_path: Path) -> None:
    write(tmp_path / "m", "weights")
    for text in ("one", "two"):
        with writing(tmp_path / "m", keep=True) as draft:
            (draft / "report").write_text(text)
    assert content(tmp_path / "m") == {"weights": "weights", "report": "two"}
    write(tmp_path / "m", "others")
    assert content(tmp_path / "m") == {"weights": "others"}


def of_others(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis").write_text("years of work")


def with_a_file_more(folder: Path) -> None:
    write(folder, "one")
    (folder / "notes").write_text("mine")


def changed_since(folder: Path) -> None:
    write(folder, "one")
    (folder / "weights").write_text("two")  # as many bytes


def with_an_empty_folder_more(folder: Path) -> None:
    write(folder, "one")
    (folder / "empty").mkdir()


def with_a_link_more(folder: Path) -> None:
    write(folder, "one")
    (folder / "link").symlink_to(folder / "weights")


def with_a_hidden_file(folder: Path) -> None:
    folder.mkdir()
    (folder / ".git").write_text("")


def a_file(folder: Path) -> None:
    folder.write_text("text")


def below_a_file(folder: Path) -> None:
    folder.parent.rmdir()
    folder.parent.write_text("text")


def the_working_folder(folder: Path) -> None:
    write(folder, "one")
    os.chdir(folder)


def above_the_working_folder(folder: Path) -> None:
    with writing(folder) as draft:
        (draft / "inner").mkdir()
        (draft / "inner" / "file").write_text("")
    os.chdir(folder / "inner")


def a_link_to_others(folder: Path) -> None:
    of_others(folder.with_name("others"))
    folder.symlink_to(folder.with_name("others"))


def a_link_to_a_file(folder: Path) -> None:
    a_file(folder.with_name("file"))
    folder.symlink_to(folder.with_name("file"))


def a_link_to_the_working_folder(folder: Path) -> None:
    the_working_folder(folder.with_name("here"))
    folder.symlink_to(folder.with_name("here"))


def a_link_to_itself(folder: Path) -> None:
    folder.symlink_to(folder)


@pytest.mark.parametrize(
    "make",
    [
        of_others, with_a_file_more, changed_since, with_an_empty_folder_more, with_a_link_more, with_a_hidden_file,
        a_file, below_a_file, the_working_folder, above_the_working_folder, a_link_to_others, a_link_to_a_file,
        a_link_to_the_working_folder, a_link_to_itself,
    ],
    ids=lambda make: make.__name__,
)  # fmt: skip
def test_what_others_wrote_stays(make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "home" / "folder"
    folder.parent.mkdir()
    make(folder)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"^Expected argument `--output` .*home.*Name another folder\.$"):
        check_folder(folder, "--output")
    with pytest.raises(ValueError, match="Expected argument `folder`"):
        write(folder, "two")
    assert content(tmp_path) == before
    assert not list(tmp_path.rglob("*.new"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "nul\0", "/", "/proc"])
def test_odd_names_are_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(ValueError, match="Expected argument `folder`"):
        check_folder(name)


def test_the_source_and_what_holds_it_stay(tmp_path: Path) -> None:
    write(tmp_path / "models" / "teacher", "weights")
    for folder in (tmp_path / "models" / "teacher", tmp_path / "models", tmp_path / "models" / ".." / "models"):
        with pytest.raises(ValueError, match="the model that is read, or holds it"):
            check_folder(folder, sources=[tmp_path / "models" / "teacher"])
    assert check_folder(tmp_path / "models" / "teacher-gptq", sources=[tmp_path / "models" / "teacher"])


def test_an_error_while_writing_leaves_the_earlier_folder_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "m", "one")
    with pytest.raises(KeyError):
        fail_writing(tmp_path / "m")
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]
    assert content(tmp_path) == {"m/weights": "one"}


def test_what_comes_into_the_folder_while_it_is_written_stays(tmp_path: Path) -> None:
    write(tmp_path / "m", "one")

    def slowly() -> None:
        with writing(tmp_path / "m"):
            (tmp_path / "m" / "notes").write_text("mine")

    with pytest.raises(ValueError, match="which holds notes"):
        slowly()
    assert content(tmp_path) == {"m/weights": "one", "m/notes": "mine"}


def kill_in(what: str, owner: object) -> None:
    """Have this process die where a function is called, before it does anything."""
    setattr(owner, what, lambda *_, **__: os._exit(9))


@pytest.mark.forks
@pytest.mark.parametrize("in_one_step", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("point", ["written", "_seal", "_swap", "rename", "second rename", "rmtree"])
def test_a_kill_at_any_point_leaves_the_earlier_or_the_new_one(
    point: str, in_one_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m", "one")
    if not in_one_step:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    child = os.fork()
    if child == 0:
        rename = Path.rename
        if point in ("_seal", "_swap"):
            kill_in(point, folders)
        elif point == "rename":
            kill_in("rename", Path)
        elif point == "second rename":
            Path.rename = lambda *names: (rename(*names), kill_in("rename", Path))[0]  # type: ignore[method-assign]
        elif point == "rmtree":
            kill_in("rmtree", shutil)
        with writing(tmp_path / "m") as draft:
            (draft / "weights").write_text("two")
            if point == "written":
                os._exit(9)
        os._exit(0)
    os.waitpid(child, 0)
    between = point == "second rename" and not in_one_step
    assert (tmp_path / "m").exists() is not between
    if not between:
        assert content(tmp_path / "m")["weights"] in ("one", "two")
    # The next call puts the earlier one back first, so that an error of its own does not lose it.
    with pytest.raises(KeyError):
        fail_writing(tmp_path / "m")
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]
    assert content(tmp_path / "m")["weights"] in ("one", "two")


def test_two_writers_of_one_folder_do_not_spoil_it(tmp_path: Path) -> None:
    with writing(tmp_path / "m") as one:
        (one / "weights").write_text("one")
        write(tmp_path / "m", "two")
    assert content(tmp_path) == {"m/weights": "one"}


def test_every_writer_of_a_folder_refuses_what_others_wrote(tmp_path: Path) -> None:
    of_others(tmp_path / "home")
    student = bert(num_labels=2, hidden_size=32, intermediate_size=64)
    early = EarlyExitModel(student, make_ramps(student))
    quantized, _ = quantize(student, None, group_size=32)
    writers: dict[str, Callable[[Path], object]] = {
        "export": DistillationModule(None, bert()).export,
        "early exit": early.save_pretrained,
        "calibrate": lambda folder: early.calibrate([tokens(8)], folder=folder),
        "onnx": early.export_onnx,
        "gptq": lambda folder: save(quantized, folder),
    }
    for name, writer in writers.items():
        with pytest.raises(ValueError, match="which holds thesis"):
            writer(tmp_path / "home")
        assert content(tmp_path) == {"home/thesis": "years of work"}, name


def test_a_model_is_not_written_over_the_one_it_came_from(tmp_path: Path) -> None:
    DistillationModule(None, bert()).export(tmp_path / "float")
    DistillationModule(None, bert()).export(tmp_path / "float")  # of another model, it may be
    loaded = load_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="the model that is read"):
        DistillationModule(None, loaded).export(tmp_path / "float")
