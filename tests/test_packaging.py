"""What is built and installed is what is in the tree."""

import subprocess
import sys
import zipfile
from pathlib import Path

from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).resolve().parents[1]


def test_packages_are_listed() -> None:
    listed = read_configuration(ROOT / "pyproject.toml")["tool"]["setuptools"]["packages"]
    folders = {"lightning_distill": ROOT / "lightning_distill", "lightning_distill.callbacks": ROOT / "callbacks"}
    found = set()
    for name, folder in folders.items():
        for init in folder.rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(folder).parts]))
    assert set(listed) == found


def test_wheel_holds_the_tree(tmp_path: Path) -> None:
    # No build isolation: setuptools is a test dependency, and the test needs no network.
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", ROOT, source], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    tracked = subprocess.run(["git", "ls-files"], cwd=source, check=True, capture_output=True, text=True).stdout.split()
    expected = {
        name for name in tracked if name.startswith("lightning_distill/") and name != "lightning_distill/callbacks"
    }
    expected |= {f"lightning_distill/{name}" for name in tracked if name.startswith("callbacks/")}
    assert inside == expected


def test_the_callbacks_folder_refuses_to_be_imported_by_its_own_name() -> None:
    result = subprocess.run([sys.executable, "-c", "import callbacks"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "from lightning_distill.callbacks import" in result.stderr
