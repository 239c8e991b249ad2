"""Streamed layers pass through two buffers: while one layer computes, the next is read."""

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
    """A streamer reads layers in order, again and again, one layer ahead of computing.

    After the last layer it reads the first one again, for the next pass. A thread does the reading, because
    reads do not hold Python's lock, and past the page cache they take hardly any processor time. One pass at a
    time may use the streamer.

    Args:
        groups: The weights of the streamed layers, by layer number; two layers or more.
        device: The device of the weights.
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
        # With a single thread, a read that was given up ends before the next read into its buffer begins.
        self._reader = Threads(1, "grating-weights", _leave_processors_alone)
        tell_of_forks(self)

    def after_fork(self) -> None:
        """Forget the reads under way, because the child does not have the thread that reads."""
        self._ahead = {}
        self._free = list(self._slots)

    def __contains__(self, number: int) -> bool:
        """Tell whether a layer is streamed."""
        return number in self._groups

    @contextmanager
    def layer(self, number: int) -> Iterator[dict[str, Tensor]]:
        """Yield the weights of a layer by name. Use them only inside the ``with``.

        Raises:
            FileError: The weights cannot be read. The next call tries again.
            RuntimeError: No thread can be started to read. The next call tries again.
        """
        started = perf_counter()
        slot, weights = self._wait_for(number)
        self._meter.seconds_waited += perf_counter() - started
        self._meter.bytes_read += self._groups[number].bytes_read
        try:
            yield weights
        finally:
            slot.release()
            # Whoever computed may have packed the weights where they lie, so they are not used again.
            self._free.append(self._ahead.pop(number)[0])
        self._read_ahead(self._after(number))

    def rewind(self) -> None:
        """Read the first layers for the next pass, wherever this pass ended."""
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
            # The layer was read ahead, perhaps long ago, and the cause of the error may be gone by now.
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
        """Start to read this layer and the next one, unless they are read already or no thread can be started."""
        with suppress(RuntimeError):  # without a thread, a layer is read when it is needed
            self._aim(number, self._after(number))

    def _aim(self, *numbers: int) -> None:
        """Keep or start the reads of exactly these layers."""
        for number in self._ahead.keys() - set(numbers):
            slot, reading = self._ahead.pop(number)
            reading.cancel()
            self._free.append(slot)
        for number in numbers:
            if number not in self._ahead:
                reading = self._reader.submit(self._free[-1].read, self._groups[number])
                self._ahead[number] = self._free.pop(), reading


def _leave_processors_alone() -> None:
    """Limit torch to this thread here, because converting and merging would take processors from the layers."""
    torch.get_num_threads()  # the first call sets the number of threads, so it comes before the limit
    threadpool_limits(1, user_api="openmp")


class _Slot:
    """A slot is a buffer for one layer on the CPU. If the device is another, it is pinned and has a twin there."""

    def __init__(self, size: int, staging: Tensor, device: torch.device) -> None:
        self._staging = staging  # both slots share it, because one thread reads for both
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
        """Note that computing with the weights has started, so that the next read waits for its end."""
        if self._stream is not None:
            self._computed = torch.cuda.current_stream(self._device).record_event()
