"""docs/objectives.md lists every objective, and its figures are those that the benchmark wrote."""

import json
import re
from pathlib import Path

import pytest

from lightning_distill import objectives
from lightning_distill.objectives import FeatureObjective, Objective

from .registry import CASES

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "objectives.md").read_text()
RESULTS = {
    path.stem.removeprefix("objectives_"): json.loads(path.read_text())["students"]
    for path in sorted((ROOT / "benchmarks" / "results").glob("objectives*.json"))
}
STUDENTS = json.loads((ROOT / "benchmarks" / "results" / "objectives.json").read_text())["students"]
ROWS = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", GUIDE, re.MULTILINE))


def test_every_objective_has_a_row_and_an_oracle() -> None:
    kinds = {name: getattr(objectives, name) for name in objectives.__all__}
    public = {
        name
        for name, kind in kinds.items()
        if issubclass(kind, Objective) and kind not in (Objective, FeatureObjective)
    }
    assert set(ROWS) == public == {type(case.make()).__name__ for case in CASES}
    for name in set(kinds) - public - {"Loss", "Objective"}:
        assert f"`{name}`" in GUIDE


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.rpartition("| ")[2].startswith(("+", "-"))])
def test_gains_are_those_that_the_benchmark_wrote(name: str) -> None:
    *gains, combination = re.match(r"(\S+), (\S+) \(`(.*)`\)$", ROWS[name].rpartition("| ")[2]).groups()  # type: ignore[union-attr]
    assert gains == [f"{student[combination]['gain']:+.1f}" for student in STUDENTS.values()]


@pytest.mark.parametrize("job", RESULTS)
def test_tables_are_those_that_the_benchmark_wrote(job: str) -> None:
    mark = "sst2" if job == "objectives" else job
    tables = GUIDE.split(f"<!-- {mark} -->\n")[1].split(f"<!-- end of {mark} -->")[0]
    for student, combinations in RESULTS[job].items():
        table = tables[tables.index(f"| {student} |") :]
        for name, row in combinations.items():
            cells = re.search(rf"^\| {re.escape(name)} \| (.*) \|$", table, re.MULTILINE)[1].split(" | ")  # type: ignore[index]
            gains = ", ".join(f"{gain:+.1f}" for gain in row["gains"])
            gain = f"{row['gain']:+.1f}" + (f" ± {row['interval']:.1f}" if "interval" in row else "")
            written = (f"{row['accuracy']:.1f}", f"{row['spread']:.1f}", f"{gain} ({gains})")
            assert tuple(cells) == (*written, f"{row['seconds']:.0f}"), name
