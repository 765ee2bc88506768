"""What a model can read: ids that its embeddings have, and rows that its positions reach."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_distill.functional.tensors import local
from lightning_distill.models.calling import accepted, labels_read
from lightning_distill.signals.description import find_decoder

# What transformers calls a table of positions.
_TABLES = ("position_embeddings", "position_embedding", "positions_embed", "embed_positions", "wpe")
# Parts of a model that read no tokens, and have positions of their own.
_NO_TEXT = ("vision", "visual", "image", "audio", "speech")
# What to do about ids that are too large.
_WORDS = (
    "Read the data with the tokenizer of both models, or give the model as many words as the tokenizer has: "
    "`model.resize_token_embeddings(len(tokenizer))`."
)
_TYPES = "Leave `token_type_ids` out of the batch, or give the model as many types: `config.type_vocab_size`."
_ROWS = "Correct the ids, or give the embedding more rows."


class InputCheck:
    """Refuses what a model cannot read before the model reads it.

    An id beyond an embedding is an ``IndexError`` from deep inside on a CPU, and on a GPU the end of the process. On a
    CPU every batch is looked at; elsewhere, where a look makes the device wait, the first one and the first after
    :meth:`look_again`.

    Args:
        model: The model; until :meth:`remove` there are hooks on its embeddings.
        name: What it is called in errors.
        rotary_limit: Whether rows beyond the length that rotary positions were trained on are refused; a warning, once,
            if not.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_distill.models.inputs import InputCheck
        >>> model = nn.Sequential(nn.Embedding(60, 4))
        >>> check = InputCheck(model, "student")
        >>> check.before(torch.tensor([70]))
        >>> model(torch.tensor([70]))
        Traceback (most recent call last):
        ValueError: Expected the ids that the embedding `0` of the student looks up to be in [0, 59], but got 70. ...
        >>> check.remove()
    """

    def __init__(self, model: nn.Module, name: str, *, rotary_limit: bool = False) -> None:
        self.model, self.name, self.rotary_limit = model, name, rotary_limit
        self._fresh = self._looking = True
        self._warned = False
        # Both models read the same batch, and it is said once.
        self._warned_of_packing = name != "student"
        self._table, self._decoder_table = _tables_of_positions(model)
        self._handles: list[RemovableHandle] = []
        for path, module in model.named_modules():
            # A class with a forward of its own is called with something else, such as a length.
            if isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
                hook = partial(self._before_lookup, path)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def look_again(self) -> None:
        """Look at the next batch wherever it is: it is of other data."""
        self._fresh = True

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def before(self, batch: Any) -> None:
        """Look at a batch that the model is about to read.

        Args:
            batch: As the model reads it.

        Raises:
            ValueError: If it has ids beyond an embedding, or rows beyond the positions.
        """
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        given = ids if isinstance(ids, Tensor) else next(self.model.parameters(), torch.empty(0))
        self._looking = self._fresh or given.device.type == "cpu"
        if not (isinstance(ids, Tensor) and self._looking and hasattr(self.model, "config")):
            return
        _check_ids(f"the token ids for the {self.name}", _words(self.model), ids, _WORDS)
        if "token_type_ids" in batch and "token_type_ids" in accepted(self.model):
            what = f"the token types (`token_type_ids`) for the {self.name}"
            _check_ids(what, _token_types(self.model), batch["token_type_ids"], _TYPES)
        self._check_length(batch, ids)
        self._check_decoder(batch)
        if not self._warned_of_packing and attend_across_documents(batch):
            self._warned_of_packing = True
            warnings.warn(
                "Documents are packed into rows (`position_ids` begin again within them) beside an `attention_mask` of "
                "shape [B, T], so they attend to each other. Leave `attention_mask` out: transformers keeps documents "
                "apart by their positions where there is none.",
                stacklevel=2,
            )

    def after(self) -> None:
        """Say that the model has read it."""
        self._fresh = self._looking = False

    def _before_lookup(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Compiled, a look would be a break of the graph; what is known by name has been looked at before.
        if not torch.compiler.is_compiling() and self._looking:
            what = f"the ids that the embedding `{path}` of the {self.name} looks up"
            _check_ids(what, module, args[0] if args else kwargs.get("input"), _ROWS)

    def _check_decoder(self, batch: Mapping[str, Any]) -> None:
        read = labels_read(self.model, batch)
        if (path := find_decoder(self.model)) is not None and isinstance(batch.get("decoder_input_ids"), Tensor):
            read, words = batch["decoder_input_ids"], _words(self.model.get_submodule(path))
            _check_ids(f"the ids for the decoder of the {self.name}", words, read, _WORDS)
        if read is None or self._decoder_table is None:
            return
        rows, begin, _ = self._decoder_table
        if read.shape[-1] > rows - begin:
            advice = "Cut the targets, for example by `max_target_length`."
            raise _too_long(rows - begin, read.shape[-1], f"decoder of the {self.name}", advice)

    def _check_length(self, batch: Mapping[str, Any], ids: Tensor) -> None:
        config: Any = self.model.config
        text = config.get_text_config(encoder=True) if hasattr(config, "get_text_config") else config
        trained = getattr(text, "max_position_embeddings", None)
        positions = batch.get("position_ids") if "position_ids" in accepted(self.model) else None
        longest, limit = ids.shape[-1], trained
        if self._table is not None:
            rows, begin, padding = self._table
            if isinstance(positions, Tensor) and positions.numel():
                longest, limit = int(positions.max()) + 1, rows
            else:
                # RoBERTa counts the tokens that are no padding, from the one after padding's number on.
                longest = longest if padding is None else int((ids != padding).sum(-1).max()) if ids.numel() else 0
                limit = rows - begin if padding is not None or not trained else min(trained, rows - begin)
        elif not trained or trained < 0 or not _is_rotary(self.model, text):
            return
        elif isinstance(positions, Tensor) and positions.numel():
            longest = int(positions.max()) + 1
        if limit is None or longest <= limit:
            return
        if self._table is not None or self.rotary_limit:
            raise _too_long(limit, longest, self.name, "Cut the texts, for example by `max_length`.")
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"The {self.name} reads {longest} tokens in a row and was trained on at most {limit} "
                "(`config.max_position_embeddings`): beyond them its answers may be worth little. Cut the texts, for "
                "example by `max_length`.",
                stacklevel=2,
            )


def _too_long(limit: int, longest: int, what: str, advice: str) -> ValueError:
    return ValueError(
        f"Expected a batch to fit into the {limit} positions of the models, but got {longest} tokens in a row for the "
        f"{what}. {advice}"
    )


def attend_across_documents(batch: Mapping[str, Any]) -> bool:
    """Whether rows hold several documents whose borders an attention mask hides.

    Args:
        batch: A mapping with ``position_ids`` and ``attention_mask``, where it has them.

    Example:
        >>> import torch
        >>> from lightning_distill.models.inputs import attend_across_documents
        >>> packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
        >>> attend_across_documents(packed), attend_across_documents({**packed, "attention_mask": torch.ones(1, 5)})
        (False, True)
    """
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if not (isinstance(positions, Tensor) and isinstance(mask, Tensor) and positions.ndim == mask.ndim == 2):
        return False
    real = mask.bool()
    # Padding on the left may have any positions: a document begins behind another one.
    return bool(((positions[:, 1:] < positions[:, :-1]) & real[:, 1:] & real[:, :-1]).any())


def _check_ids(what: str, module: Any, ids: Any, advice: str) -> None:
    size = getattr(module, "num_embeddings", None)
    ids = local(ids)
    if size is None or not isinstance(ids, Tensor) or ids.is_meta or not ids.numel():
        return
    least, most = (int(value) for value in ids.aminmax())
    if least < 0 or most >= size:
        raise ValueError(f"Expected {what} to be in [0, {size - 1}], but got {least if least < 0 else most}. {advice}")


def _words(model: Any) -> Any:
    try:
        return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:  # CLIP; its embedding is looked at when it is called
        return None


def _token_types(model: nn.Module) -> Any:
    return next((m for path, m in model.named_modules() if path.endswith("token_type_embeddings")), None)


Positions = tuple[int, int, int | None]


def _tables_of_positions(model: nn.Module) -> tuple[Positions | None, Positions | None]:
    """Of what reads the input, and of a decoder beside it: the table of positions.

    Its rows, the first that is used, and the padding token where the tokens are counted.
    """
    of_decoder = set() if (decoder := find_decoder(model)) is None else set(model.get_submodule(decoder).modules())
    found: dict[bool, Positions] = {}
    for path, module in model.named_modules():
        is_table = path.rpartition(".")[2] in _TABLES and isinstance(module, nn.Embedding)
        if is_table and not any(part in path for part in _NO_TEXT):
            begin = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            found.setdefault(module in of_decoder, (module.num_embeddings, begin, module.padding_idx))
    # GPT-J has sines and cosines in a buffer.
    buffers = (buffer for path, buffer in model.named_buffers() if path.rpartition(".")[2] in _TABLES)
    table = next(buffers, None)
    if False not in found and table is not None and table.ndim == 2:
        found[False] = len(table), 0, None
    return found.get(False), found.get(True)


def _is_rotary(model: nn.Module, config: Any) -> bool:
    return bool(getattr(config, "rope_parameters", None)) or any("rotary" in path for path, _ in model.named_modules())
