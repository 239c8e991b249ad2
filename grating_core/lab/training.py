"""This module trains a student, and saves the state so that training can continue after an interruption."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as format_tensors
from torch import Tensor, nn

from grating_core.errors import GratingError
from grating_core.files.reading import parse_json
from grating_core.files.writing import replacing, require_room
from grating_core.lab.student import Loss, Student

SECONDS_BETWEEN_STATES = 60.0
_WARM_UP = 0.05  # share of the steps
_BETAS = (0.9, 0.95)
_LARGEST_GRADIENT = 1.0


class Training:
    """This class trains a student. Random numbers depend only on the seed and the number of the step.

    Args:
        student: The student.
        settings: Everything that the result depends on, as JSON values. Training reads ``steps``,
            ``learning_rate`` and ``seed``; it refuses a state of other settings.
        state: File of the state.

    Attributes:
        step: Number of steps done.
        before: The dense model's perplexity on the held-out text, and the untrained student's loss there.
    """

    def __init__(self, student: Student, settings: dict[str, Any], state: Path) -> None:
        self.step = 0
        self.before: tuple[float, Loss] = (math.nan, Loss(math.nan, math.nan))
        self._student, self._settings, self._state = student, settings, state
        self._changes = student.changes()
        self._optimizer = torch.optim.AdamW(self._changes.values(), betas=_BETAS, weight_decay=0.0)

    def run(self, windows: Tensor, batch: int, bar: Any) -> None:
        """Train to the end.

        Args:
            windows: Token ids, int64 ``[W, T]``.
            batch: Number of windows of a step.
            bar: Progress bar, which is updated after every step.

        Raises:
            GratingError: Training diverged.
            StorageError: The state cannot be written.
        """
        steps, seen = self._settings["steps"], 0
        order = islice(_order(len(windows), self._settings["seed"]), self.step * batch, None)
        saved = began = time.perf_counter()
        while self.step < steps:
            divergence = self._student.learn(windows[list(islice(order, batch))])
            if not math.isfinite(divergence):
                raise GratingError(
                    f"training diverged in step {self.step + 1} of {steps}: begin again, in another output, with "
                    f"a lower learning_rate than {self._settings['learning_rate']}"
                )
            self._change()
            now, seen = time.perf_counter(), seen + batch * windows.shape[1]
            bar.set_postfix_str(f"KL {divergence:.3f}, {seen / (now - began):,.0f} tokens/s", refresh=False)
            bar.update()
            if now - saved > SECONDS_BETWEEN_STATES or self.step == steps:
                self.save()
                saved = now

    def _change(self) -> None:
        steps, warm_up = self._settings["steps"], _WARM_UP * self._settings["steps"]
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / steps))
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings["learning_rate"] * min(cosine, (self.step + 1) / max(1, warm_up))
        nn.utils.clip_grad_norm_(self._changes.values(), _LARGEST_GRADIENT)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1

    def require_room(self) -> None:
        """Check, before anything is computed, that the disk has room for two copies of the state.

        Raises:
            StorageError: The disk does not have this room.
        """
        most = 3 * sum(change.nbytes for change in self._changes.values())  # each change has two moments of AdamW
        require_room(self._state, most if self._state.exists() else 2 * most)

    def save(self) -> None:
        """Write the state for :meth:`resume`. The caller keeps other processes away.

        Raises:
            StorageError: The state cannot be written.
        """
        tensors = {name: change.detach() for name, change in self._changes.items()}
        for name, change in self._changes.items():
            for moment, value in self._optimizer.state.get(change, {}).items():
                tensors[f"{name}.{moment}"] = value
        dense, pruned = self.before
        description = {
            "step": str(self.step),
            "settings": json.dumps(self._settings),
            "before": json.dumps({"dense": dense, **asdict(pruned)}),
        }
        data = format_tensors(tensors, description)
        with replacing(self._state, len(data), private=True) as file:  # the state depends on the text
            file.write(data)

    def resume(self) -> bool:
        """Continue from a saved state, and return whether there was one.

        Raises:
            ValueError: The state belongs to other settings, or is damaged.
        """
        if not self._state.is_file():
            return False
        try:
            with safe_open(self._state, "pt") as file:
                description = file.metadata()
                settings, before = (dict(parse_json(description[name])) for name in ("settings", "before"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            self.before = (before.pop("dense"), Loss(**before))
            self.step = int(description["step"])
            others = [name for name, own in self._settings.items() if settings.get(name) != own]
            if not others:
                self._take(tensors)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self._state} cannot be read ({error!r}): delete it and begin again") from error
        if others:
            known = [f"{name}={settings.get(name)}" for name in others if name not in ("model", "text", "shares")]
            raise ValueError(
                f"output={str(self._state.parent)!r} holds the state of training with another {', '.join(others)}"
                f"{' (' + ', '.join(known) + ')' if known else ''}: call it as before to go on, or name "
                f"another directory"
            )
        return True

    @torch.no_grad()
    def _take(self, tensors: dict[str, Tensor]) -> None:
        """Copy changes and moments from a state. A tensor of another shape raises a ``RuntimeError``."""
        for name, change in self._changes.items():
            change.copy_(tensors.pop(name))
        for name, tensor in tensors.items():
            change_name, moment = name.rsplit(".", 1)
            # The count of steps stays on the CPU, where AdamW expects it.
            place = "cpu" if moment == "step" else self._student.module.device
            self._optimizer.state[self._changes[change_name]][moment] = tensor.to(place)


def _order(count: int, seed: int) -> Iterator[int]:
    """Yield the numbers below ``count`` in random order, again and again."""
    chance = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=chance).tolist()
