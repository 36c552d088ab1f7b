"""Ctrl-C and SIGTERM leave a command with exit status 130, whenever they come, and no traceback.

Before a command's work begins and after its end it leaves at once: nothing is open. In between it
raises KeyboardInterrupt, so that what is open is closed.
"""

import atexit
import os
import select
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Final, TextIO

INTERRUPTED: Final = 130
"""The exit status."""

_AGAIN_SECONDS: Final = 0.01

_came = False
_last_words = ""


def wanted() -> list[signal.Signals]:
    """Those of the two that are for us: a shell starts `command &` with ctrl+c ignored."""
    both = (signal.SIGINT, signal.SIGTERM)
    return [each for each in both if signal.getsignal(each) is not signal.SIG_IGN]


def leave_at_once() -> None:
    """From here on either ends the process, until `interruptible` takes it over."""
    for each in wanted():
        signal.signal(each, _leave)
        # Registered first and so called last: what Python still takes down would die of the signal.
        atexit.register(signal.signal, each, signal.SIG_IGN)


def interruptible(work: Callable[[], int]) -> int:
    """Carry out a command's work; returns its exit status, 130 where a signal came meanwhile.

    Libraries turn a KeyboardInterrupt into errors of their own (numpy: into an ImportError) or lose
    it in a destructor: neither changes the status, and a lost one is raised again.
    """
    minded = wanted()
    sys.unraisablehook, unraisable = _raise_again, sys.unraisablehook
    signal.signal(signal.SIGALRM, _interrupt)
    try:
        try:
            for each in minded:
                signal.signal(each, _interrupt)
            status = work()
        finally:
            for each in minded:
                signal.signal(each, _leave)
            sys.unraisablehook = unraisable
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        if not _came:
            raise
    return INTERRUPTED if _came else status


def interrupted() -> bool:
    """Whether one came while a command worked: an error that follows from it is no news."""
    return _came


def last_words(sentence: str) -> None:
    """What a command that is interrupted from here on says of its work; nothing where empty."""
    global _last_words
    _last_words = sentence


def say_last_words(again: str) -> None:
    """Say it on stderr, and how to start again."""
    if _last_words:
        begin = "\n" if sys.stderr.isatty() else ""  # the terminal's ^C stands on this line
        print(f"{begin}Interrupted. {_last_words}\nStart again: {again}", file=sys.stderr)


def wait_for_line(terminal: TextIO) -> None:
    """Wait until a line was typed. Raises KeyboardInterrupt at ctrl+c, whenever that comes.

    A read alone would miss one that comes just before it begins, and wait for a key.
    """
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    before = signal.set_wakeup_fd(sender)
    try:
        while terminal.fileno() not in select.select([terminal.fileno(), receiver], [], [])[0]:
            os.read(receiver, 1)
    finally:
        signal.set_wakeup_fd(before)
        os.close(receiver)
        os.close(sender)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _came
    _came = True
    raise KeyboardInterrupt


def _raise_again(lost: "sys.UnraisableHookArgs") -> None:
    if issubclass(lost.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
    else:
        sys.__unraisablehook__(lost)
