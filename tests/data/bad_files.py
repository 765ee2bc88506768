"""Files that somebody will give: each is read rightly or refused in one line that names it."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class BadFile(NamedTuple):
    """A file and what is right for it.

    Attributes:
        name: its name.
        content: its bytes, or what writes them to a path; None: there is no such file.
        said: what the error says beside the file's name; None: the file is read.
        arguments: of the data module.
    """

    name: str
    content: bytes | Callable[[Path], None] | None
    said: str | None
    arguments: dict[str, Any] = {}  # noqa: RUF012 (read alone)


GOOD = [("a good film", "pos"), ("a bad film", "neg"), ("fine", "pos"), ("awful", "neg")]
TSV = "sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in GOOD)
CSV = TSV.replace("\t", ",")
JSONL = "".join(json.dumps({"sentence": text, "label": label}) + "\n" for text, label in GOOD)


def jsonl(*rows: dict[str, Any]) -> bytes:
    return (JSONL + "".join(json.dumps(row) + "\n" for row in rows)).encode()


def labels(kind: str, values: list[Any]) -> bytes:
    """A file of the labels, each with a text."""
    if kind == "jsonl":
        return "".join(json.dumps({"sentence": f"t {i}", "label": v}) + "\n" for i, v in enumerate(values)).encode()
    separator = {"tsv": "\t", "csv": ","}[kind]
    return (f"sentence{separator}label\n" + "".join(f"t {i}{separator}{v}\n" for i, v in enumerate(values))).encode()


def folder(path: Path) -> None:
    path.mkdir()


def text_files() -> list[BadFile]:
    """Files that are no text, or whose lines are wrong, of each kind."""
    found: list[BadFile] = []
    whole = {
        "tsv": TSV,
        "csv": CSV,
        "jsonl": JSONL,
        "json": json.dumps([json.loads(row) for row in JSONL.split("\n") if row]),
    }
    for kind, text in whole.items():
        head, _, rest = text.partition("\n")
        line = ":1:" if kind == "json" else ":2:"
        spoilt = (head + "\n" + rest).encode()
        found += [
            BadFile(f"none.{kind}", None, "there is no such file"),
            BadFile(f"folder.{kind}", folder, "this is a folder"),
            BadFile(f"empty.{kind}", b"", "the file "),
            BadFile(f"blank.{kind}", b"\n \n\n" if kind.startswith("json") else b"\n\n\n", "the file "),
            BadFile(f"good.{kind}", text.encode(), None),
            BadFile(f"bom.{kind}", b"\xef\xbb\xbf" + text.encode(), None),
            BadFile(f"UPPER.{kind.upper()}", text.encode(), None),
            BadFile(f"packed.{kind}.gz", gzip.compress(text.encode()), None),
            BadFile(f"packed_upper.{kind.upper()}.GZ", gzip.compress(text.encode()), None),
            BadFile(f"crlf.{kind}", text.replace("\n", "\r\n").encode(), None),
            BadFile(f"mixed_ends.{kind}", text.replace("\n", "\r\n", 2).encode(), None),
            BadFile(f"no_last_end.{kind}", text.rstrip("\n").encode(), None),
            BadFile(f"blank_lines.{kind}", text.replace("\n", "\n\n").encode(), None),
            BadFile(f"form_feed.{kind}", text.replace("fine", "fi\u2028ne \x85").encode(), None),
            BadFile(
                f"utf16.{kind}", text.encode("utf-16"), ":1: not UTF-8 text (invalid start byte); it looks like UTF-16"
            ),
            BadFile(f"utf16le.{kind}", text.encode("utf-16-le"), ":1: a NUL character"),
            BadFile(f"utf32.{kind}", text.encode("utf-32"), ":1: not UTF-8 text"),
            BadFile(f"latin1.{kind}", spoilt.replace(b"fine", b"caf\xe9"), "not UTF-8 text (in"),
            BadFile(f"half_utf8.{kind}", spoilt.replace(b"fine", "é".encode()[:1]), "not UTF-8 text (in"),
            BadFile(f"surrogate_bytes.{kind}", spoilt.replace(b"fine", b"\xed\xa0\xbd"), "not UTF-8 text (in"),
            BadFile(
                f"nul.{kind}", spoilt.replace(b"bad", b"b\0d"), f"{':1:' if kind == 'json' else ''} a NUL character"
            ),
            BadFile(f"png.{kind}", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), ":1: not UTF-8 text"),
            BadFile(f"gz_without_ending.{kind}", gzip.compress(text.encode()), "it looks like a gz file"),
            BadFile(f"not_gz.{kind}.gz", text.encode(), ":1: not a whole gz file"),
            BadFile(f"cut.{kind}.gz", gzip.compress((text * 50).encode())[:-20], "not a whole gz file"),
            BadFile(f"spoilt.{kind}.gz", _flipped(gzip.compress(text.encode())), "not a whole gz file"),
            BadFile(f"empty.{kind}.gz", b"", "the file "),
            BadFile(f"no_column.{kind}", text.replace("sentence", "sentense").encode(), "did you mean 'sentense'?"),
            BadFile(f"other_case.{kind}", text.replace("label", "Label").encode(), "did you mean 'Label'?"),
            BadFile(f"one_class.{kind}", text.replace("neg", "pos").encode(), "every row has the label 'pos'"),
            BadFile(f"no_label.{kind}", text.replace("neg", "", 1).encode(), f"{'' if kind == 'json' else ':'}"),
            BadFile(f"blank_text.{kind}", text.replace("fine", "  ").encode(), "no text in 'sentence'"),
            BadFile(
                f"two_labels.{kind}",
                text.replace("sentence", "label").encode(),
                "2 columns are named 'label'",
                {"text_columns": "label", "label_column": "sentence"},
            )
            if kind in ("tsv", "csv")
            else BadFile(
                f"twice.{kind}", text.replace('"sentence"', '"label"').encode(), "2 columns are named 'label'"
            ),
            BadFile(f"binary_{line.strip(':')}.{kind}", b"\x00\x01\x02\x03", ":1: a NUL character"),
        ]
    return found


def _flipped(packed: bytes) -> bytes:
    return packed[:-6] + bytes([packed[-6] ^ 255]) + packed[-5:]  # of the checksum


def records() -> list[BadFile]:
    """Rows of text that are not as the header says."""
    return [
        BadFile("header.tsv", b"sentence\tlabel\n", "the file has no rows"),
        BadFile("header.csv", b"sentence,label", "the file has no rows"),
        BadFile("few.tsv", TSV.encode() + b"alone\n", ":6: 1 fields where the header has 2"),
        BadFile("many.tsv", TSV.encode() + b"a\tb\tc\n", ":6: 3 fields where the header has 2"),
        BadFile("few.csv", CSV.encode() + b"alone\n", ":6: 1 fields where the header has 2"),
        BadFile("comma.csv", CSV.encode() + b"a, b,pos\n", ":6: 3 fields where the header has 2"),
        BadFile("semicolon.csv", CSV.replace(",", ";").encode(), ":1: no column 'sentence'"),
        BadFile("tabs.csv", TSV.encode(), ":1: no column 'sentence'"),
        BadFile("commas.tsv", CSV.encode(), ":1: no column 'sentence'"),
        BadFile("spaces_for_tabs.tsv", TSV.replace("\t", "  ").encode(), ":1: no column 'sentence'"),
        BadFile("mac.tsv", TSV.replace("\n", "\r").encode(), ":1: a carriage return in the header"),
        BadFile("mac.csv", CSV.replace("\n", "\r").encode(), ":1: not a csv record"),
        BadFile("open.csv", CSV.encode() + b'"open,pos\nmore,neg\n', ":6: not a csv record (unexpected end of data)"),
        BadFile("behind.csv", CSV.encode() + b'"a"b,pos\n', ":6: not a csv record"),
        BadFile("long.csv", CSV.encode() + b'"' + b"long " * 30_000 + b'",pos\n', None),
        BadFile("long.tsv", TSV.encode() + b"long " * 30_000 + b"\tpos\n", None),
        BadFile("lines.csv", CSV.encode() + b'"two\nlines",pos\n', None),
        BadFile("quotes.tsv", TSV.encode() + b'"open\tpos\n', None),
        BadFile("twice_elsewhere.csv", b"id,id,sentence,label\n1,2,a,x\n1,2,b,y\n", None),
        BadFile(
            "thousand_columns.csv", (",".join(f"c{i}" for i in range(1000)) + "\n").encode(), ":1: no column 'sentence'"
        ),
        BadFile("ending", TSV.encode(), "unknown kind of file ''"),
        BadFile("a.xlsx", TSV.encode(), "unknown kind of file '.xlsx'"),
        BadFile("a.txt", TSV.encode(), "unknown kind of file '.txt'"),
        BadFile("a.gz", gzip.compress(TSV.encode()), "unknown kind of file ''"),
        BadFile("a.tsv.zip", TSV.encode(), "unknown kind of file '.zip'"),
        BadFile("one.tsv", b"sentence\tlabel\na\tb\n", "every row has the label 'b'"),
    ]


def objects() -> list[BadFile]:
    """JSON of other forms and values."""
    row = {"sentence": "x", "label": "pos"}
    deep = '{"sentence": "x", "label": "pos", "more": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
    cut = JSONL.encode()[:-10]
    return [
        BadFile("cut.jsonl", cut, ":4: not JSON"),
        BadFile("null_row.jsonl", JSONL.encode() + b"null\n", ":5: expected a JSON object, but got NoneType"),
        BadFile("list_row.jsonl", JSONL.encode() + b'["a", "b"]\n', ":5: expected a JSON object, but got list"),
        BadFile("number_row.jsonl", JSONL.encode() + b"5\n", ":5: expected a JSON object, but got int"),
        BadFile("two_in_a_line.jsonl", JSONL.encode() + (json.dumps(row) * 2).encode(), ":5: not JSON (Extra data"),
        BadFile("single_quotes.jsonl", JSONL.encode() + b"{'sentence': 'a'}\n", ":5: not JSON"),
        BadFile("deep.jsonl", JSONL.encode() + deep.encode(), ":5: not JSON that can be read (nested too deep)"),
        BadFile(
            "digits.jsonl",
            JSONL.encode() + b'{"sentence": "x", "label": ' + b"9" * 5000 + b"}\n",
            ":5: not JSON that can be read",
        ),
        BadFile(
            "long_number.jsonl", labels("jsonl", [0, 1, 10**300]), ":3: column 'label' holds a number of more than"
        ),
        BadFile("missing.jsonl", jsonl({"sentence": "x"}), ":5: no column 'label'"),
        BadFile("null_text.jsonl", jsonl({"sentence": None, "label": "pos"}), ":5: column 'sentence' holds None"),
        BadFile("number_text.jsonl", jsonl({"sentence": 5, "label": "pos"}), ":5: column 'sentence' holds 5"),
        BadFile("nan_text.jsonl", jsonl({"sentence": float("nan"), "label": "pos"}), ":5: column 'sentence' holds nan"),
        BadFile("list_text.jsonl", jsonl({"sentence": ["a"], "label": "pos"}), ":5: column 'sentence' holds ['a']"),
        BadFile(
            "object_text.jsonl", jsonl({"sentence": {"a": 1}, "label": "pos"}), ":5: column 'sentence' holds {'a': 1}"
        ),
        BadFile(
            "half.jsonl",
            jsonl({"sentence": "an \ud83d", "label": "pos"}),
            ":5: column 'sentence' holds '\\ud83d', half of a character",
        ),
        BadFile(
            "half_label.jsonl",
            jsonl({"sentence": "x", "label": "\udc00"}),
            ":5: column 'label' holds '\\udc00', half of",
        ),
        BadFile("emoji.jsonl", jsonl({"sentence": "\U0001f600 \0 \u2028", "label": "pos"}), None),
        BadFile("null_label.jsonl", jsonl({"sentence": "x", "label": None}), ":5: empty label"),
        BadFile(
            "list_label.jsonl",
            jsonl({"sentence": "x", "label": [1, 2]}),
            ":5: column 'label' holds [1, 2], a list, where one label is expected",
        ),
        BadFile("object_label.jsonl", jsonl({"sentence": "x", "label": {"a": 1}}), ":5: column 'label' holds {'a': 1}"),
        BadFile(
            "long_label.jsonl",
            jsonl({"sentence": "x", "label": "a text " * 100}),
            ":5: column 'label' holds a label of 699",
        ),
        BadFile("lines_label.jsonl", jsonl({"sentence": "x", "label": "po\ns"}), None),
        BadFile("scalar.json", b"5", ": expected a list of JSON objects, but got int"),
        BadFile("text.json", b'"a"', ": expected a list of JSON objects, but got str"),
        BadFile("no_rows.json", b"[]", "the file has no rows"),
        BadFile("no_columns.json", b"{}", ": no column 'sentence'"),
        BadFile("list_of_lists.json", b'[["a", "b"]]', ":1: expected a JSON object, but got list"),
        BadFile(
            "cut.json",
            b'[\n{"sentence": "a", "label": 1},\n{"sentence"',
            ": not JSON (Expecting ':' delimiter at line 3",
        ),
        BadFile("columns.json", json.dumps({"sentence": ["a", "b"], "label": [0, 1]}).encode(), None),
        BadFile(
            "pandas.json", json.dumps({"sentence": {"0": "a", "1": "b"}, "label": {"0": 0, "1": 1}}).encode(), None
        ),
        BadFile("ragged.json", json.dumps({"sentence": ["a", "b"], "label": [0]}).encode(), "'sentence' 2, 'label' 1"),
        BadFile(
            "other_rows.json",
            json.dumps({"sentence": {"0": "a"}, "label": {"1": 1}}).encode(),
            "columns are of different rows",
        ),
        BadFile("one_column.json", json.dumps({"sentence": ["a", "b"]}).encode(), ": no column 'label'"),
        BadFile("lines.json", JSONL.encode(), None),
        BadFile(
            "indented.json",
            json.dumps([{"sentence": "a", "label": 0}, {"sentence": "b", "label": 1}], indent=2).encode(),
            None,
        ),
    ]


def label_files() -> list[BadFile]:
    """Labels of every form, and the classes they are."""
    regression = {"task": "regression"}
    return [
        BadFile("whole.tsv", labels("tsv", ["1.0", "0.0", "1."]), None),
        BadFile("whole.csv", labels("csv", ["1.00", "0", "1"]), None),
        BadFile("whole.jsonl", labels("jsonl", [1.0, 0, "1", "0.0", True]), None),
        BadFile("fraction.tsv", labels("tsv", ["1", "2.5"]), ":3: the label '2.5' is a fraction"),
        BadFile(
            "nan.tsv", labels("tsv", ["1", "0", "nan"]), ":4: column 'label' holds 'nan' for a label among numbers"
        ),
        BadFile("nan.jsonl", labels("jsonl", [1.0, 0.0, float("nan")]), ":3: empty label"),
        BadFile("inf.jsonl", labels("jsonl", [1.0, 0.0, float("inf")]), ":3: column 'label' holds inf"),
        BadFile("gap.tsv", labels("tsv", ["1", "", "0"]), ":3: empty label"),
        BadFile("spaces.tsv", labels("tsv", [" pos", "neg ", "pos"]), None),
        BadFile("ids.tsv", labels("tsv", ["1", "0", "7"]), ":4: unknown label '7'", {"label_names": ["a", "b"]}),
        BadFile("negative.tsv", labels("tsv", ["1", "0", "-1"]), ":4: unknown label '-1'", {"label_names": ["a", "b"]}),
        BadFile("names.tsv", labels("tsv", ["a", "c"]), ":3: unknown label 'c'", {"label_names": ["a", "b"]}),
        BadFile("near.tsv", labels("tsv", ["good", "Bad"]), "did you mean 'bad'?", {"label_names": ["good", "bad"]}),
        BadFile("huge.tsv", labels("tsv", ["1", "9" * 190]), None),
        BadFile("text_for_label.tsv", TSV.encode(), "`text_columns`", {"text_columns": "label"}),
        BadFile(
            "score.tsv", labels("tsv", ["1", "x"]), ":3: column 'label' holds 'x', which is not a finite", regression
        ),
        BadFile("score_nan.tsv", labels("tsv", ["1", "nan"]), ":3: column 'label' holds 'nan'", regression),
        BadFile("score_large.tsv", labels("tsv", ["1", "1e300"]), ":3: column 'label' holds '1e300'", regression),
        BadFile("score_null.jsonl", labels("jsonl", [1, None]), ":2: column 'label' holds None", regression),
        BadFile("score_list.jsonl", labels("jsonl", [1, [2]]), ":2: column 'label' holds [2]", regression),
        BadFile("score_int.jsonl", labels("jsonl", [1, 10**400]), ":2: column 'label' holds 1", regression),
        BadFile("score.jsonl", labels("jsonl", [1, "2.5", -3e-9]), None, regression),
        BadFile("pair.tsv", TSV.encode(), ":1: no column 'second'", {"text_columns": "sentence,second"}),
        BadFile(
            "pair_null.jsonl",
            b'{"a": "x", "b": null, "label": 1}\n{"a": "x", "b": "y", "label": 0}\n',
            ":1: column 'b' holds None",
            {"text_columns": "a, b"},
        ),
    ]


def parquet_files() -> list[BadFile]:
    """Parquet files of every type, and broken ones."""
    import datetime
    import decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

    def written(**columns: Any) -> Callable[[Path], None]:
        return lambda path: pq.write_table(pa.table(columns), path)

    def spoilt(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            pq.write_table(pa.table({"sentence": ["a", "b"] * 50, "label": [0, 1] * 50}), path)
            path.write_bytes(change(path.read_bytes()))

        return write

    texts, classes = ["a", "b"], [0, 1]
    time = datetime.datetime(2020, 1, 1)
    invalid = pa.Array.from_buffers(pa.string(), 2, [None, *pa.array([b"a", b"\xff"]).buffers()[1:]])
    twice = pa.Table.from_arrays(
        [pa.array(texts), pa.array(classes), pa.array(classes)], ["sentence", "label", "label"]
    )
    return [
        BadFile("good.parquet", written(sentence=texts, label=classes, extra=classes), None),
        BadFile("GOOD.PARQUET", written(sentence=texts, label=classes), None),
        BadFile("bool.parquet", written(sentence=texts, label=[True, False]), None),
        BadFile("float.parquet", written(sentence=texts, label=[1.0, 0.0]), None),
        BadFile(
            "decimal.parquet", written(sentence=texts, label=[decimal.Decimal("1.0"), decimal.Decimal("0.0")]), None
        ),
        BadFile("int8.parquet", written(sentence=texts, label=pa.array(classes, pa.int8())), None),
        BadFile("uint64.parquet", written(sentence=texts, label=pa.array([0, 2**64 - 1], pa.uint64())), None),
        BadFile("large.parquet", written(sentence=pa.array(texts, pa.large_string()), label=classes), None),
        BadFile("categories.parquet", written(sentence=texts, label=pa.array(texts).dictionary_encode()), None),
        BadFile("gap.parquet", written(sentence=texts, label=[1.0, float("nan")]), ":2: empty label"),
        BadFile("null.parquet", written(sentence=texts, label=[1, None]), ":2: empty label"),
        BadFile("nulls.parquet", written(sentence=texts, label=[None, None]), ":1: empty label"),
        BadFile("null_text.parquet", written(sentence=["a", None], label=classes), ":2: column 'sentence' holds None"),
        BadFile("bytes.parquet", written(sentence=[b"a", b"b"], label=classes), "column 'sentence' is of type binary"),
        BadFile("bytes_label.parquet", written(sentence=texts, label=[b"a", b"b"]), "column 'label' is of type binary"),
        BadFile(
            "fixed_label.parquet",
            written(sentence=texts, label=pa.array([b"a", b"b"], pa.binary(1))),
            "column 'label' ",
        ),
        BadFile("time.parquet", written(sentence=texts, label=[time, time]), "column 'label' is of type timestamp[us]"),
        BadFile(
            "ns.parquet", written(sentence=texts, label=pa.array([1, 2], pa.timestamp("ns"))), "type timestamp[ns]"
        ),
        BadFile(
            "date.parquet", written(sentence=[time.date()] * 2, label=classes), "column 'sentence' is of type date32"
        ),
        BadFile(
            "duration.parquet", written(sentence=texts, label=pa.array([1, 2], pa.duration("s"))), "type duration[s]"
        ),
        BadFile("list.parquet", written(sentence=[["a"], ["b"]], label=classes), ":1: column 'sentence' holds ['a']"),
        BadFile("list_label.parquet", written(sentence=texts, label=[[1], [0]]), ":1: column 'label' holds [1]"),
        BadFile(
            "struct.parquet",
            written(sentence=[{"x": "a"}] * 2, label=classes),
            ":1: column 'sentence' holds {'x': 'a'}",
        ),
        BadFile(
            "struct_label.parquet", written(sentence=texts, label=[{"x": 1}] * 2), ":1: column 'label' holds {'x': 1}"
        ),
        BadFile("number_text.parquet", written(sentence=[1, 2], label=classes), ":1: column 'sentence' holds 1"),
        BadFile(
            "invalid.parquet", written(sentence=invalid, label=classes), ":2: column 'sentence' holds a value that"
        ),
        BadFile(
            "no_rows.parquet",
            written(sentence=pa.array([], pa.string()), label=pa.array([], pa.int64())),
            "has no rows",
        ),
        BadFile("no_column.parquet", written(sentence=texts, labels=classes), "did you mean 'labels'?"),
        BadFile("twice.parquet", lambda path: pq.write_table(twice, path), "2 columns are named 'label'"),
        BadFile("text.parquet", TSV.encode(), "not a parquet file ("),
        BadFile("empty.parquet", b"", "not a parquet file ("),
        BadFile("magic.parquet", b"PAR1", "not a parquet file ("),
        BadFile("none.parquet", None, "there is no such file"),
        BadFile("folder.parquet", folder, "this is a folder"),
        BadFile("cut.parquet", spoilt(lambda data: data[:-30]), "not a parquet file ("),
        BadFile("cut_head.parquet", spoilt(lambda data: data[20:]), "not a parquet file ("),
        BadFile(
            "footer.parquet", spoilt(lambda data: data[:-8] + b"\xff\xff\xff\x7f" + data[-4:]), "not a parquet file ("
        ),
        BadFile("packed.parquet.gz", spoilt(gzip.compress), "not a parquet file ("),
    ]
