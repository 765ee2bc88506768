"""The snippets of the guides to optimization and callbacks run, those of one guide one after the other."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lightning_distill.cli import text_parser

DOCS = Path(__file__).resolve().parents[2] / "docs"


def run(guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a guide's names stand for at its end."""
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"^```python\n(.*?)^```", (DOCS / guide).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert snippets
    names: dict[str, Any] = {"__name__": "guide"}
    for snippet in snippets:
        exec(compile(snippet, guide, "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_optimization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("optimization.md", tmp_path, monkeypatch)
    assert names["optimizer"].param_groups[0]["momentum"] == 0.9
    assert names["low"] == 6e-5
    trainer = names["L"].Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(names["Model"]())
    assert trainer.lr_scheduler_configs[0].interval == "step"


def test_commands_parse() -> None:
    (block,) = re.findall(
        r"^```bash\n(.*?)^```", (DOCS / "optimization.md").read_text(), flags=re.MULTILINE | re.DOTALL
    )
    config = text_parser(None, output_dir="runs").parse_args(shlex.split(block.replace("\\\n", " "))[2:])
    assert (config.optimizer.name, config.lr_scheduler.name, config.init_policy.policy) == ("lion", "cosine", "auto")
    assert config.trainer.gradient_clip_val is None


def test_callbacks_make_the_pictures_of_the_guides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("callbacks.md", tmp_path, monkeypatch)
    assert len(names["init"].audit) == 12
    assert 1e-5 < names["finder"].lr < 1e-2
    share = names["trainer"].callback_metrics["clipped_share"]
    assert 0.1 < share < 0.5
    # Where the norm is the bound itself, the coefficient is 1 but for rounding.
    clipped = [float(row["clip_coefficient"]) < 1 - 1e-6 for row in names["rows"]]
    assert share == pytest.approx(sum(clipped) / len(clipped))
    for picture in ("init_policy.png", "lr_finder.png", "gradient_clipping.png"):
        assert (tmp_path / "digits" / picture).read_bytes()[:4] == b"\x89PNG"
        assert (DOCS / "images" / picture).exists()


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.parametrize("guide", ["callbacks-init-policy.md", "callbacks-lr-finder.md"])
def test_guides_to_one_callback(guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(guide, tmp_path, monkeypatch)
