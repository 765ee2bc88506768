"""Transformers encoders that answer with one vector a text, in the layout of sentence-transformers."""

import functools
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from lightning_distill.functional.tensors import full_precision

Pooling = Literal["mean", "cls", "max", "lasttoken"]

#: Under this name a config says how its model pools.
FIELD = "sentence_embedding"
_MODULES = "modules.json"
# By the last part of its type in modules.json, which has moved between releases.
_KINDS = {"Transformer", "Pooling", "Normalize"}
# As they are called in 1_Pooling/config.json by all releases; later ones also have `pooling_mode`.
_MODES: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
# Encoder-decoders whose encoder stands alone.
_ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}


@dataclass
class EmbeddingOutput(ModelOutput):
    """What an :class:`EmbeddingModel` returns.

    Args:
        logits: The embeddings, float32 ``[B, D]``, or ``[B, S, D]`` where a row has several texts.
        last_hidden_state: Of the encoder ``[B, T, D]``, or ``[B * S, T, D]``.
        hidden_states: As transformers returns them, where asked for.
        attentions: Likewise.
    """

    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def pool(states: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """One vector a text, of the hidden states of its tokens.

    Args:
        states: Shape ``[B, T, D]``.
        mask: ``[B, T]``, the real tokens; None where all are.
        pooling: ``"mean"`` or ``"max"`` over the real tokens, the first of them (``"cls"``) or the last
            (``"lasttoken"``).

    Returns:
        Shape ``[B, D]``, float32 (float64 for float64 states); 0 where no token is real.

    Example:
        >>> import torch
        >>> from lightning_distill.models.embedding import pool
        >>> states, mask = torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]])
        >>> [pool(states, mask, pooling).item() for pooling in ("mean", "cls", "max", "lasttoken")]
        [2.0, 1.0, 3.0, 3.0]
    """
    states = full_precision(states)
    real = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask.bool()
    if pooling == "mean":
        return states.masked_fill(~real[..., None], 0.0).sum(1) / real.sum(1).clamp(min=1)[:, None]
    if pooling == "max":
        largest = states.masked_fill(~real[..., None], -torch.inf).amax(1)
    else:
        places = torch.arange(states.shape[1], device=states.device)
        last = places if pooling == "lasttoken" else -places
        place = last.masked_fill(~real, -states.shape[1]).argmax(1)
        largest = states[torch.arange(len(states), device=states.device), place]
    return largest.masked_fill(~real.any(1)[:, None], 0.0)


class EmbeddingModel(transformers.PreTrainedModel):
    """A transformers encoder that answers with one vector a text: the states of its tokens, pooled.

    Its class is also that of the encoder (of a BERT, `BertModel`): what holds for a transformers model holds for it,
    and its weights have the names they have there. It reads ``input_ids`` ``[B, T]``, or ``[B, S, T]`` where a row has
    S texts, such as the two of a pair, or a query and its candidates; a text that is all padding is none, and its
    vector is 0. ``save_pretrained`` writes what ``AutoModel`` and sentence-transformers load.

    Make one by :meth:`of`; a folder or hub id of sentence-transformers is loaded by
    :func:`lightning_distill.models.pretrained.load_pretrained`, and so by ``DistillationModule``.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_distill.models.embedding import EmbeddingModel
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> model = EmbeddingModel.of(BertModel(BertConfig(vocab_size=9, **sizes)), pooling="mean")
        >>> model(input_ids=torch.ones(3, 2, 5, dtype=torch.long)).logits.shape
        torch.Size([3, 2, 8])
        >>> isinstance(model, BertModel)
        True

    Source: Reimers and Gurevych, "Sentence-BERT", 2019.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        without_pooler(self)

    @staticmethod
    def of(
        encoder: nn.Module, *, pooling: Pooling = "mean", normalize: bool = True, max_length: int | None = None
    ) -> "EmbeddingModel":
        """Let a transformers encoder pool, in place.

        Args:
            encoder: A transformers model without a head.
            pooling: See :func:`pool`.
            normalize: Whether vectors have length 1.
            max_length: How many tokens of a text sentence-transformers is to read; None: as many as it finds.

        Returns:
            The same model, now of a class that pools.

        Raises:
            ValueError: If there is no such pooling, or the model has a head, a decoder or no config.
        """
        if pooling not in get_args(Pooling):
            raise ValueError(f"Expected argument `pooling` to be one of {get_args(Pooling)}, but got {pooling!r}.")
        if isinstance(encoder, EmbeddingModel):
            kind = type(encoder)
        else:
            kind = embedding_class(getattr(encoder, "config", None), type(encoder))
        encoder.__class__ = kind
        made: Any = encoder
        setattr(made.config, FIELD, {"pooling": pooling, "normalize": normalize, "max_length": max_length})
        return without_pooler(made)

    @property
    def embedding_width(self) -> int:
        """Size of an embedding."""
        width: int = self.config.get_text_config().hidden_size
        return width

    def forward(self, *args: Any, **kwargs: Any) -> EmbeddingOutput:
        """The encoder's forward, and the vector of each text; see :class:`EmbeddingModel`."""
        inputs = dict(zip(inspect.signature(super().forward).parameters, args, strict=False)) | kwargs
        inputs.pop("return_dict", None)
        first = inputs.get("input_ids")
        shape = (inputs["inputs_embeds"][..., 0] if first is None else first).shape[:-1]
        if len(shape) == 2:
            inputs = {
                name: value.flatten(0, 1) if isinstance(value, Tensor) and value.shape[:2] == shape else value
                for name, value in inputs.items()
            }
        mask = inputs.get("attention_mask")
        if mask is not None:
            # Attention over nothing is NaN; what is no text reads its first token, and is 0 in the end.
            nothing = ~mask.bool().any(1, keepdim=True)
            inputs["attention_mask"] = torch.cat([mask[:, :1].masked_fill(nothing, 1), mask[:, 1:]], 1)
        output = super().forward(**inputs)
        settings: dict[str, Any] = getattr(self.config, FIELD)
        vectors = pool(output.last_hidden_state, mask, settings["pooling"])
        vectors = F.normalize(vectors, dim=-1) if settings["normalize"] else vectors
        return EmbeddingOutput(
            logits=vectors.view(*shape, -1),
            last_hidden_state=output.last_hidden_state,
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers does, and beside it what sentence-transformers reads."""
        done = super().save_pretrained(save_directory, *args, **kwargs)
        write_modules(self, Path(save_directory))
        return done

    def __reduce__(self) -> Any:
        # The class is made at run time, so that a copy has to be told of what.
        return _blank, (self.config, type(self).__mro__[2]), self.__dict__


def _blank(config: Any, encoder: type) -> EmbeddingModel:
    kind = embedding_class(config, encoder)
    made: EmbeddingModel = kind.__new__(kind)
    return made


def without_pooler(model: Any) -> Any:
    """Keep the layer that BERT has for its second training task, which nothing reads here, out of training."""
    if isinstance(pooler := getattr(model, "pooler", None), nn.Module):
        pooler.requires_grad_(False)
    return model


def embedding_class(config: Any, encoder: type | None = None) -> Any:
    """The class of embedding models whose encoder is of a class of transformers.

    Args:
        config: The config of the encoder.
        encoder: Its class; None: the one that ``AutoModel`` takes.

    Raises:
        ValueError: If the class has a head or a decoder, or there is none.
    """
    if encoder is None:
        alone = _ENCODERS.get(getattr(config, "model_type", ""))
        known: Any = transformers.MODEL_MAPPING.get(type(config), None)
        encoder = getattr(transformers, alone) if alone else known
    name = getattr(encoder, "__name__", encoder)
    with_decoder = getattr(config, "is_encoder_decoder", False) and "Encoder" not in str(name)
    is_encoder = isinstance(encoder, type) and issubclass(encoder, transformers.PreTrainedModel)
    if not is_encoder or "For" in str(name) or with_decoder:
        raise ValueError(
            f"Expected a transformers model without head and decoder to make embeddings with, but got {name}. Load it "
            "by `AutoModel.from_pretrained`; of T5 load `T5EncoderModel`."
        )
    return _class_of(encoder)


@functools.cache
def _class_of(encoder: Any) -> Any:
    # Its name and module are the encoder's, which transformers writes into files and reads source code by.
    return type(encoder.__name__, (EmbeddingModel, encoder), {"__module__": encoder.__module__})


def settings_of(path: str) -> dict[str, Any] | None:
    """How a folder or hub id of sentence-transformers pools; None where it is none.

    Args:
        path: The folder or hub id.

    Returns:
        ``pooling``, ``normalize`` and ``max_length``, as :meth:`EmbeddingModel.of` takes them.

    Raises:
        ValueError: If it has modules that are not known here.
    """
    modules = _read(path, _MODULES)
    if not isinstance(modules, list):
        return None
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            f"Expected {path} to be a sentence-transformers model of Transformer, Pooling and Normalize, but its "
            f"{_MODULES} lists {kinds}. Load its encoder by `AutoModel` and pass `EmbeddingModel.of(encoder)`."
        )
    config = _read(path, f"{modules[1].get('path', '1_Pooling')}/config.json") or {}
    modes = config.get("pooling_mode") or [name for name, on in config.items() if name.startswith("pooling_") and on]
    modes = [_MODES.get(mode, mode) for mode in ([modes] if isinstance(modes, str) else modes)]
    if len(modes) != 1 or modes[0] not in get_args(Pooling):
        raise ValueError(
            f"Expected the pooling of {path} to be one of {get_args(Pooling)}, but got {modes}. Load its encoder by "
            "`AutoModel` and pass `EmbeddingModel.of(encoder)`."
        )
    length = (_read(path, "sentence_bert_config.json") or {}).get("max_seq_length")
    return {"pooling": modes[0], "normalize": "Normalize" in kinds, "max_length": length}


def _read(path: str, name: str) -> Any:
    try:
        file = transformers.utils.cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        return None if file is None else json.loads(Path(file).read_bytes())
    except (OSError, ValueError):
        return None


def write_modules(model: nn.Module, folder: Path) -> None:
    """Write what sentence-transformers reads beside the weights of an embedding model.

    Args:
        model: The model.
        folder: Where its weights and its config are.
    """
    assert isinstance(model, EmbeddingModel)
    settings: dict[str, Any] = getattr(model.config, FIELD)
    paths = {"Transformer": "", "Pooling": "1_Pooling"} | (
        {"Normalize": "2_Normalize"} if settings["normalize"] else {}
    )
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(paths.items())
    ]
    pooling = {"word_embedding_dimension": model.embedding_width}
    pooling |= {name: mode == settings["pooling"] for name, mode in _MODES.items()}
    written = {
        _MODULES: modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": settings["max_length"], "do_lower_case": False},
    }
    if settings["normalize"]:
        written["2_Normalize/config.json"] = {}
    for name, content in written.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
