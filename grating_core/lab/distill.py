"""LoRA recovery trains an adapter with which a pruned model predicts what the dense one does (arXiv 2412.01380).

Teacher and student are one model in memory. Each layer has two MLPs with the same weights: the teacher's is dense,
and the student's is pruned and has low-rank changes. The one that is in place computes. Only the changes learn, on
any text, from the distance between the student's and the teacher's next tokens.
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

from grating_core.arguments import check_density, whole_number
from grating_core.errors import UnsupportedModelError
from grating_core.files.places import expanded
from grating_core.lab.decoders import load_decoder
from grating_core.lab.output import STATE, check_output, write_adapter, writing_alone
from grating_core.lab.student import Loss, Student
from grating_core.lab.training import Training
from grating_core.models.directory import find_model, is_gguf
from grating_core.models.hub import Hub
from grating_core.models.identity import fingerprint
from grating_core.models.placement import choose_device, choose_dtype

_HELD_OUT = 0.05  # share of the windows that is held out
_MOST_HELD_OUT = 32  # windows that are held out at most


@dataclass(frozen=True)
class Distilled:
    """This class holds a trained adapter, and says how much it recovers.

    Attributes:
        directory: Directory of the adapter, in PEFT's form.
        dense: Perplexity of the dense model on the held-out text.
        pruned: Loss of the pruned model before training, on the held-out text.
        recovered: Loss of the pruned model with the adapter, on the held-out text.
        trained: Number of tokens in training; a token that was seen twice counts twice.
        held_out: Number of tokens of the held-out text.
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

    The whole model is in memory, and each token is pruned on its own. Training saves its state to ``output`` every
    minute. After an interruption the same call continues from that state, to the same result.

    Args:
        model: A language model with gated MLPs: a hub id or a local directory, as safetensors.
        texts: Any texts, best of the kind that the model will read and write. No answers are needed.
        output: Directory of the adapter. It is empty, does not exist yet, or holds the state of the same call.
        mlp_density: Share of the MLPs' weights that a token uses, above 0 and at most 1. Use the adapter with the
            same density.
        rank: Rank of the changes. A higher rank recovers more after a long training.
        learning_rate: Highest learning rate, after the warm-up.
        steps: Number of times that the adapter is changed.
        tokens_per_step: Number of tokens of each step, rounded to whole windows.
        window: Number of tokens that the model sees at once.
        seed: Seed of the choice of held-out text, of the order of the text and of the first weights.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``; None takes the best device of this machine.
        dtype: ``"auto"``, ``"bfloat16"`` or ``"float32"``. The adapter itself is float32.
        revision: Branch, tag or commit of the model on the hub; None for the newest. A local directory ignores
            this and the next three.
        token: Access token for the hub; None or True for the one of ``hf auth login`` or ``HF_TOKEN``, False for
            none.
        cache_dir: Directory of the hub's files; None for the hub's own place.
        local_files_only: Whether to use only files that are in this directory already.
        show_progress: Whether to show progress bars on standard error.

    Raises:
        ValueError: An argument is not usable, the text is too short, or ``output`` holds something else.
        ModelNotFoundError: The model is missing or damaged.
        UnsupportedModelError: The model is not a language model with gated MLPs.
        GratingError: Training diverged.
        StorageError: ``output`` cannot be written.
    """
    check_density(mlp_density)
    for name, number in (("rank", rank), ("steps", steps), ("tokens_per_step", tokens_per_step)):
        whole_number(name, number)
    whole_number("window", window, least=2)  # one token to read, and one to predict
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate={learning_rate} must be a number above 0")
    place = choose_device(device)
    chosen, _ = choose_dtype(dtype, place)
    if chosen in (torch.float16, torch.int8):
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
    """Join all texts, with an end-of-text token after each, and cut them into windows, int64 ``[W, window]``."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # All texts in one call, because the tokenizer then takes every processor.
    each = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    ids = [token for own in each for token in (*own, *end)]
    if len(ids) < (needed := (batch + 1) * window):
        raise ValueError(
            f"the texts have {len(ids):,} tokens, and at least {needed:,} are needed: {batch * window:,} for a "
            f"step and {window:,} to hold out. Give more text, or a smaller window and tokens_per_step"
        )
    return torch.tensor(ids[: len(ids) // window * window]).view(-1, window)


def hold_out(windows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Divide windows ``[W, T]`` at random into held-out windows and windows for training."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    count = min(_MOST_HELD_OUT, max(1, round(_HELD_OUT * len(windows))))
    return windows[order[:count]], windows[order[count:]]
