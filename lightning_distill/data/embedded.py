"""Real text that every installation has: docstrings of Python and of the packages this one depends on.

A corpus for a first run, for tests and for examples: no network, no file of its own. The task is to tell from a
paragraph which package it documents.
"""

import importlib.util
import os
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lightning_distill.arguments import integer, typed

#: Of the core dependencies, those with text enough; torch depends on networkx and sympy, lightning on numpy.
PACKAGES = ("matplotlib", "networkx", "numpy", "python", "sympy", "torch", "transformers")
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "_vendor", "vendor"}

#: Triple-quoted strings; one that starts a line is a docstring. Compared with the ast module on 840 files of these
#: packages this found 99 % of the docstrings, 4 % of what it found were other strings, in a sixth of the time.
DOCSTRING = re.compile(
    r"""(?P<line_start>^[ \t]*)?[rR]?(?P<quotes>\"{3}|'{3})(?P<text>.*?)(?P=quotes)""", re.MULTILINE | re.DOTALL
)
_BLANK_LINE = re.compile(r"\n[ \t]*\n")


@typed
def embedded_corpus(max_rows_per_class: int = 1300, *, seed: int = 0) -> list[tuple[str, str]]:
    """Collect first paragraphs of docstrings, labelled by the package they come from.

    The sources are read, never imported or run. Paragraphs of 40 to 400 characters are kept, once each, with the
    names of all the packages replaced by ``it``: a paragraph that names its own package would give the answer away.
    What is left is told apart by subject, vocabulary and style. The rows depend on the versions installed and on the
    seed.

    Args:
        max_rows_per_class: at most this many paragraphs of each package.
        seed: seed of the files chosen and of the order.

    Returns:
        Rows (text, label), shuffled; the label is one of matplotlib, networkx, numpy, python (the standard library),
        sympy, torch and transformers.

    Raises:
        ValueError: ``max_rows_per_class`` is not positive.

    Example:
        >>> rows = embedded_corpus(20)
        >>> len(rows), len({label for _, label in rows})
        (140, 7)
    """
    if max_rows_per_class < 1:
        raise ValueError(f"Expected argument `max_rows_per_class` to be positive, but got {max_rows_per_class}")
    names = re.compile(rf"(?<![A-Za-z])(?:{'|'.join(PACKAGES)}|pytorch|hugging ?face)(?![A-Za-z])", re.IGNORECASE)
    rows: dict[str, str] = {}
    for package in PACKAGES:
        generator = random.Random(f"{seed} {package}")
        found = 0
        for paragraph in _paragraphs(root_of(package), generator):
            text = names.sub("it", paragraph)
            if found == max_rows_per_class:
                break
            if text not in rows:
                rows[text] = package
                found += 1
    shuffled = list(rows.items())
    random.Random(seed).shuffle(shuffled)
    return shuffled


def root_of(package: str) -> Path:
    """The folder of a package's sources, which is not imported."""
    if package == "python":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the embedded corpus reads the sources of {package!r}, which is not installed")
    return Path(spec.origin).parent


def source_files(root: Path, generator: random.Random) -> list[Path]:
    """The Python files of a folder but for tests, in an order that is drawn."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED)
        files += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    generator.shuffle(files)
    return files


def _paragraphs(root: Path, generator: random.Random) -> Iterator[str]:
    for file in source_files(root, generator):
        for match in DOCSTRING.finditer(file.read_text(encoding="utf-8", errors="replace")):
            paragraph = " ".join(_BLANK_LINE.split(match["text"].strip(), maxsplit=1)[0].split())
            if match["line_start"] is not None and 40 <= len(paragraph) <= 400 and paragraph[0].isalpha():
                yield paragraph


@typed
def train_tokenizer(texts: Iterable[str], vocab_size: int = 4000) -> PreTrainedTokenizerFast:
    """Train an uncased WordPiece tokenizer that frames texts as BERT does.

    Args:
        texts: the texts to train on.
        vocab_size: number of tokens, the five special ones among them.

    Returns:
        A tokenizer with the special tokens ``[PAD]`` (id 0), ``[UNK]``, ``[CLS]``, ``[SEP]`` and ``[MASK]``.

    Example:
        >>> tokenizer = train_tokenizer(["a tensor of shape", "a tensor of zeros"], vocab_size=60)
        >>> tokenizer.decode(tokenizer("A tensor")["input_ids"])
        '[CLS] a tensor [SEP]'
    """
    integer("vocab_size", vocab_size, 5)
    tokenizer = _wordpiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # The trainer numbers what goes on a word in the order of a hash that is another one in each process, and decides by
    # these numbers between pairs that are equally frequent. Named beforehand, they have numbers that do not change: a
    # run that is resumed in another process must read its text as before.
    texts = list(texts)
    letters = sorted({letter for text in texts for letter in tokenizer.normalizer.normalize_str(text)} - {" "})
    fixed = [*special, *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # They are no special tokens of what is made: that has the vocabulary alone.
    tokenizer = _wordpiece(tokenizer.get_vocab())
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=512,
    )


def _wordpiece(vocab: dict[str, int] | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def train_causal_tokenizer(texts: Iterable[str], vocab_size: int = 2000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that frames texts with a first and a last token, for a language model.

    Args:
        texts: the texts to train on.
        vocab_size: number of tokens, the 256 bytes and three special ones among them.

    Returns:
        A tokenizer with the special tokens ``<pad>`` (id 0), ``<s>`` and ``</s>``; every text comes back from it as it
        was.

    Example:
        >>> tokenizer = train_causal_tokenizer(["a tensor of shape", "a tensor of zeros"], vocab_size=270)
        >>> tokenizer.decode(tokenizer("A tensor!")["input_ids"])
        '<s>A tensor!</s>'
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
