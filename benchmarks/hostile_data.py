"""Bad data files of hostile.py: a name, a file's name and its bytes."""

import gzip
import io
import json
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

ROWS = [("a warm film", 1), ("a dull film", 0), ("a bright and funny film", 1), ("an empty , cold film", 0)] * 4


def tsv(rows: Any = ROWS, header: str = "sentence\tlabel", end: str = "\n") -> str:
    """A tsv file."""
    return end.join([header, *("\t".join(map(str, row)) for row in rows)]) + end


def jsonl(rows: list[Any]) -> str:
    """Each row as JSON."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(**columns: Any) -> bytes:
    """A parquet file."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def records(*values: Any, column: str = "label") -> list[dict[str, Any]]:
    """Rows whose last ones hold other values in a column."""
    rows: list[dict[str, Any]] = [{"sentence": text, "label": label} for text, label in ROWS]
    for value in values:
        rows.append({"sentence": "one more film", "label": 1, column: value})
    return rows


def inputs() -> Iterator[tuple[str, str, bytes]]:
    """All of them; some are right."""
    for name, file, content in _inputs():
        yield name, file, content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content


def _inputs() -> Iterator[tuple[str, str, Any]]:
    good = tsv()
    texts, labels = [text for text, _ in ROWS], [label for _, label in ROWS]
    # -- what surrounds the rows
    yield "empty file", "train.tsv", ""
    yield "header alone", "train.tsv", "sentence\tlabel\n"
    yield "blank lines alone", "train.tsv", "\n\n\n"
    yield "no header", "train.tsv", tsv(header="a film\t1")
    yield "one row", "train.tsv", tsv(ROWS[:1])
    yield "two rows", "train.tsv", tsv(ROWS[:2])
    yield "byte order mark", "train.tsv", b"\xef\xbb\xbf" + good.encode()
    yield "utf-16", "train.tsv", good.encode("utf-16")
    yield "utf-16 without mark", "train.tsv", good.encode("utf-16-le")
    yield "utf-32", "train.tsv", good.encode("utf-32")
    yield "latin-1", "train.tsv", tsv([*ROWS, ("café", 1)]).encode("latin-1")
    yield "broken utf-8", "train.tsv", good.encode() + b"a \xff\xfe film\t1\n"
    yield "NUL bytes", "train.tsv", good + "a \x00 film\t1\n"
    yield "NUL bytes alone", "train.tsv", b"\x00" * 4096
    yield "line ends of Windows", "train.tsv", tsv(end="\r\n")
    yield "line ends of old Macs", "train.tsv", tsv(end="\r")
    yield "mixed line ends", "train.tsv", good + "a film\t1\r\nanother\t0\r"
    yield "no last line end", "train.tsv", good.rstrip("\n")
    yield "blank lines", "train.tsv", good.replace("\n", "\n\n")
    yield "a picture", "train.tsv", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8
    yield "a zip", "train.tsv", b"PK\x03\x04" + bytes(range(256)) * 8
    yield "gzipped under tsv", "train.tsv", gzip.compress(good.encode())
    yield "gzipped", "train.tsv.gz", gzip.compress(good.encode())
    yield "gzip cut", "train.tsv.gz", gzip.compress(good.encode())[:-12]
    yield "gzip that is none", "train.tsv.gz", good
    yield "gzip of nothing", "train.tsv.gz", gzip.compress(b"")
    yield "gzip flipped", "train.csv.gz", gzip.compress(good.encode())[:20] + b"\xff" * 30
    yield "no suffix", "train", good
    yield "unknown suffix", "train.xlsx", good
    yield "pickle", "train.pkl", b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94."
    yield "upper-case suffix", "train.TSV", good
    yield "txt", "train.txt", good
    # -- columns
    yield "other columns", "train.tsv", tsv(header="text\tclass")
    yield "column names in capitals", "train.tsv", tsv(header="Sentence\tLabel")
    yield "spaces about column names", "train.tsv", tsv(header=" sentence \t label ")
    yield "duplicate columns", "train.tsv", tsv([(*row, 0) for row in ROWS], "sentence\tlabel\tlabel")
    yield "duplicate text column", "train.tsv", tsv([("x", *row) for row in ROWS], "sentence\tsentence\tlabel")
    yield "empty column name", "train.tsv", tsv([("x", *row) for row in ROWS], "\tsentence\tlabel")
    yield "a column more", "train.tsv", tsv([(*row, "x") for row in ROWS], "sentence\tlabel\tmore")
    yield "a field more in a row", "train.tsv", good + "a film\t1\tx\n"
    yield "a field less in a row", "train.tsv", good + "a film\n"
    yield "a field more in every row", "train.tsv", tsv([(*row, "x") for row in ROWS])
    yield "spaces in place of tabs", "train.tsv", good.replace("\t", "    ")
    yield "commas in a tsv", "train.tsv", good.replace("\t", ",")
    yield "a row of tabs", "train.tsv", good + "\t\n"
    # -- text
    yield "empty text", "train.tsv", good + "\t1\n"
    yield "blank text", "train.tsv", good + "   \t1\n"
    yield "very long text", "train.tsv", good + "film " * 200_000 + "\t1\n"
    yield "one very long word", "train.tsv", good + "x" * 200_000 + "\t1\n"
    yield "lone surrogate as bytes", "train.tsv", good + "a \ud83d film\t1\n"
    yield "lone surrogate in JSON", "train.jsonl", jsonl(records("a \ud83d film", column="sentence"))
    yield "lone surrogate in a label", "train.jsonl", jsonl(records("\ud83d"))
    yield "emoji", "train.tsv", good + "a \U0001f600 film\t1\n"
    yield "right to left", "train.tsv", good + "\u202e film\t1\n"
    yield "line separators", "train.tsv", good + "a\u2028film\x0cx\t1\n"
    yield "special tokens in text", "train.tsv", good + "[MASK] [PAD] [SEP] [CLS] film\t1\n"
    yield "quotes in a tsv", "train.tsv", good + '"a "film\t1\n'
    yield "control characters", "train.tsv", good + "".join(map(chr, [*range(1, 9), *range(14, 32)])) + "\t1\n"
    yield "unknown words alone", "train.tsv", tsv([("\u4e2d\u6587", i % 2) for i in range(16)])
    # -- labels
    for name, label in {
        "empty": "",
        "blank": "  ",
        "nan": "nan",
        "NA": "NA",
        "None": "None",
        "negative": "-1",
        "minus hundred": "-100",
        "a fraction": "0.5",
        "whole float": "1.0",
        "huge": "9" * 40,
        "an exponent": "1e400",
        "hex": "0x1",
        "a word among numbers": "positive",
        "with a comma": "1,0",
        "a list": "[1, 0]",
        "with a plus": "+1",
        "full-width digit": "\uff11",
        "with a space": " 1",
        "true": "True",
        "third class": "2",
        "gap": "7",
    }.items():
        yield f"label {name}", "train.tsv", good + f"one more film\t{label}\n"
    yield "labels all empty", "train.tsv", tsv([(text, "") for text in texts])
    yield "labels all the same", "train.tsv", tsv([(text, 1) for text in texts])
    yield "labels all different", "train.tsv", tsv([(text, f"c{i}") for i, text in enumerate(texts)])
    yield "labels all fractions", "train.tsv", tsv([(text, i / 7) for i, text in enumerate(texts)])
    yield "labels all whole floats", "train.tsv", tsv([(text, f"{label}.0") for text, label in ROWS])
    yield "labels all nan", "train.tsv", tsv([(text, "nan") for text in texts])
    yield "labels true and false", "train.tsv", tsv([(text, bool(label)) for text, label in ROWS])
    yield "labels as names", "train.tsv", tsv([(text, ("negative", "positive")[label]) for text, label in ROWS])
    yield "labels as other names", "train.tsv", tsv([(text, ("bad", "good")[label]) for text, label in ROWS])
    yield "labels as names in capitals", "train.tsv", tsv([(text, ("NEGATIVE", "POSITIVE")[i]) for text, i in ROWS])
    yield "labels LABEL_i", "train.tsv", tsv([(text, f"LABEL_{label}") for text, label in ROWS])
    yield "labels from one", "train.tsv", tsv([(text, label + 1) for text, label in ROWS])
    yield "labels of three classes", "train.tsv", tsv([(text, i % 3) for i, text in enumerate(texts)])
    yield "rare class", "train.tsv", tsv([*ROWS, ("a film", 2)])
    yield "labels and text swapped", "train.tsv", tsv([(label, text) for text, label in ROWS])
    # -- csv
    csv = good.replace(" , ", " ").replace("\t", ",")
    yield "csv", "train.csv", csv
    yield "csv, upper case", "train.CSV", csv
    yield "csv, a quote not closed", "train.csv", csv + '"a film,1\n'
    yield "csv, text after a quote", "train.csv", csv + '"a film" x,1\n'
    yield "csv, a large field", "train.csv", csv + f'"{"film " * 60_000}",1\n'
    yield "csv, lines in a field", "train.csv", csv + '"a\nfilm\n\nx",1\n'
    yield "csv, semicolons", "train.csv", csv.replace(",", ";")
    yield "csv, tabs", "train.csv", good
    yield "csv, NUL", "train.csv", csv + "a \x00 film,1\n"
    yield "csv, ragged", "train.csv", csv + "a film,1,2,3\n"
    yield "csv, duplicate columns", "train.csv", csv.replace("sentence,label", "label,label")
    yield "csv, quote alone", "train.csv", '"'
    yield "csv, latin-1", "train.csv", (csv + "caf\xe9,1\n").encode("latin-1")
    # -- JSON
    yield "jsonl", "train.jsonl", jsonl(records())
    yield "ndjson", "train.ndjson", jsonl(records())
    yield "json, rows", "train.json", json.dumps(records())
    yield "json, columns", "train.json", json.dumps({"sentence": texts, "label": labels})
    yield "json, columns of unequal length", "train.json", json.dumps({"sentence": texts, "label": labels[:3]})
    yield "json, lines", "train.json", jsonl(records())
    yield "json, a number", "train.json", "3"
    yield "json, empty list", "train.json", "[]"
    yield "json, empty object", "train.json", "{}"
    yield "json, list of lists", "train.json", json.dumps(ROWS)
    yield "json, too deep", "train.json", "[" * 100_000
    yield "json, cut", "train.json", json.dumps(records())[:-20]
    yield "jsonl, too deep", "train.jsonl", jsonl(records()) + "[" * 100_000 + "\n"
    yield "jsonl, deep value", "train.jsonl", jsonl(records())[:-2] + ', "x": ' + "[" * 90_000 + "]" * 90_000 + "}\n"
    yield "jsonl, no object", "train.jsonl", jsonl([*records(), 3])
    yield "jsonl, null", "train.jsonl", jsonl([*records(), None])
    yield "jsonl, empty object", "train.jsonl", jsonl([*records(), {}])
    yield "jsonl, cut", "train.jsonl", jsonl(records())[:-5]
    yield "jsonl, two in a line", "train.jsonl", jsonl(records()) + '{"sentence": "a", "label": 1}{}\n'
    yield "jsonl, key twice", "train.jsonl", jsonl(records()) + '{"sentence": "a", "label": 1, "label": 0}\n'
    yield "jsonl, single quotes", "train.jsonl", jsonl(records()).replace('"', "'")
    yield "jsonl, NaN", "train.jsonl", jsonl(records(float("nan")))
    yield "jsonl, Infinity", "train.jsonl", jsonl(records(float("inf")))
    yield "jsonl, huge number", "train.jsonl", jsonl(records()) + '{"sentence": "a", "label": 1' + "0" * 5000 + "}\n"
    for value in (None, [], [1, 0], {}, {"a": 1}, True, 1.0, 0.5, "1", "", -1, 10**30, [[]]):
        yield f"jsonl, label {value!r}"[:40], "train.jsonl", jsonl(records(value))
    for value in (None, 3, ["a", "b"], {"text": "a"}, True, "", 1.5):
        yield f"jsonl, text {value!r}", "train.jsonl", jsonl(records(value, column="sentence"))
    yield "jsonl, columns missing later", "train.jsonl", jsonl([*records(), {"sentence": "a"}])
    yield "jsonl, other keys in each", "train.jsonl", jsonl([*records(), {"text": "a", "class": 1}])
    # -- parquet
    yield "parquet", "train.parquet", parquet(sentence=texts, label=labels)
    yield "parquet, upper case", "train.PARQUET", parquet(sentence=texts, label=labels)
    yield "parquet, cut", "train.parquet", parquet(sentence=texts, label=labels)[:-30]
    yield "parquet, middle gone", "train.parquet", _flipped(parquet(sentence=texts, label=labels))
    yield "parquet that is none", "train.parquet", good
    yield "parquet, empty file", "train.parquet", b""
    yield "parquet, magic alone", "train.parquet", b"PAR1PAR1"
    yield (
        "parquet, no rows",
        "train.parquet",
        parquet(sentence=pyarrow.array([], "string"), label=pyarrow.array([], "int64")),
    )
    yield "parquet, other columns", "train.parquet", parquet(text=texts, label=labels)
    for kind, values in {
        "nulls": [None, *labels[1:]],
        "floats": [float(label) for label in labels],
        "bools": [label == 1 for label in labels],
        "nan": [float("nan"), *map(float, labels[1:])],
        "strings": list(map(str, labels)),
        "lists": [[label] for label in labels],
        "structs": [{"a": label} for label in labels],
        "binary": [str(label).encode() for label in labels],
        "int8": pyarrow.array(labels, "int8"),
        "uint64": pyarrow.array(labels, "uint64"),
        "halves": [0.5] * 16,
        "dates": pyarrow.array(labels, "date32"),
        "times": pyarrow.array(labels, pyarrow.timestamp("s")),
        "decimals": pyarrow.array(labels).cast(pyarrow.decimal128(21, 2)),
        "categories": pyarrow.array(list(map(str, labels))).dictionary_encode(),
        "all null": pyarrow.nulls(16),
    }.items():
        yield f"parquet, labels of {kind}", "train.parquet", parquet(sentence=texts, label=values)
    for kind, values in {
        "binary": [text.encode() for text in texts],
        "bad binary": [b"\xff\xfe"] * 16,
        "lists": [[text] for text in texts],
        "numbers": labels,
        "nulls": [None, *texts[1:]],
        "all null": pyarrow.nulls(16),
        "categories": pyarrow.array(texts).dictionary_encode(),
        "large strings": pyarrow.array(texts, "large_string"),
    }.items():
        yield f"parquet, text of {kind}", "train.parquet", parquet(sentence=values, label=labels)


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 3
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 40]) + content[middle + 40 :]
