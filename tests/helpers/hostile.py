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


def _bytes(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes(content))


def _cut(name: str, share: float) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return cut


def _gone(*names: str) -> Callable[[Path], None]:
    def gone(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return gone


def _replaced(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def replaced(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return replaced


def _json(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return change


def _config(**changes: Any) -> Callable[[Path], None]:
    return _json("config.json", **changes)


def _tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        safetensors.torch.save_file(change(tensors), folder / WEIGHTS, {"format": "pt"})

    return changed


def _header(header: dict[str, Any] | bytes, data: bytes = b"") -> Callable[[Path], None]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return _bytes(WEIGHTS, len(text).to_bytes(8, "little") + text + data)


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
    "no weights": _gone(WEIGHTS),
    "empty weights": _bytes(WEIGHTS, b""),
    "three bytes of weights": _bytes(WEIGHTS, b"\1\2\3"),
    "weights cut in their header": _cut(WEIGHTS, 0.01),
    "weights cut in their data": _cut(WEIGHTS, 0.9),
    "weights with more behind them": lambda folder: void(
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"more")
    ),
    "weights of random bytes": _bytes(WEIGHTS, bytes(range(256)) * 40),
    "a pointer of git lfs": _bytes(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"),
    "a page of html": _bytes(WEIGHTS, b"<!doctype html><title>404</title>"),
    "a pickle under another name": _bytes(WEIGHTS, pickle.dumps({"a": 1})),
    "a header of 2**63 bytes": _bytes(WEIGHTS, b"\xff" * 7 + b"\x7f{}"),
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
    "no tensors": _tensors(lambda tensors: {}),
    "a layer less": _tensors(lambda tensors: {k: v for k, v in tensors.items() if ".layer.1." not in k}),
    "a tensor less": _tensors(lambda tensors: dict(list(tensors.items())[1:])),
    "a head less": _tensors(lambda tensors: {k: v for k, v in tensors.items() if "classifier" not in k}),
    "an embedding less": _tensors(lambda tensors: {k: v for k, v in tensors.items() if "word_emb" not in k}),
    "a layer more": _tensors(
        lambda tensors: {**tensors, **{k.replace("r.1.", "r.2."): v.clone() for k, v in tensors.items() if "r.1." in k}}
    ),
    "a tensor more": _tensors(lambda tensors: {**tensors, "surprise": torch.ones(2)}),
    "another shape": _tensors(lambda tensors: {k: v[..., :3].clone() if v.ndim > 1 else v for k, v in tensors.items()}),
    "another shape of the head": _tensors(
        lambda tensors: {k: v[:1].clone() if "classifier" in k else v for k, v in tensors.items()}
    ),
    "scalars": _tensors(lambda tensors: {k: torch.tensor(1.0) for k in tensors}),
    "other names": _tensors(lambda tensors: {k.replace("bert.", "model."): v for k, v in tensors.items()}),
    "whole numbers": _tensors(lambda tensors: {k: (v * 100).to(torch.int8) for k, v in tensors.items()}),
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
    "a shard that is cut": _shard(_cut("0.safetensors", 0.5)),
    "a shard that is empty": _shard(_bytes("1.safetensors", b"")),
}
CONFIGS: dict[str, Callable[[Path], None]] = {
    "no config": _gone("config.json"),
    "an empty config": _bytes("config.json", b""),
    "a config that is cut": _cut("config.json", 0.5),
    "a config that is too deep": _bytes("config.json", DEEP),
    "a config of lists that is too deep": _bytes("config.json", b"[" * 100_000),
    "a config of random bytes": _bytes("config.json", bytes(range(256))),
    "a config in UTF-16": lambda folder: void(
        (folder / "config.json").write_bytes((folder / "config.json").read_text().encode("utf-16"))
    ),
    "a config that is null": _bytes("config.json", b"null"),
    "a config that is a list": _bytes("config.json", b"[]"),
    "a config that is {}": _bytes("config.json", b"{}"),
    "a config that is a folder": _replaced("config.json", Path.mkdir),
    "a config that is a pipe": _replaced("config.json", os.mkfifo),
    "a config that is a link to itself": _replaced("config.json", lambda path: path.symlink_to(path)),
    "no architecture": _config(architectures=None),
    "architectures that are a number": _config(architectures=3),
    "architectures that are a string": _config(architectures="BertForSequenceClassification"),
    "architectures in lists": _config(architectures=[["BertForSequenceClassification"]]),
    "an architecture that nobody knows": _config(architectures=["MineForSequenceClassification"]),
    "an architecture that is a function": _config(architectures=["pipeline"]),
    "an architecture that finds others": _config(architectures=["AutoModelForSequenceClassification"]),
    "an architecture of another model": _config(architectures=["LlamaForCausalLM"]),
    "an architecture with another head": _config(architectures=["BertForMaskedLM"]),
    "code of its own": _config(auto_map={"AutoConfig": "mine.Config"}, model_type="mine"),
    "a kind of model that nobody knows": _config(model_type="mine"),
    "a kind of model that is a number": _config(model_type=3),
    "a kind of model that is another": _config(model_type="llama"),
    "10**9 layers": _config(num_hidden_layers=10**9),
    "-1 layers": _config(num_hidden_layers=-1),
    "a layer more than there are": _config(num_hidden_layers=3),
    "a layer less than there are": _config(num_hidden_layers=1),
    "layers that are a string": _config(num_hidden_layers="two"),
    "layers that are null": _config(num_hidden_layers=None),
    "half a layer": _config(num_hidden_layers=1.5),
    "a width of 10**6": _config(hidden_size=10**6),
    "a width of 10**12": _config(hidden_size=10**12),
    "a width of 10**400": _config(hidden_size=10**400),
    "a width of 0": _config(hidden_size=0),
    "a width of -16": _config(hidden_size=-16),
    "a width of NaN": _config(hidden_size=float("nan")),
    "no heads": _config(num_attention_heads=0),
    "heads that do not divide": _config(num_attention_heads=3),
    "10**9 heads": _config(num_attention_heads=10**9),
    "10**12 words": _config(vocab_size=10**12),
    "a word more than there are": _config(vocab_size=81),
    "10**9 classes": _config(num_labels=10**9),
    "a class more than there are": _config(id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}),
    "10**12 positions": _config(max_position_embeddings=10**12),
    "an inner width of 10**9": _config(intermediate_size=10**9),
    "an activation that nobody knows": _config(hidden_act="mine"),
    "an activation that is a number": _config(hidden_act=3),
    "classes that are a list": _config(id2label=["a", "b"]),
    "classes that are a number": _config(id2label=7),
    "classes with names for numbers": _config(id2label={"a": "a", "b": "b"}),
    "a type that is none": _config(dtype="object"),
    "quantised by a list": _config(quantization_config=[1]),
    "quantised by GPTQ, and is not": _config(quantization_config={"quant_method": "gptq", "bits": 4}),
    "weights in a file elsewhere": _config(transformers_weights="../outside.safetensors"),
    "weights in a pickle by name": _config(transformers_weights="pytorch_model.bin"),
    "attention from the hub": _config(attn_implementation="somebody/kernel"),
    "attention from the hub, deeper": _config(_attn_implementation={"": "somebody/kernel"}),
    "an adapter beside it": _bytes("adapter_config.json", b'{"base_model_name_or_path": "../elsewhere"}'),
    "an adapter alone": lambda folder: (
        _gone("config.json")(folder),
        _bytes("adapter_config.json", b'{"base_model_name_or_path": "../elsewhere"}')(folder),
    )[0],
    "generation settings that are too deep": _bytes("generation_config.json", DEEP),
    "generation settings that are cut": _bytes("generation_config.json", b'{"a"'),
    "generation settings that are a list": _bytes("generation_config.json", b"[1]"),
}
TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "no tokenizer": _gone("tokenizer.json", "tokenizer_config.json"),
    "no words": _gone("tokenizer.json"),
    "a tokenizer that is cut": _cut("tokenizer.json", 0.7),
    "a tokenizer that is empty": _bytes("tokenizer.json", b""),
    "a tokenizer that is {}": _bytes("tokenizer.json", b"{}"),
    "a tokenizer that is a list": _bytes("tokenizer.json", b"[]"),
    "a tokenizer that is too deep": _bytes("tokenizer.json", DEEP),
    "a tokenizer without a model": _json("tokenizer.json", model=None),
    "a tokenizer of another kind": _json("tokenizer.json", model={"type": "Mine"}),
    "a tokenizer with a normalizer nobody knows": _json("tokenizer.json", normalizer={"type": "Mine"}),
    "a tokenizer that is a folder": _replaced("tokenizer.json", Path.mkdir),
    "settings that are cut": _cut("tokenizer_config.json", 0.5),
    "settings that are too deep": _bytes("tokenizer_config.json", DEEP),
    "settings that are a list": _bytes("tokenizer_config.json", b"[]"),
    "words beyond the model": _json(
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
