"""How a recipe and the commands answer bad flags, data files and model folders.

python benchmarks/hostile.py --output benchmarks/results/hostile.json
python benchmarks/hostile.py --only flags --match lr_scheduler --show

Each input is tried in a process of its own, forked from one that has everything imported. An answer is
    right      exit code 0, and what was asked for is there
    refused    exit code 2, one line on stderr, and neither trained nor written anything
    late       exit code 2, but after training had begun
    wordy      exit code 2, but more than one line on stderr
    traceback  an exception that reached the person, another exit code, or a signal
    hangs      no answer in --seconds
Inputs are in hostile_inputs.py. The aim is that all are right or refused.
"""

import argparse
import collections
import json
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder would be asked of the hub, with minutes of retries

import hostile_inputs
import torch

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


class Answer(NamedTuple):
    """What an input was answered with, and what stood on stderr."""

    kind: str
    said: str


def run(program: str, argv: list[str]) -> None:
    """Run a recipe or a command of ``lightning-distill``."""
    if program.startswith("lightning-distill "):
        from lightning_distill.__main__ import main

        main([program.split()[1], *argv])
    else:
        runpy.run_path(str(RECIPES / f"{program}.py"))["main"](argv)


def ask(attempt: hostile_inputs.Attempt, folder: Path, seconds: float) -> Answer:
    """Try an input in a forked process."""
    argv = attempt.prepare(folder)
    out, err = folder / "stdout", folder / "stderr"
    child = os.fork()
    if not child:
        os.setsid()
        os.chdir(folder)
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        code = 0
        sys.argv = [attempt.program]
        try:
            run(attempt.program, argv)
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    began, status = time.monotonic(), None
    while status is None:
        done, found = os.waitpid(child, os.WNOHANG)
        if done:
            status = found
        elif time.monotonic() - began > seconds:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Answer("hangs", err.read_text(errors="replace"))
        else:
            time.sleep(0.02)
    said = err.read_text(errors="replace").strip()
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return Answer("right" if attempt.done(folder) else "traceback", said or "exit code 0, but nothing is there")
    if code != 2 or "Traceback" in said:
        return Answer("traceback", f"exit code {code}\n{said}")
    if any(folder.glob("out*/checkpoints/*/*.ckpt")):
        return Answer("late", said)
    return Answer("refused" if said.count("\n") == 0 and "error:" in said else "wordy", said)


def main() -> None:
    """Try them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(hostile_inputs.KINDS), help="one kind of input")
    parser.add_argument("--match", default="", help="inputs whose name holds this")
    parser.add_argument("--seconds", type=float, default=120, help="how long an input may take")
    parser.add_argument("--show", action="store_true", help="print every answer, not only the bad ones")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run_once = __import__("lightning_distill.cli.trainer")  # noqa: F841  imported before the forks
    counts: dict[str, collections.Counter[str]] = {}
    with tempfile.TemporaryDirectory() as root:
        given = hostile_inputs.Given(Path(root) / "given")
        for kind, make in hostile_inputs.KINDS.items():
            if options.only not in (None, kind):
                continue
            count = counts.setdefault(kind, collections.Counter())
            for attempt in make(given):
                if options.match not in attempt.name:
                    continue
                folder = Path(root) / "attempt"
                folder.mkdir()
                answer = ask(attempt, folder, options.seconds)
                shutil.rmtree(folder)
                count[answer.kind] += 1
                if options.show or answer.kind not in ("right", "refused"):
                    lines = answer.said.splitlines() or [""]
                    said = lines[-1] if answer.kind != "wordy" else " | ".join(lines)
                    print(f"{kind}: {attempt.name}: {answer.kind}: {said[:300]}", flush=True)
            print(f"{kind}: {sum(count.values())} tried, {dict(count)}", flush=True)
    found: dict[str, Any] = {kind: {"tried": sum(count.values()), **count} for kind, count in counts.items()}
    if options.output:
        from lightning_distill.cli.report import versions

        found |= {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"), "versions": versions()}
        options.output.write_text(json.dumps(found, indent=2) + "\n")
    bad = sum(count[answer] for count in counts.values() for answer in ("traceback", "hangs", "late", "wordy"))
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
