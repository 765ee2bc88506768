"""Ctrl-C and SIGTERM end a command with 130 and 143, and with a line that says how to go on, whenever they come."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch.multiprocessing import ProcessExitedException
from torch.utils.data import get_worker_info

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_programs: set[Any] = set()
_CODES = {128 + number: "Ctrl-C" if number == signal.SIGINT else number.name for number in SIGNALS}


class Stopped(SystemExit):
    """The end that a signal asked for.

    Args:
        number: The signal.
        said: Whether the user has been told how to go on.

    Example:
        >>> import signal
        >>> from lightning_distill.training.stops import Stopped
        >>> Stopped(signal.SIGTERM).code
        143
    """

    def __init__(self, number: int, *, said: bool = False) -> None:
        super().__init__(128 + number)
        self.said = said


def stopped_by(error: BaseException | None) -> int | None:
    """The signal that an exception is the end of, in this process or in one that it forked; None for another end."""
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    code: Any = None
    if isinstance(error, ProcessExitedException):
        code = 128 - error.exit_code if error.exit_code < 0 else error.exit_code  # below 0 a signal itself ended it
    elif isinstance(error, SystemExit):
        code = error.code
    return code - 128 if code in _CODES else None


@contextmanager
def stops(hint: str) -> Iterator[None]:
    """End what is inside with 128 + the signal on SIGTERM and Ctrl-C; a second Ctrl-C does not wait for anything.

    Training has its own answer, :class:`~lightning_distill.callbacks.Resumable`, which saves first. Processes that were
    forked inside are told to stop and waited for, so that they can save too.

    Args:
        hint: How to go on, said after "Go on with".

    Raises:
        SystemExit: With code 130 on Ctrl-C, 143 on SIGTERM.

    Example:
        >>> from lightning_distill.training.stops import stops
        >>> with stops("the same command"):
        ...     raise KeyboardInterrupt
        Traceback (most recent call last):
        lightning_distill.training.stops.Stopped: 130
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if get_worker_info() is not None:
            return  # a worker of a DataLoader, which the process that reads from it ends
        again = bool(received)
        received.append(number)
        if again and number == signal.SIGINT:
            for child in multiprocessing.active_children():
                child.kill()
        if not again or number == signal.SIGINT:
            raise Stopped(number)

    # Elsewhere than in the main thread (a notebook's worker) Python takes no handlers, and signals stay as they were.
    earlier: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        earlier = {number: signal.signal(number, stop) for number in SIGNALS}
    home = os.getpid()
    try:
        yield
    except BaseException as error:
        number = stopped_by(error)
        if number is None or os.getpid() != home:
            raise
        received.append(number)
        end_children()
        if not getattr(error, "said", False):
            _say(f"\nStopped by {_CODES[128 + number]}. Go on with: {hint}")
        raise Stopped(number, said=True) from None
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def remember(processes: Iterable[Any]) -> None:
    """Know the other processes of a run that a launcher has started as programs: a later Trainer's knows them no more.

    Args:
        processes: Of :mod:`subprocess`.
    """
    _programs.update(process for process in processes if isinstance(process, subprocess.Popen))


def end_children() -> None:
    """Tell the processes that were started here to stop, and wait until those that were forked have saved and are gone.

    Those that are programs may wait for this one in a collective call, so this one does not wait for them.
    """
    for program in _programs:
        if program.poll() is None:
            program.terminate()
    for child in multiprocessing.active_children():
        child.terminate()
    for child in multiprocessing.active_children():
        child.join()


@rank_zero_only
def _say(text: str) -> None:
    print(text, file=sys.stderr)
