"""LoRA recovery: an adapter with which a pruned model says what the dense one says (arXiv 2412.01380).

Teacher and student are one model in memory. Each layer has two MLPs over the same weights, the dense one and one
that is pruned and has low-rank changes; which of them is in its place says who computes. Only the changes learn,
on any text, from how far the student's next tokens are from the teacher's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grating_core.arguments import whole_number
from grating_core.columns.allocation import check_density
from grating_core.errors import UnsupportedModelError
from grating_core.files.places import expanded
from grating_core.lab.decoders import load_decoder
from grating_core.lab.output import STATE, check_output, write_adapter, writing_alone
from grating_core.lab.student import Loss, Student
from grating_core.lab.training import Training
from grating_core.models.directory import find_model
from grating_core.models.gguf import is_gguf
from grating_core.models.hub import Hub
from grating_core.models.identity import fingerprint
from grating_core.models.placement import choose_device, choose_dtype

_HELD_OUT = 0.05  # of the windows
_MOST_HELD_OUT = 32  # windows


@dataclass(frozen=True)
class Distilled:
    """An adapter and what it recovers.

    Attributes:
        directory: Directory of the adapter, as PEFT saves one.
        dense: Perplexity of the dense model on the text that is held out.
        pruned: Loss of the pruned model before training.
        recovered: Loss of the pruned model with the adapter.
        trained: Tokens that it was trained on; those seen twice count twice.
        held_out: Tokens that the figures above are for.
    """

    directory: Path
    dense: float
    pruned: Loss
    recovered: Loss
    trained: int
    held_out: int


def distill(
    model: str | Path,
    texts: Sequence[str],
    output: str | Path,
    *,
    mlp_density: float = 0.5,
    rank: int = 32,
    learning_rate: float = 1e-3,
    steps: int = 400,
    tokens_per_step: int = 1024,
    window: int = 256,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool | None = False,
    show_progress: bool = False,
) -> Distilled:
    """Train an adapter that makes up for pruning.

    All of the model is in memory, and pruned per token. What training has reached is written to ``output`` every
    minute: after an interruption the same call goes on from there, to the same result.

    Args:
        model: A language model with gated MLPs: hub id or local directory, as safetensors.
        texts: Any text, best of the kind that the model will read and write. No answers are needed.
        output: Directory for the adapter, empty or not there yet, or with the state of the same call.
        mlp_density: Share of the MLPs' weights that a token uses, as it will be given with the adapter.
        rank: Rank of the changes. More recover more, of a long training.
        learning_rate: Highest learning rate, after the warm-up.
        steps: Number of times that the adapter is changed.
        tokens_per_step: Tokens that a change is computed from, rounded to whole windows.
        window: Tokens that the model sees at once.
        seed: Seed of what is held out, of the order of the text and of the first weights.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``; None takes the best that is there.
        dtype: ``"auto"``, ``"bfloat16"`` or ``"float32"``. The adapter itself is float32.
        revision: Branch, tag or commit of the model on the hub; None for the newest. This and the next three
            are ignored for a local directory.
        token: What proves to the hub who asks; None or True for the one of ``hf auth login`` or ``HF_TOKEN``,
            False for none.
        cache_dir: Where the hub's files are kept; None for the hub's own place.
        local_files_only: Use what is kept there already, without asking the hub.
        show_progress: Show progress bars on standard error.

    Raises:
        ValueError: An argument makes no sense, the text is too short, or ``output`` holds something else.
        ModelNotFoundError: The model is not there, or damaged.
        UnsupportedModelError: It is no language model with gated MLPs.
        GratingError: Training diverged.
        StorageError: ``output`` cannot be written.
    """
    check_density(mlp_density)
    for name, number in (("rank", rank), ("steps", steps), ("tokens_per_step", tokens_per_step)):
        whole_number(name, number)
    whole_number("window", window, least=2)  # a token, and the one that is predicted
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate={learning_rate} is not a number above 0")
    place = choose_device(device)
    chosen, _ = choose_dtype(dtype, place)
    if chosen == torch.float16:
        raise ValueError(f"dtype={dtype!r}: gradients vanish in it; use 'bfloat16' or 'float32'")
    hub = Hub(revision, token, cache_dir, local_files_only)
    batch = max(1, round(tokens_per_step / window))
    output = expanded(output)
    check_output(output)
    directory = find_model(str(model), hub=hub, show_progress=show_progress)
    if is_gguf(directory):
        raise UnsupportedModelError(f"{directory} is quantised; distil the model as safetensors")
    module, tokenizer = load_decoder(directory, place, chosen)
    windows = _windows(texts, tokenizer, window, batch)
    student = Student(module, mlp_density, rank, seed)
    settings: dict[str, Any] = {
        "model": fingerprint(directory),
        "text": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "mlp_density": mlp_density,
        "shares": [[shares.inputs, shares.products] for shares in student.shares],
        "rank": rank,
        "learning_rate": learning_rate,
        "steps": steps,
        "tokens_per_step": batch * window,
        "window": window,
        "seed": seed,
        "dtype": str(module.dtype).removeprefix("torch."),
    }
    held_out, windows = hold_out(windows, seed)
    training = Training(student, settings, output / STATE)
    with writing_alone(output):
        training.require_room()
        if not training.resume():
            training.before = student.measure(held_out)
            training.save()
        with tqdm(
            total=steps, initial=training.step, unit="step", desc="Distilling", disable=not show_progress
        ) as bar:
            training.run(windows, batch, bar)
        _, recovered = student.measure(held_out)
        write_adapter(output, str(model), mlp_density, rank, student.changes())
    dense, pruned = training.before
    return Distilled(output, dense, pruned, recovered, steps * batch * window, held_out.numel())


def _windows(texts: Sequence[str], tokenizer: Any, window: int, batch: int) -> Tensor:
    """Return all texts one after the other, an end of text behind each, cut into int64 ``[W, window]``."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [
        token
        for text in texts
        for token in (*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *end)
    ]
    if len(ids) < (needed := (batch + 1) * window):
        raise ValueError(
            f"the texts have {len(ids):,} tokens, and at least {needed:,} are needed: {batch * window:,} for a "
            f"step, {window:,} that are held out. Give more text, or less for window and tokens_per_step"
        )
    return torch.tensor(ids[: len(ids) // window * window]).view(-1, window)


def hold_out(windows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Divide windows ``[W, T]`` by chance into those that are held out and those that are trained on."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    count = min(_MOST_HELD_OUT, max(1, round(_HELD_OUT * len(windows))))
    return windows[order[:count]], windows[order[count:]]
