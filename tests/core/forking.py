"""Work in a forked child, for tests."""

import os
import pickle
import select
import signal
import time
import warnings
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")

_PATIENCE = 60.0  # seconds; a child that hangs is killed


def in_fork(work: Callable[[], Answer]) -> Answer:
    """What the work comes to in a forked child; it must not hang there, nor fail."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads is the point
        child = os.fork()
    if child == 0:
        try:
            answer = pickle.dumps((True, work()))
        except BaseException as error:
            answer = pickle.dumps((False, repr(error)))
        os.write(writing, answer)
        os._exit(0)
    os.close(writing)
    end, answer = time.monotonic() + _PATIENCE, b""
    try:
        while select.select([reading], [], [], max(0.0, end - time.monotonic()))[0]:
            if not (part := os.read(reading, 1 << 16)):
                break
            answer += part
        else:
            raise AssertionError("the child hangs")
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    well, found = pickle.loads(answer)
    assert well, found
    return found
