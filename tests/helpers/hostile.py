"""Model folders that are damaged, not whole, or made to do harm; each is made of a good one."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def change_bytes(name: str, content: bytes) -> Callable[[Path], None]:
    """Another content of a file."""
    return lambda folder: void((folder / name).write_bytes(content))


def cut(name: str, share: float) -> Callable[[Path], None]:
    """A share of a file, from its beginning."""

    def shorten(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return shorten


def gone(*names: str) -> Callable[[Path], None]:
    """Files removed."""

    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def _replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def replaced(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return replaced


def change_json(name: str, **changes: Any) -> Callable[[Path], None]:
    """Other values in a file of JSON."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return change


def change_config(**changes: Any) -> Callable[[Path], None]:
    """Other values in config.json."""
    return change_json("config.json", **changes)


def change_tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    """Other tensors in model.safetensors."""

    def changed(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        safetensors.torch.save_file(change(tensors), folder / WEIGHTS, {"format": "pt"})

    return changed


def _header(header: dict[str, Any] | bytes, data: bytes = b"") -> Callable[[Path], None]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return change_bytes(WEIGHTS, len(text).to_bytes(8, "little") + text + data)


def _index(weight_map: Callable[[Path, list[str]], Any]) -> Callable[[Path], None]:
    """Two good shards and an index that is not."""

    def index(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        names = sorted(tensors)
        (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
        for number, part in enumerate((names[::2], names[1::2])):
            safetensors.torch.save_file({name: tensors[name] for name in part}, folder / f"{number}.safetensors")
        content = weight_map(folder, names)
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / INDEX).write_bytes(text)

    return index


def _map(names: list[str], **others: str) -> dict[str, Any]:
    shards = {name: f"{place % 2}.safetensors" for place, name in enumerate(names)}
    return {"metadata": {}, "weight_map": shards | {names[0]: next(iter(others.values()), shards[names[0]])}}


def _shard(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def shard(folder: Path) -> None:
        _index(lambda _, names: _map(names))(folder)
        make(folder)

    return shard


def _pickled_shard(folder: Path, names: list[str]) -> dict[str, Any]:
    torch.save({}, folder / "0.bin")
    return _map(names, file="0.bin")


def void(_: object) -> None:
    """Nothing, whatever a call gave."""


WEIGHT_FILES: dict[str, Callable[[Path], None]] = {
    "no weights": gone(WEIGHTS),
    "empty weights": change_bytes(WEIGHTS, b""),
    "three bytes of weights": change_bytes(WEIGHTS, b"\1\2\3"),
    "weights cut in their header": cut(WEIGHTS, 0.01),
    "weights cut in their data": cut(WEIGHTS, 0.9),
    "weights with more behind them": lambda folder: void(
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"more")
    ),
    "weights of random bytes": change_bytes(WEIGHTS, bytes(range(256)) * 40),
    "a pointer of git lfs": change_bytes(
        WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
    ),
    "a page of html": change_bytes(WEIGHTS, b"<!doctype html><title>404</title>"),
    "a pickle under another name": change_bytes(WEIGHTS, pickle.dumps({"a": 1})),
    "a header of 2**63 bytes": change_bytes(WEIGHTS, b"\xff" * 7 + b"\x7f{}"),
    "a header that is no json": _header(b"{not json}"),
    "a header that is too deep": _header(DEEP),
    "a header that is a list": _header(b"[1]"),
    "tensors beyond the file": _header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    "tensors over each other": _header(
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}, bytes(4)
    ),
    "a type that nobody knows": _header({"a": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
    "weights that are a folder": _replaced(WEIGHTS, Path.mkdir),
    "weights that are a pipe": _replaced(WEIGHTS, os.mkfifo),
    "a link to nowhere": _replaced(WEIGHTS, lambda path: path.symlink_to("nowhere")),
    "a link to itself": _replaced(WEIGHTS, lambda path: path.symlink_to(path)),
    "pickled weights alone": _replaced(WEIGHTS, lambda path: torch.save({}, path.with_name("pytorch_model.bin"))),
    "no tensors": change_tensors(lambda tensors: {}),
    "a layer less": change_tensors(lambda tensors: {k: v for k, v in tensors.items() if ".layer.1." not in k}),
    "a tensor less": change_tensors(lambda tensors: dict(list(tensors.items())[1:])),
    "a head less": change_tensors(lambda tensors: {k: v for k, v in tensors.items() if "classifier" not in k}),
    "an embedding less": change_tensors(lambda tensors: {k: v for k, v in tensors.items() if "word_emb" not in k}),
    "a layer more": change_tensors(
        lambda tensors: {**tensors, **{k.replace("r.1.", "r.2."): v.clone() for k, v in tensors.items() if "r.1." in k}}
    ),
    "a tensor more": change_tensors(lambda tensors: {**tensors, "surprise": torch.ones(2)}),
    "another shape": change_tensors(
        lambda tensors: {k: v[..., :3].clone() if v.ndim > 1 else v for k, v in tensors.items()}
    ),
    "another shape of the head": change_tensors(
        lambda tensors: {k: v[:1].clone() if "classifier" in k else v for k, v in tensors.items()}
    ),
    "scalars": change_tensors(lambda tensors: {k: torch.tensor(1.0) for k in tensors}),
    "other names": change_tensors(lambda tensors: {k.replace("bert.", "model."): v for k, v in tensors.items()}),
    "whole numbers": change_tensors(lambda tensors: {k: (v * 100).to(torch.int8) for k, v in tensors.items()}),
    "an index that is cut": _index(lambda folder, names: json.dumps(_map(names)).encode()[:99]),
    "an index that is a list": _index(lambda folder, names: [1]),
    "an index that is too deep": _index(lambda folder, names: DEEP),
    "an index without a map": _index(lambda folder, names: {"metadata": {}}),
    "an index with an empty map": _index(lambda folder, names: {"weight_map": {}}),
    "an index to numbers": _index(lambda folder, names: {"weight_map": dict.fromkeys(names, 1)}),
    "an index to a file that is not there": _index(lambda folder, names: _map(names, file="2.safetensors")),
    "an index to a pickle": _index(_pickled_shard),
    "an index to the parent": _index(lambda folder, names: _map(names, file="../outside.safetensors")),
    "an index by a way back": _index(lambda folder, names: _map(names, file="a/../../outside.safetensors")),
    "an index to an absolute path": _index(
        lambda folder, names: _map(names, file=str(folder.parent / "outside.safetensors"))
    ),
    "an index to the parent on Windows": _index(lambda folder, names: _map(names, file="..\\outside.safetensors")),
    "an index to a pickle elsewhere": _index(lambda folder, names: _map(names, file="/etc/model.bin")),
    "an index that says it wrongly": _index(lambda folder, names: _map(names, file="1.safetensors")),
    "an index that leaves a tensor out": _index(
        lambda folder, names: {"metadata": {}, "weight_map": dict.fromkeys(names[::2], "0.safetensors")}
    ),
    "a shard that is cut": _shard(cut("0.safetensors", 0.5)),
    "a shard that is empty": _shard(change_bytes("1.safetensors", b"")),
}
CONFIGS: dict[str, Callable[[Path], None]] = {
    "no config": gone("config.json"),
    "an empty config": change_bytes("config.json", b""),
    "a config that is cut": cut("config.json", 0.5),
    "a config that is too deep": change_bytes("config.json", DEEP),
    "a config of lists that is too deep": change_bytes("config.json", b"[" * 100_000),
    "a config of random bytes": change_bytes("config.json", bytes(range(256))),
    "a config in UTF-16": lambda folder: void(
        (folder / "config.json").write_bytes((folder / "config.json").read_text().encode("utf-16"))
    ),
    "a config that is null": change_bytes("config.json", b"null"),
    "a config that is a list": change_bytes("config.json", b"[]"),
    "a config that is {}": change_bytes("config.json", b"{}"),
    "a config that is a folder": _replaced("config.json", Path.mkdir),
    "a config that is a pipe": _replaced("config.json", os.mkfifo),
    "a config that is a link to itself": _replaced("config.json", lambda path: path.symlink_to(path)),
    "no architecture": change_config(architectures=None),
    "architectures that are a number": change_config(architectures=3),
    "architectures that are a string": change_config(architectures="BertForSequenceClassification"),
    "architectures in lists": change_config(architectures=[["BertForSequenceClassification"]]),
    "an architecture that nobody knows": change_config(architectures=["MineForSequenceClassification"]),
    "an architecture that is a function": change_config(architectures=["pipeline"]),
    "an architecture that finds others": change_config(architectures=["AutoModelForSequenceClassification"]),
    "an architecture of another model": change_config(architectures=["LlamaForCausalLM"]),
    "an architecture with another head": change_config(architectures=["BertForMaskedLM"]),
    "code of its own": change_config(auto_map={"AutoConfig": "mine.Config"}, model_type="mine"),
    "a kind of model that nobody knows": change_config(model_type="mine"),
    "a kind of model that is a number": change_config(model_type=3),
    "a kind of model that is another": change_config(model_type="llama"),
    "10**9 layers": change_config(num_hidden_layers=10**9),
    "-1 layers": change_config(num_hidden_layers=-1),
    "a layer more than there are": change_config(num_hidden_layers=3),
    "a layer less than there are": change_config(num_hidden_layers=1),
    "layers that are a string": change_config(num_hidden_layers="two"),
    "layers that are null": change_config(num_hidden_layers=None),
    "half a layer": change_config(num_hidden_layers=1.5),
    "a width of 10**6": change_config(hidden_size=10**6),
    "a width of 10**12": change_config(hidden_size=10**12),
    "a width of 10**400": change_config(hidden_size=10**400),
    "a width of 0": change_config(hidden_size=0),
    "a width of -16": change_config(hidden_size=-16),
    "a width of NaN": change_config(hidden_size=float("nan")),
    "no heads": change_config(num_attention_heads=0),
    "heads that do not divide": change_config(num_attention_heads=3),
    "10**9 heads": change_config(num_attention_heads=10**9),
    "10**12 words": change_config(vocab_size=10**12),
    "a word more than there are": change_config(vocab_size=81),
    "10**9 classes": change_config(num_labels=10**9),
    "a class more than there are": change_config(id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}),
    "10**12 positions": change_config(max_position_embeddings=10**12),
    "an inner width of 10**9": change_config(intermediate_size=10**9),
    "an activation that nobody knows": change_config(hidden_act="mine"),
    "an activation that is a number": change_config(hidden_act=3),
    "classes that are a list": change_config(id2label=["a", "b"]),
    "classes that are a number": change_config(id2label=7),
    "classes with names for numbers": change_config(id2label={"a": "a", "b": "b"}),
    "a type that is none": change_config(dtype="object"),
    "quantised by a list": change_config(quantization_config=[1]),
    "quantised by GPTQ, and is not": change_config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "weights in a file elsewhere": change_config(transformers_weights="../outside.safetensors"),
    "weights in a pickle by name": change_config(transformers_weights="pytorch_model.bin"),
    "attention from the hub": change_config(attn_implementation="somebody/kernel"),
    "attention from the hub, deeper": change_config(_attn_implementation={"": "somebody/kernel"}),
    "an adapter beside it": change_bytes("adapter_config.json", b'{"base_model_name_or_path": "../elsewhere"}'),
    "an adapter alone": lambda folder: (
        gone("config.json")(folder),
        change_bytes("adapter_config.json", b'{"base_model_name_or_path": "../elsewhere"}')(folder),
    )[0],
    "generation settings that are too deep": change_bytes("generation_config.json", DEEP),
    "generation settings that are cut": change_bytes("generation_config.json", b'{"a"'),
    "generation settings that are a list": change_bytes("generation_config.json", b"[1]"),
}
TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "no tokenizer": gone("tokenizer.json", "tokenizer_config.json"),
    "no words": gone("tokenizer.json"),
    "a tokenizer that is cut": cut("tokenizer.json", 0.7),
    "a tokenizer that is empty": change_bytes("tokenizer.json", b""),
    "a tokenizer that is {}": change_bytes("tokenizer.json", b"{}"),
    "a tokenizer that is a list": change_bytes("tokenizer.json", b"[]"),
    "a tokenizer that is too deep": change_bytes("tokenizer.json", DEEP),
    "a tokenizer without a model": change_json("tokenizer.json", model=None),
    "a tokenizer of another kind": change_json("tokenizer.json", model={"type": "Mine"}),
    "a tokenizer with a normalizer nobody knows": change_json("tokenizer.json", normalizer={"type": "Mine"}),
    "a tokenizer that is a folder": _replaced("tokenizer.json", Path.mkdir),
    "settings that are cut": cut("tokenizer_config.json", 0.5),
    "settings that are too deep": change_bytes("tokenizer_config.json", DEEP),
    "settings that are a list": change_bytes("tokenizer_config.json", b"[]"),
    "words beyond the model": change_json(
        "tokenizer.json",
        added_tokens=[
            {"id": 90, "content": "[NEW]", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
        ],
    ),
}  # fmt: skip


def hostile(good: Path, make: Callable[[Path], None], folder: Path) -> Path:
    """A copy of a good folder after somebody's work on it."""
    shutil.copytree(good, folder)
    make(folder)
    return folder
