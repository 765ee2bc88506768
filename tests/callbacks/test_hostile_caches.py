"""Cache folders that are broken, mixed or made to harm: the teacher's answers or one sentence, and nothing is run."""

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_distill import DistillationModule
from lightning_distill.callbacks import TeacherCache
from lightning_distill.objectives import SoftTarget
from lightning_distill.teachers.cache.store import SignalStore
from tests.helpers.models import batch, bert

Change = Callable[[Path], None]
DATA = batch("classification", rows=3, classes=3)


def module() -> DistillationModule:
    torch.manual_seed(0)
    return DistillationModule(bert(num_labels=3), bert(num_labels=3), [SoftTarget(2.0)])


def cache(folder: Path, top_k: int | None = None) -> TeacherCache:
    return TeacherCache(folder, top_k=top_k, dtype="float32")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "cache"
    ask(folder, module())
    return folder


def ask(folder: Path, asked: DistillationModule, top_k: int | None = None) -> Any:
    kept = cache(folder, top_k)
    kept.attach(asked)
    try:
        return asked.teacher_step(DATA)
    finally:
        kept.detach()


def only(folder: Path, kind: str) -> Path:
    (file,) = folder.glob(f"*.{kind}")
    return file


def meta(change: Callable[[dict[str, Any]], Any], name: str = "cache.json") -> Change:
    """Change what the folder says of itself."""

    def apply(folder: Path) -> None:
        told = json.loads((folder / name).read_text())
        changed = change(told)
        (folder / name).write_text(json.dumps(told if changed is None else changed))

    return apply


def config(**values: Any) -> Change:
    return meta(lambda told: told.update(values), "config.json")


def fields(value: Any) -> Change:
    return meta(lambda told: told.update(fields=value))


def text(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content) and None


def append(file: Path, content: bytes) -> None:
    file.write_bytes(file.read_bytes() + content)


def cut(kind: str, size: int) -> Change:
    return lambda folder: os.truncate(only(folder, kind), size)


def in_the_place_of(name: str, make: Callable[[Path], Any]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / name if (folder / name).exists() else only(folder, name)
        path.unlink()
        make(path)

    return apply


def entries(first: int, count: int, key: bytes | None = None) -> Change:
    """An index whose entries point elsewhere, with good checksums of their own."""

    def apply(folder: Path) -> None:
        content = only(folder, "index").read_bytes()
        forged = content[:24]
        for start in range(24, len(content), 40):
            entry = (key or content[start : start + 16]) + struct.pack("<qqI", first, count, 0)
            forged += entry + struct.pack("<I", zlib.crc32(entry))
        only(folder, "index").write_bytes(forged)

    return apply


def sparse(kind: str, size: int) -> Change:
    return lambda folder: os.truncate(only(folder, kind), size)


def written_anew(told: dict[str, Any], shape: tuple[int, ...], items: int) -> Change:
    """Another store with right checksums under the right keys."""

    def apply(folder: Path) -> None:
        description = json.loads((folder / "cache.json").read_text())
        description.pop("format")
        content = only(folder, "index").read_bytes()
        keys = [content[start : start + 16] for start in range(24, len(content), 40)]
        saved = (folder / "config.json").read_text()
        shutil.rmtree(folder)
        description |= told | {"fields": {"logits": ["float32", list(shape)]}}
        store = SignalStore(folder, description, {"logits": ("float32", shape)})
        for key in keys:
            store.write(key, {"logits": np.zeros((items, *shape), np.float32)})
        store.close()
        (folder / "config.json").write_text(saved)

    return apply


def of_the_first_version(folder: Path) -> None:
    meta(lambda told: told.pop("format") and None)(folder)
    only(folder, "rows").rename(folder / "0.logits")
    only(folder, "index").rename(folder / "0.index")


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
HUGE = 1 << 40

CASES: dict[str, Change] = {
    "nothing": lambda folder: None,
    "of the first version": of_the_first_version,
    "another format": meta(lambda told: told.update(format=3)),
    "a format that is no number": meta(lambda told: told.update(format={"a": [1]})),
    "no description": lambda folder: (folder / "cache.json").unlink(),
    "an empty description": text("cache.json", b""),
    "half a description": lambda folder: os.truncate(folder / "cache.json", 50),
    "a description of zeros": text("cache.json", bytes(300)),
    "a description of bytes": text("cache.json", b"\xff\xfe\x80" * 40),
    "a deep description": text("cache.json", DEEP),
    "a deep list": text("cache.json", b"[" * 100_000),
    "a long number": text("cache.json", b'{"format": ' + b"9" * 5000 + b"}"),
    "a description that is a list": meta(lambda told: [told]),
    "a description that is NaN": text("cache.json", b"NaN"),
    "a huge description": lambda folder: os.truncate(folder / "cache.json", HUGE),
    "a description that is a folder": in_the_place_of("cache.json", Path.mkdir),
    "a description that is a pipe": in_the_place_of("cache.json", os.mkfifo),
    "a description without an end": in_the_place_of("cache.json", lambda path: path.symlink_to("/dev/zero")),
    "a description that points to itself": in_the_place_of("cache.json", lambda path: path.symlink_to(path)),
    "a description that points to nothing": in_the_place_of("cache.json", lambda path: path.symlink_to("nothing")),
    "the teacher of nobody": meta(lambda told: told.update(teacher=None)),
    "a teacher that is a list": meta(lambda told: told.update(teacher=["a"])),
    "another task": meta(lambda told: told.update(task="causal_lm")),
    "settings of other types": meta(lambda told: told.update(top_k={"a": 1}, layers="all", dtype=16)),
    "no fields": meta(lambda told: told.pop("fields") and None),
    "fields that are a number": fields(7),
    "fields that are null": fields(None),
    "objects": fields({"logits": ["object", [3]]}),
    "objects by letter": fields({"logits": ["O", [3]]}),
    "a type of several": fields({"logits": ["O,O,O", [3]]}),
    "a type that is a list": fields({"logits": [["a", "O"], [3]]}),
    "texts": fields({"logits": ["U8", [3]]}),
    "bytes without a type": fields({"logits": ["V12", [3]]}),
    "times": fields({"logits": ["datetime64", [3]]}),
    "another type": fields({"logits": ["float16", [3]]}),
    "negative sizes": fields({"logits": ["float32", [-3]]}),
    "two negative sizes": fields({"logits": ["float32", [-3, -3]]}),
    "huge sizes": fields({"logits": ["float32", [2**62]]}),
    "sizes that overflow together": fields({"logits": ["float32", [2**30, 2**30, 2**30]]}),
    "sizes that are no numbers": fields({"logits": ["float32", ["3"]]}),
    "sizes that are true": fields({"logits": ["float32", [True]]}),
    "sizes that are fractions": fields({"logits": ["float32", [3.0]]}),
    "no sizes": fields({"logits": ["float32", []]}),
    "nothing in an item": fields({"logits": ["float32", [0]]}),
    "a field outside the folder": fields({"../../logits": ["float32", [3]]}),
    "a field of another name": fields({"evil": ["float32", [3]]}),
    "one field more": fields({"logits": ["float32", [3]], "hidden_9": ["float32", [3]]}),
    "the best of more classes": fields({"log_probs": ["float32", [1, 2]], "classes": ["int32", [2]]}),
    "more classes": written_anew({}, (5,), 1),
    "fewer classes": written_anew({}, (1,), 1),
    "more items": written_anew({}, (3,), 7),
    "no items": written_anew({}, (3,), 0),
    "no rows": lambda folder: only(folder, "rows").unlink(),
    "no index": lambda folder: only(folder, "index").unlink(),
    "empty rows": cut("rows", 0),
    "cut rows": cut("rows", 17),
    "an empty index": cut("index", 0),
    "an index without its header": cut("index", 9),
    "an index with a header alone": cut("index", 24),
    "a cut index": cut("index", 24 + 40 + 7),
    "an index of zeros": lambda folder: only(folder, "index").write_bytes(bytes(200)) and None,
    "noise behind the index": lambda folder: append(only(folder, "index"), b"\x7f" * 999),
    "an index without an end": sparse("index", HUGE),
    "rows without an end": sparse("rows", HUGE),
    "an index that is a pipe": in_the_place_of("index", os.mkfifo),
    "rows that are a pipe": in_the_place_of("rows", os.mkfifo),
    "rows that are a device": in_the_place_of("rows", lambda path: path.symlink_to("/dev/zero")),
    "an index that is a folder": in_the_place_of("index", Path.mkdir),
    "rows before the first": entries(-12, 1),
    "a negative number of items": entries(0, -1),
    "rows behind the last": entries(10**6, 1),
    "items that overflow": entries(2**62, 2**62),
    "the largest number of items": entries(0, 2**63 - 1),
    "more items than there are": entries(0, 3),
    "one row for all": entries(0, 1),
    "other keys": entries(0, 1, bytes(16)),
    "all of a file without an end": lambda folder: (sparse("rows", HUGE)(folder), entries(0, HUGE // 12)(folder))[0],
    "strange files": lambda folder: (folder / "x.index").write_bytes(b"signals2" + bytes(500)) and None,
    "a pickle": text("0.rows", b"\x80\x04cos\nsystem\n(S'touch harmed'\ntR."),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "an empty config": text("config.json", b""),
    "a deep config": text("config.json", DEEP),
    "a config that is a list": text("config.json", b"[]"),
    "a config that is a pipe": in_the_place_of("config.json", os.mkfifo),
    "code of its own": config(auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}),
    "code of its own, of a kind that is not known": config(
        auto_map={"AutoConfig": "evil.Config"}, model_type="evil", architectures=["EvilForSequenceClassification"]
    ),
    "kernels of somebody's": config(_attn_implementation="somebody/evil", attn_implementation="somebody/evil"),
    "a quantizer": config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "an architecture that is no model": config(architectures=["Trainer"]),
    "an architecture that is a function": config(architectures=["pipeline"]),
    "an architecture that is a module": config(architectures=["utils"]),
    "an architecture that is a number": config(architectures=[7]),
    "no architecture": config(architectures=[]),
    "an architecture of another kind": config(architectures=["LlamaForCausalLM"]),
    "a kind that is a list": config(model_type=["bert"]),
    "layers that no machine has": config(num_hidden_layers=10**9),
    "labels that no machine has": config(num_labels=10**9),
    "sizes that no machine has": config(hidden_size=2**61, vocab_size=2**61),
    "sizes that are texts": config(hidden_size="large"),
    "sizes below 0": config(hidden_size=-16),
    "no heads": config(num_attention_heads=0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_folder_that_is_not_what_it_says(
    name: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(good, folder)
    CASES[name](folder)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    (folder / "evil.py").write_text("import pathlib; pathlib.Path('harmed').touch()")
    # A question on the terminal would be answered with yes.
    monkeypatch.setattr("builtins.input", lambda *_: "y")

    asked, told = module(), []
    true = asked.teacher_step(DATA).logits
    for top_k in (None, 2):
        try:
            torch.testing.assert_close(ask(folder, asked, top_k).logits, true)
        except ValueError as error:
            told.append(str(error))
    try:
        teacher: Any = TeacherCache.teacher(folder)
        assert type(teacher).__module__.startswith("transformers.")
        assert not list(teacher.parameters())
    except ValueError as error:
        told.append(str(error))
    for line in told:
        assert line.startswith("Expected")
        assert str(folder) in line
        assert len(line) < 1000
        assert line.isprintable()
    assert not list(home.iterdir())


def test_answers_that_somebody_made_up_for_classes_that_are_not_there(tmp_path: Path) -> None:
    asked = module()
    ask(tmp_path / "cache", asked, top_k=2)
    description = json.loads((tmp_path / "cache" / "cache.json").read_text())
    description.pop("format")
    content = only(tmp_path / "cache", "index").read_bytes()
    keys = [content[start : start + 16] for start in range(24, len(content), 48)]
    shutil.rmtree(tmp_path / "cache")
    kinds = {name: (kind, tuple(shape)) for name, (kind, shape) in description["fields"].items()}
    store = SignalStore(tmp_path / "cache", description, kinds)
    for key in keys:
        store.write(key, {"log_probs": np.zeros((1, 1, 2)), "classes": np.array([[0, 2**30]])})
    store.close()
    with pytest.raises(ValueError, match="to hold classes from 0 to 2, but got others"):
        ask(tmp_path / "cache", asked, top_k=2)
