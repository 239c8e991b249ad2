"""Layers that pass through two buffers: while one computes, the next is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from time import perf_counter

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from grating_core.forking import Threads, tell_of_forks
from grating_core.memory.checkpoint import aligned_buffer
from grating_core.memory.group import PIECE, TensorGroup
from grating_core.memory.meter import Meter


class Streamer:
    """A streamer reads layers in their order, over and over, one ahead of the computing.

    After the last comes the first again, so that the next request finds it read. A thread does the reading: reads
    leave Python's lock alone, and past the page cache they take hardly any processor time. One request at a time
    may use it.

    Args:
        groups: The streamed layers' weights by layer number; two or more.
        device: The device where the weights are wanted.
        meter: The meter that counts bytes and waiting.
    """

    def __init__(self, groups: Mapping[int, TensorGroup], device: torch.device, meter: Meter) -> None:
        self._groups = groups
        self._order = sorted(groups)
        self._meter = meter
        size = max(group.size for group in groups.values())
        staging = aligned_buffer(PIECE if any(group.converts for group in groups.values()) else 0)
        self._slots = tuple(_Slot(size, staging, device) for _ in range(2))
        self._free = list(self._slots)
        self._ahead: dict[int, tuple[_Slot, Future[dict[str, Tensor]]]] = {}
        # One thread: a read that nobody waits for any more is over before the next into its buffer begins.
        self._reader = Threads(1, "grating-weights", _leave_processors_alone)
        tell_of_forks(self)

    def after_fork(self) -> None:
        """Forget what was being read: the thread that read it is not here."""
        self._ahead = {}
        self._free = list(self._slots)

    def __contains__(self, number: int) -> bool:
        """Tell whether this layer is streamed."""
        return number in self._groups

    @contextmanager
    def layer(self, number: int) -> Iterator[dict[str, Tensor]]:
        """Yield the weights of a layer by name, to be used inside the ``with`` and not after it.

        Raises:
            FileError: The weights cannot be read. The next call tries again.
            RuntimeError: There is no thread to be had that would read. The next call tries again.
        """
        started = perf_counter()
        slot, weights = self._wait_for(number)
        self._meter.seconds_waited += perf_counter() - started
        self._meter.bytes_read += self._groups[number].bytes_read
        try:
            yield weights
        finally:
            slot.release()
        self._read_ahead(self._after(number))

    def rewind(self) -> None:
        """Read ahead for the next request, wherever this one ended."""
        self._read_ahead(self._order[0])

    def close(self) -> None:
        """Stop the thread."""
        self._reader.close()

    def _wait_for(self, number: int) -> tuple[_Slot, dict[str, Tensor]]:
        if number not in self._ahead:
            self._aim(number)
        self._read_ahead(number)
        slot, reading = self._ahead[number]
        try:
            return slot, reading.result()
        except Exception:
            # It was read ahead, perhaps long ago, and what was wrong then may be right by now.
            self._aim()
        self._aim(number)
        slot, reading = self._ahead[number]
        try:
            return slot, reading.result()
        except BaseException:
            self._aim()
            raise

    def _after(self, number: int) -> int:
        return self._order[(self._order.index(number) + 1) % len(self._order)]

    def _read_ahead(self, number: int) -> None:
        """Have this layer and the one after it read, or being read, if there is a thread to be had."""
        with suppress(RuntimeError):  # then they are read when they are wanted
            self._aim(number, self._after(number))

    def _aim(self, *numbers: int) -> None:
        """Have exactly these layers read or being read."""
        for number in self._ahead.keys() - set(numbers):
            slot, reading = self._ahead.pop(number)
            reading.cancel()
            self._free.append(slot)
        for number in numbers:
            if number not in self._ahead:
                reading = self._reader.submit(self._free[-1].read, self._groups[number])
                self._ahead[number] = self._free.pop(), reading


def _leave_processors_alone() -> None:
    """Have torch work with this thread alone, or converting and merging would take the others from the layers."""
    torch.get_num_threads()  # the first question sets the number, so it comes before the limit
    threadpool_limits(1, user_api="openmp")


class _Slot:
    """A slot is a buffer for one layer on the CPU, pinned and with a twin on the device if that is another."""

    def __init__(self, size: int, staging: Tensor, device: torch.device) -> None:
        self._staging = staging  # the slots take turns with it, as they do with the thread
        self._device = device
        self._host = aligned_buffer(size, pinned=device.type == "cuda")
        self._twin = self._host if device.type == "cpu" else self._host.to(device)
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._computed: torch.cuda.Event | None = None

    def read(self, group: TensorGroup) -> dict[str, Tensor]:
        group.read(self._host, self._staging)
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                if self._computed is not None:
                    self._stream.wait_event(self._computed)
                self._twin.copy_(self._host, non_blocking=True)
            self._stream.synchronize()
        elif self._twin is not self._host:
            self._twin.copy_(self._host)
        return group.views(self._twin)

    def release(self) -> None:
        """Note that the computing with the weights has been set going; the next read must not overtake it."""
        if self._stream is not None:
            self._computed = torch.cuda.current_stream(self._device).record_event()
