"""Models that are read from a folder or the hub; what :func:`export` writes, they read."""

import os
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import transformers
from torch import nn

from lightning_distill.models.embedding import FIELD, embedding_class, settings_of, without_pooler
from lightning_distill.models.exporting import export
from lightning_distill.models.files import (
    BROKEN,
    INDEX,
    WEIGHTS,
    Tensors,
    check_config,
    check_size,
    on_meta,
    one_line,
    read_json,
    some,
    stored_tensors,
    without_reports,
)
from lightning_distill.models.heads import HEAD_CLASSES
from lightning_distill.models.wrapped import compiled_in_place

__all__ = [
    "architecture_of",
    "export",
    "load_module",
    "load_pretrained",
    "load_tokenizer",
    "load_with_new_head",
    "read_config",
]

Module = TypeVar("Module", bound=nn.Module)

#: Names of what a model has for its task alone: a file may hold more of it than the model that is loaded.
HEADS = (
    *("head", "heads", "lm_head", "*classifier", "classification_head", "score", "cls", "pooler", "qa_outputs"),
    *("embed_out", "vocab_*", "*predictions", "pred_layer", "logits_proj", "sequence_summary"),
    *("decoder.bias", "decoder.weight"),  # ModernBERT's; the decoder of others is no head
)


def load_pretrained(model: nn.Module | str | os.PathLike[str], name: str = "model") -> nn.Module:
    """Load a transformers model with the head its config names; a module comes back as it is.

    A model of sentence-transformers is loaded as an :class:`~lightning_distill.models.embedding.EmbeddingModel`. What
    ``torch.compile`` returned comes back as the module inside it, compiled in place. Only safetensors are read, and
    code beside the model is never run: whoever trusts it says so by name, to
    ``from_pretrained(..., trust_remote_code=True)``, and passes the model.

    Args:
        model: A module, a local folder, or a hub id.
        name: What the argument is called where the user gave it, for the error.

    Returns:
        The model, in float32.

    Raises:
        ValueError: If the folder's config names no class of transformers, or only a body without a head, or the folder
            is not whole: weights that are missing, damaged, of other shapes, or of no layer of the model.
        TypeError: If ``model`` is neither a module nor a path.
    """
    if isinstance(model, nn.Module):
        return compiled_in_place(model)
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(
            f"Expected argument `{name}` to be an nn.Module, a folder or a hub id, but got {type(model).__name__}."
        )
    path = os.fspath(model)
    if (settings := settings_of(path)) is not None:
        config = read_config(path, name)
        setattr(config, FIELD, settings)
        return without_pooler(load_whole(embedding_class(config), path, name, config=config))
    return load_whole(architecture_of(path, name), path, name)


def load_module(kind: type[Module], folder: str | os.PathLike[str], name: str = "folder") -> Module:
    """Make a module again that :func:`export` wrote and that is not of transformers.

    Its class is given and not read off the folder: code that a folder names is never run.

    Args:
        kind: The module's class.
        folder: Where it was written.
        name: What the argument is called where the user gave it, for the error.

    Returns:
        The module, made with the hyper-parameters of the folder, with its weights.

    Raises:
        ValueError: If the folder holds another class, or is not whole.

    Example:
        >>> import tempfile
        >>> from lightning_distill.models.cifar_resnet import CifarResNet
        >>> from lightning_distill.models.pretrained import export, load_module
        >>> folder = export(CifarResNet(8, num_labels=3), tempfile.mkdtemp())
        >>> load_module(CifarResNet, folder).hparams["num_labels"]
        3
    """
    path = Path(folder)
    try:
        described = read_json(path / "config.json")
        written = str(described["class_path"]).rpartition(".")[2]
        if written != kind.__name__:
            raise ValueError(f"it holds a {written}")
        module = kind(**described["init_args"])
        safetensors.torch.load_model(module, path / WEIGHTS)
    except BROKEN as error:
        what = f"a folder that `export` wrote of a {kind.__name__}"
        raise ValueError(_refusal(os.fspath(folder), name, one_line(error), what)) from None
    return module


def is_of_module(path: str | os.PathLike[str]) -> bool:
    """Whether a path has weights of a module that is not of transformers.

    That is a ``.safetensors`` file, a folder of them without a ``config.json``, or what :func:`export` wrote of one.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        return path.suffix == ".safetensors" or any(path.glob("*.safetensors"))
    try:
        return "class_path" in read_json(path / "config.json")
    except BROKEN:
        return False


def load_whole(architecture: Any, path: str, name: str, **options: Any) -> nn.Module:
    """Load a transformers model of a class that is known, all of it.

    Args:
        architecture: The class.
        path: A local folder, or a hub id.
        name: What the argument is called where the user gave it, for the error.
        **options: For ``from_pretrained``.

    Returns:
        The model, in float32.

    Raises:
        ValueError: If there is no such model, or it is not whole.
    """
    return _load(architecture, path, name, lambda key: False, **options)[0]


def load_with_new_head(path: str, name: str, task: str = "classification", **config: Any) -> nn.Module:
    """Load a transformers model with the head of a task, whatever its head is.

    Args:
        path: A local folder, or a hub id.
        name: What the argument is called where the user gave it, for the error.
        task: A task of :data:`lightning_distill.models.heads.HEAD_CLASSES`.
        **config: Settings of the new head: ``num_labels``, or ``id2label`` and ``label2id``; ``problem_type``.

    Returns:
        The model, in float32. Its head is that of the folder where it is one for the same classes, else a new one.

    Raises:
        ValueError: If there is no such model, or none with such a head, or more than a head is missing.
    """
    earlier, config = read_config(path, name), {"problem_type": None, **config}
    mappings = [getattr(transformers, f"MODEL_FOR_{kind}_MAPPING") for kind in HEAD_CLASSES[task]]
    try:
        settings = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, **config)
        mapping = next((mapping for mapping in mappings if type(settings) in mapping), mappings[0])
        architecture: Any = mapping[type(settings)]
    except BROKEN as error:
        raise ValueError(_refusal(path, name, one_line(error))) from error
    prefix = f"{architecture.base_model_prefix}."
    loaded, missing = _load(
        architecture, path, name, lambda key: _of_head(key) or not key.startswith(prefix), config=settings
    )
    kept = [key for key in loaded.state_dict() if not key.startswith(prefix) and key not in missing]
    others = earlier.architectures != [architecture.__name__] or earlier.label2id != settings.label2id
    if kept and others:
        # A head of as many classes, but of others.
        fresh = architecture(settings).state_dict()
        loaded.load_state_dict({**loaded.state_dict(), **{key: fresh[key] for key in kept}})
    return loaded


def _load(
    architecture: Any, path: str, name: str, may_be_new: Callable[[str], bool], **options: Any
) -> tuple[nn.Module, set[str]]:
    """A model with all of its weights, but for those that may be new; and which of them are."""
    folder, stored = Path(path), None
    try:
        if folder.is_dir():
            stored = stored_tensors(folder)
            settings = options.get("config") or transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
            # Quantised weights share their bytes.
            packed = 16 if getattr(settings, "quantization_config", None) else 1
            check_size(on_meta(architecture, settings, folder / "config.json"), packed * stored.elements, folder)
            for file in filter(Path.exists, (folder / "generation_config.json", folder / INDEX)):
                read_json(file)
        with without_reports():
            loaded, found = architecture.from_pretrained(
                path, use_safetensors=True, dtype="float32", trust_remote_code=False,
                output_loading_info=True, ignore_mismatched_sizes=True, **options,
            )  # fmt: skip
    except BROKEN as error:
        raise ValueError(_refusal(path, name, one_line(error))) from error
    mismatched = {key for key, *_ in found["mismatched_keys"]}
    missing = set(found["missing_keys"]) | mismatched
    wrong = [
        ("lacks", set(found["missing_keys"])),
        ("has in another shape", mismatched),
        ("has beyond the model", {key for key in found["unexpected_keys"] if not _of_head(key)}),
    ]
    wrong = [(what, {key for key in keys if not may_be_new(key)}) for what, keys in wrong]
    said = [f"{what} {some(keys)}" for what, keys in wrong if keys]
    if said:
        what = f"a whole {architecture.__name__}"
        raise ValueError(_refusal(path, name, f"its {WEIGHTS} {', and '.join(said)}. Save the model again", what))
    if stored is not None and not getattr(loaded.config, "quantization_config", None):
        numbers = {key: kind for key, kind in stored.dtypes.items() if not kind.startswith(("F16", "F32", "F64", "BF"))}
        floats = {key for key, parameter in loaded.named_parameters() if parameter.is_floating_point()}
        if whole := floats & set(numbers):
            holds = f"its {WEIGHTS} holds {some(whole)} as {numbers[min(whole)]} without their scales"
            raise ValueError(_refusal(path, name, holds, "a model in floating point"))
    return loaded, missing


def _of_head(key: str) -> bool:
    """Whether a weight is of a head, which other tasks do not have."""
    return any(fnmatchcase(part, pattern) for part in (*key.split("."), key) for pattern in HEADS)


def _refusal(path: str, name: str, said: str, what: str = "a folder or hub id of a transformers model") -> str:
    return f"Expected argument `{name}` to be {what}, but got {path!r}: {said}"


def load_tokenizer(path: str | os.PathLike[str], name: str, model: nn.Module | None = None) -> Any:
    """Load the tokenizer of a folder or hub id.

    Args:
        path: The folder or hub id.
        name: What the argument is called where the user gave it, for the error.
        model: The model that reads its words; None: not known.

    Returns:
        The tokenizer.

    Raises:
        ValueError: If there is none, it is not whole, or has more words than the model.
    """
    path = os.fspath(path)
    try:
        if Path(path).is_dir():
            for file in ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"):
                if (Path(path) / file).exists():
                    read_json(Path(path) / file)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        # The Rust library under it raises nothing more special.
        if type(error) is not Exception and not isinstance(error, BROKEN):
            raise
        said = f"tokenizer.json: {one_line(error)}"
        raise ValueError(_refusal(path, name, said, "a folder or hub id with a tokenizer")) from error
    # Of a folder without its words transformers makes a tokenizer that knows none.
    files = {*type(tokenizer).vocab_files_names.values(), "tokenizer.json"}
    if Path(path).is_dir() and type(tokenizer).vocab_files_names and not any((Path(path) / f).is_file() for f in files):
        said = f"it has none of {sorted(files)}. Save the tokenizer there (`tokenizer.save_pretrained`)"
        raise ValueError(_refusal(path, name, said, "a folder or hub id with a tokenizer"))
    if model is not None:
        check_words(tokenizer, model, path, name)
    return tokenizer


def check_words(tokenizer: Any, model: Any, path: str, name: str) -> None:
    """Refuse a tokenizer with words that a model has no embedding for.

    Args:
        tokenizer: The tokenizer.
        model: The model.
        path: Where both are from.
        name: What the argument is called where the user gave it, for the error.

    Raises:
        ValueError: If it has.
    """
    words, embedding = tokenizer.get_vocab(), model.get_input_embeddings()
    last = max(words, key=words.__getitem__, default=None)
    if last is not None and hasattr(embedding, "weight") and words[last] >= len(embedding.weight):
        said = (
            f"its tokenizer numbers the word {last!r} {words[last]:,}, and the model has {len(embedding.weight):,} "
            "words. Save the tokenizer that it was trained with, or call `model.resize_token_embeddings` and train it"
        )
        raise ValueError(_refusal(path, name, said, "a model with its own tokenizer"))


def architecture_of(path: str, name: str) -> Any:
    """The class with a head that the config of a transformers folder or hub id names.

    Args:
        path: The folder or hub id.
        name: What the argument is called where the user gave it, for the error.

    Raises:
        ValueError: If there is no config, or it names no class of transformers with a head.
    """
    config = read_config(path, name)
    kind = class_of(config)
    if kind is None or not has_head(config):
        architecture = (config.architectures or ["no architecture"])[0]
        raise ValueError(
            f"Expected argument `{name}` to be a model with a head, but the config of {path!r} names "
            f"{architecture}. Load it yourself with the head you need, for example "
            f"`AutoModelForSequenceClassification.from_pretrained({path!r}, num_labels=...)`, and pass the model."
        )
    if not isinstance(config, kind.config_class):
        said = f"its config.json is of a {config.model_type}, and names {kind.__name__}"
        raise ValueError(_refusal(path, name, said))
    return kind


def class_of(config: Any) -> Any:
    """The class of transformers that a config says it was saved by; None where it names none."""
    name = (getattr(config, "architectures", None) or [None])[0]
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


def read_config(path: str, name: str) -> Any:
    """The config of a transformers folder or hub id.

    Args:
        path: The folder or hub id.
        name: What the argument is called where the user gave it, for the error.

    Raises:
        ValueError: If there is none, or it describes what the weights beside it cannot be.
    """
    folder = Path(path)
    try:
        if folder.is_dir():
            has_weights = any(os.path.lexists(folder / file) for file in (WEIGHTS, INDEX))
            check_config(folder / "config.json", stored_tensors(folder) if has_weights else Tensors())
    except ValueError as error:
        raise ValueError(_refusal(path, name, str(error))) from error
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except BROKEN as error:
        raise ValueError(_refusal(path, name, f"config.json: {one_line(error)}")) from error


def has_head(config: Any) -> bool:
    """Whether a transformers config was saved by a model with a task head."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    return isinstance(architecture, str) and ("For" in architecture or architecture.endswith("LMHeadModel"))
