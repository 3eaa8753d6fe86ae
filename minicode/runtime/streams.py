"""A command's streams and signals: closed, full, of few letters, or of a terminal that goes away.

It imports nothing that takes long: minicode/__init__.py calls `begin` before all else.
"""

import os
import signal
import sys
from contextlib import contextmanager


def begin():
    """What a command does first. From here on Ctrl-C or a full disk ends it in one line."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: else the next file would have its number
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout = Stream(sys.stdout)
    sys.stderr = Stream(sys.stderr, outlived=True)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as other commands end before `| head`
    signal.signal(signal.SIGINT, stop)


def stop(number, frame):
    """Ends the command as Ctrl-C does, in one line: some imports swallow a KeyboardInterrupt."""
    os.write(2, b"stopped\n")
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


class Stream:
    """A stream that may break: that ends the command, or, where it is outlived, nothing."""

    def __init__(self, stream, outlived=False):
        self.stream = stream
        self.outlived = outlived

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()  # here, and not where nothing catches its error
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # for what is held back
            if not self.outlived:
                raise SystemExit(f"minicode: {error}") from None


@contextmanager
def outlive():
    """Within the block nothing that happens to a terminal or to a pipe ends the command."""
    sys.stdout.outlived = True
    with handled(signal.SIG_IGN, "SIGHUP", "SIGPIPE"):
        yield


@contextmanager
def handled(handler, *names):
    """Within the block these signals, where the system has them, go to a handler."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
