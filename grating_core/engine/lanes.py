"""Two passes side by side use a processor better than one pass with all its threads, where texts are short."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Thread

import torch

from grating_core.forking import Threads

_OPENMP = "ATen parallel backend: OpenMP"


class Lanes:
    """Two lanes compute at the same time, each with half of torch's threads.

    A third of a pass over short texts is Python, and their small products gain little from more threads. So one
    lane computes while the other is in Python. A third lane would wait for Python.
    """

    def __init__(self) -> None:
        self._threads = Threads(2, "grating-lane", self._take_half)
        self._all = 1

    @staticmethod
    def work_here() -> bool:
        """Tell whether threads can share torch's threads, which only a torch that uses OpenMP allows."""
        return _OPENMP in torch.__config__.parallel_info()

    def run(self, work: Callable[[], None]) -> None:
        """Make a call in both lanes at once, and return when both have ended. With one thread there is one lane.

        Args:
            work: Function that takes what is to be done, piece by piece, until nothing is left.
        """
        lanes = []
        self._all = torch.get_num_threads()
        if self._all > 1:
            with suppress(RuntimeError):  # this system starts no more threads
                for _ in range(2):
                    lanes.append(self._threads.submit(work))
        if not lanes:
            work()
        for lane in lanes:
            lane.result()

    def close(self) -> None:
        """End the threads."""
        self._threads.close(wait=False)

    def _take_half(self) -> None:
        """Let this thread compute with half of torch's threads."""
        torch.get_num_threads()  # torch now knows the thread, and leaves it the number that follows
        torch.set_num_threads(-(-self._all // 2))
        # A thread that torch does not know yet will take the number that any thread has set last.
        restoring = Thread(target=torch.set_num_threads, args=(self._all,))
        restoring.start()
        restoring.join()
