"""The process's standard streams: work goes on when nobody reads them, and what could not be written is said at the end."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Lasting(io.FileIO):
    """A file that takes what is written when it can no longer be: `failure` is the first error, after which all is dropped."""

    failure: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        if self.failure is None:
            try:
                # of what a full pipe takes later, the buffer keeps the rest
                return super().write(data)
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes


def lasting(main: Callable[[], int]) -> int:
    """Return the exit status of a process's main function, whatever becomes of its standard streams.

    A stream that is closed from the start leads nowhere, so that no file takes its number. When the reader of the output
    has gone (`| head`), or its disk is full, the work goes on and its files are written; then the status is the work's own,
    or, where the disk is full, 70. Characters that the output's encoding does not have are written as \\xNN.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # the lowest number that is free, which is this one
            os.open(os.devnull, os.O_RDONLY if name == "stdin" else os.O_WRONLY)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    files = [_Lasting(number, "w", closefd=False) for number in (1, 2)]
    for name, file in zip(("stdout", "stderr"), files, strict=True):
        old = getattr(sys, name)
        old.flush()
        kept = {"line_buffering": old.line_buffering or file.isatty(), "write_through": old.write_through}
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(file), old.encoding, errors="backslashreplace", **kept))
    try:
        status = main()
    except SystemExit as ended:
        # a parser that has printed its help, or what is wrong
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    sys.stdout.flush()
    lost = files[0].failure
    if lost is not None and lost.errno != errno.EPIPE:
        print(f"alter: the output could not be written: {lost.strerror}. Send it to another place.", file=sys.stderr)
        status = status or 70
    sys.stderr.flush()
    return status
