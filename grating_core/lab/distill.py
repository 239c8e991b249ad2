"""LoRA recovery: an adapter with which a pruned model says what the dense one says (arXiv 2412.01380).

Teacher and student are one model in memory. Each layer has two MLPs over the same weights, the dense one and one
that is pruned and has low-rank changes; which of them is in its place says who computes. Only the changes learn,
on any text, from how far the student's next tokens are from the teacher's.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as format_tensors
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

from grating_core.columns.allocation import allocate, check_density
from grating_core.columns.masks import MaskedMlp, find_gated_mlp
from grating_core.errors import GratingError, ModelNotFoundError, StorageError, UnsupportedModelError
from grating_core.files.locks import locked, replace_file
from grating_core.files.places import expanded, is_there
from grating_core.files.reading import parse_json
from grating_core.files.writing import replacing, require_room, storing, unfinished_of
from grating_core.lab.lowrank import PARTS, Divergence, LowRankMlp, TrainedMlp
from grating_core.models.directory import find_model, read_config
from grating_core.models.gguf import is_gguf
from grating_core.models.identity import fingerprint
from grating_core.models.loading import StoredCausalLM
from grating_core.models.placement import choose_device, choose_dtype

_STATE = "unfinished.safetensors"
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_AT_ONCE = 1024  # tokens that go through the model together: more take memory and were no faster
_HELD_OUT = 0.05  # of the windows
_MOST_HELD_OUT = 32  # windows
_WARM_UP = 0.05  # of the steps
_BETAS = (0.9, 0.95)
_LARGEST_GRADIENT = 1.0
_SECONDS_BETWEEN_STATES = 60.0


@dataclass(frozen=True)
class Loss:
    """What pruning costs on the text that is held out.

    Attributes:
        perplexity: Of the pruned model.
        divergence: KL of its next tokens from the dense model's, in nats a token.
    """

    perplexity: float
    divergence: float


@dataclass(frozen=True)
class Distilled:
    """An adapter and what it recovers.

    Attributes:
        directory: Where it is, as PEFT saves adapters.
        dense: Perplexity of the dense model on the text that is held out.
        pruned: Of the pruned model before training.
        recovered: Of the pruned model with the adapter.
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
    device: str | None = None,
    dtype: str = "auto",
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
        rank: Of the changes. More recover more, of a long training.
        learning_rate: Its highest value, after the warm-up.
        steps: How often the adapter is changed.
        tokens_per_step: Tokens that a change is computed from, rounded to whole windows.
        window: Tokens that the model sees at once.
        seed: Of what is held out, of the order of the text and of the first weights.
        device: As in :meth:`Reranker.from_pretrained`.
        dtype: ``"auto"``, ``"bfloat16"`` or ``"float32"``. The adapter itself is float32.
        show_progress: Show a progress bar on standard error.

    Raises:
        ValueError: An argument makes no sense, the text is too short, or ``output`` holds something else.
        ModelNotFoundError: The model is not there, or damaged.
        UnsupportedModelError: It is no language model with gated MLPs.
        GratingError: Training diverged.
        StorageError: ``output`` cannot be written.
    """
    check_density(mlp_density)
    _check_numbers(rank=rank, steps=steps, tokens_per_step=tokens_per_step, window=window)
    if window < 2:
        raise ValueError(f"window={window} is too small: a token to predict the next one from makes 2")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate={learning_rate} is not a number above 0")
    batch = max(1, round(tokens_per_step / window))
    output = expanded(output)
    _check_output(output)
    directory, module, tokenizer = _load(str(model), device, dtype, show_progress)
    windows = _windows(texts, tokenizer, window, batch)
    student = _Student(module, mlp_density, rank, seed)
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
    held_out, windows = _divide(windows, seed)
    training = _Training(student, settings, output)
    with _as_output(output), _alone(output):
        training.require_room()
        if not training.resume():
            training.before = student.measure(held_out)
            training.save()
        with tqdm(
            total=steps, initial=training.step, unit="step", desc="Distilling", disable=not show_progress
        ) as bar:
            training.run(windows, batch, bar)
        _, recovered = student.measure(held_out)
        dense, pruned = training.before
        _write_adapter(output, str(model), mlp_density, rank, student.changes())
    return Distilled(output, dense, pruned, recovered, steps * batch * window, held_out.numel())


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number!r} is not a whole number of at least 1")


def _check_output(output: Path) -> None:
    """Refuse what is not ours."""
    if not is_there(output):
        return
    if not output.is_dir():
        raise ValueError(f"output={str(output)!r} is a file; name a directory")
    # What a process that was killed left half-written of our files is removed when they are written.
    with storing(output):
        there = {unfinished_of(path.name) or path.name for path in output.iterdir()}
    # A process that ended while it wrote the adapter leaves all three.
    if others := there - ({_STATE, _WEIGHTS, _CONFIG} if _STATE in there else set()):
        raise ValueError(
            f"output={str(output)!r} already holds {', '.join(sorted(others)[:3])}; name a new directory, "
            f"or an empty one"
        )


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keep other processes from writing to the same directory, and leave none if nothing is in it."""
    made = not is_there(output)
    try:
        with locked(output / _STATE, wait=False) as alone:
            if not alone:
                raise ValueError(
                    f"output={str(output)!r} is being written by another process: wait for it, or name another "
                    f"directory"
                )
            yield
    finally:
        if made:
            with suppress(OSError):
                output.rmdir()


def _load(name: str, device: str | None, dtype: str, show_progress: bool) -> tuple[Path, Any, Any]:
    """The directory, the module and the tokenizer of a language model."""
    place = choose_device(device)
    chosen, _ = choose_dtype(dtype, place)
    if chosen == torch.float16:
        raise ValueError(f"dtype={dtype!r}: gradients vanish in it; use 'bfloat16' or 'float32'")
    directory = find_model(name, show_progress=show_progress)
    if is_gguf(directory):
        raise UnsupportedModelError(f"{directory} is quantised; distil the model as safetensors")
    _, family = read_config(directory)
    attention = "sdpa" if family.module_class._supports_sdpa else "eager"
    stored = StoredCausalLM(directory, device=place, dtype=chosen, attention=attention)
    stored.load(None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever damaged files lead to
        raise ModelNotFoundError(f"the tokenizer in {directory} cannot be read: {error}") from error
    return directory, stored.module, tokenizer


def _windows(texts: Sequence[str], tokenizer: Any, window: int, batch: int) -> Tensor:
    """All texts one after the other, an end of text behind each, cut into ``[N, window]``."""
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


def _divide(windows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """What is held out, and what is trained on."""
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    count = min(_MOST_HELD_OUT, max(1, round(_HELD_OUT * len(windows))))
    return windows[order[:count]], windows[order[count:]]


def _order(count: int, seed: int) -> Iterator[int]:
    """Numbers below ``count`` in random order, again and again."""
    chance = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=chance).tolist()


class _Student:
    """A model, dense and pruned at once."""

    def __init__(self, module: Any, mlp_density: float, rank: int, seed: int) -> None:
        self.module = module
        self.layers = module.model.layers
        self.dense = [find_gated_mlp(layer) for layer in self.layers]
        self.shares = allocate(mlp_density, len(self.dense))
        chance = torch.Generator().manual_seed(seed)
        self.adapted = [LowRankMlp(mlp, rank, chance) for mlp in self.dense]
        self.trained = [TrainedMlp(mlp, shares) for mlp, shares in zip(self.adapted, self.shares, strict=True)]
        self.exact = [MaskedMlp(mlp, shares) for mlp, shares in zip(self.adapted, self.shares, strict=True)]
        self.divergence = Divergence(self.head, len(module.lm_head.weight), module.device)

    def changes(self) -> dict[str, nn.Parameter]:
        """What learns, by the names that PEFT has for it."""
        return {
            f"base_model.model.model.layers.{number}.mlp.{part}.{name}.weight": getattr(mlp, part).get_parameter(
                own
            )
            for number, mlp in enumerate(self.adapted)
            for part in PARTS
            for name, own in (("lora_A", "down"), ("lora_B", "up"))
        }

    def head(self, hidden: Tensor) -> Tensor:
        """The logits for last hidden states."""
        logits: Tensor = self.module.lm_head(hidden)
        cap = getattr(self.module.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def hidden(self, mlps: Sequence[nn.Module], ids: Tensor) -> Tensor:
        """The last hidden states ``[N, D]``, computed with these MLPs."""
        for layer, mlp in zip(self.layers, mlps, strict=True):
            layer.mlp = mlp
        states: Tensor = self.module.model(ids.to(self.module.device), use_cache=False).last_hidden_state
        return states.flatten(0, 1)

    def learn(self, ids: Tensor) -> float:
        """Add the gradients of the mean divergence for ``[B, T]``, and return it."""
        total = 0.0
        for some in torch.split(ids, max(1, _AT_ONCE // ids.shape[1])):
            with torch.no_grad():
                teacher = self.hidden(self.dense, some)
            student = self.hidden(self.trained, some)
            share = len(some) / len(ids)
            divergence, gradient = self.divergence(student, teacher)
            torch.autograd.backward(student, share * gradient)
            total += share * divergence
        return total

    @torch.inference_mode()
    def measure(self, windows: Tensor) -> tuple[float, Loss]:
        """The perplexity of the dense model, and what pruning costs."""
        dense = pruned = divergence = 0.0
        for ids in windows:
            pairs = (self.hidden(mlps, ids[None])[:-1] for mlps in (self.dense, self.exact))
            teacher, student = (self.head(hidden).float().log_softmax(-1) for hidden in pairs)
            following = ids[1:, None].to(teacher.device)
            dense -= float(teacher.gather(-1, following).mean()) / len(windows)
            pruned -= float(student.gather(-1, following).mean()) / len(windows)
            divergence += float((teacher.exp() * (teacher - student)).sum(-1).mean()) / len(windows)
        return math.exp(dense), Loss(math.exp(pruned), divergence)


class _Training:
    """A student's way to the teacher, written down so that it can be gone on.

    What is random depends on the seed and the number of the step alone.
    """

    def __init__(self, student: _Student, settings: dict[str, Any], output: Path) -> None:
        self.student = student
        self.settings = settings
        self.output = output
        self.step = 0
        self.before: tuple[float, Loss] = (math.nan, Loss(math.nan, math.nan))
        self._changes = student.changes()
        self._optimizer = torch.optim.AdamW(self._changes.values(), betas=_BETAS, weight_decay=0.0)

    def run(self, windows: Tensor, batch: int, bar: Any) -> None:
        """Train to the end."""
        steps, seen = self.settings["steps"], 0
        order = islice(_order(len(windows), self.settings["seed"]), self.step * batch, None)
        saved = began = time.perf_counter()
        while self.step < steps:
            divergence = self.student.learn(windows[list(islice(order, batch))])
            if not math.isfinite(divergence):
                raise GratingError(
                    f"training diverged in step {self.step + 1} of {steps}: begin anew, in another output, with a "
                    f"lower learning_rate than {self.settings['learning_rate']}"
                )
            self._change()
            now, seen = time.perf_counter(), seen + batch * windows.shape[1]
            bar.set_postfix_str(f"KL {divergence:.3f}, {seen / (now - began):,.0f} tokens/s", refresh=False)
            bar.update()
            if now - saved > _SECONDS_BETWEEN_STATES or self.step == steps:
                self.save()
                saved = now

    def _change(self) -> None:
        steps, warm_up = self.settings["steps"], _WARM_UP * self.settings["steps"]
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / steps))
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings["learning_rate"] * min(cosine, (self.step + 1) / max(1, warm_up))
        nn.utils.clip_grad_norm_(self._changes.values(), _LARGEST_GRADIENT)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1

    def save(self) -> None:
        """Write all that :meth:`resume` needs."""
        tensors = {name: change.detach() for name, change in self._changes.items()}
        for name, change in self._changes.items():
            for moment, value in self._optimizer.state.get(change, {}).items():
                tensors[f"{name}.{moment}"] = value
        dense, pruned = self.before
        description = {
            "step": str(self.step),
            "settings": json.dumps(self.settings),
            "before": json.dumps({"dense": dense, **asdict(pruned)}),
        }
        data = format_tensors(tensors, description)
        # It is derived from the text. :func:`_alone` has it locked.
        with replacing(self.output / _STATE, len(data), private=True) as file:
            file.write(data)

    def require_room(self) -> None:
        """Try whether there is room for the state, twice while it is written anew, before anything is computed."""
        most = 3 * sum(change.nbytes for change in self._changes.values())  # with AdamW's two moments
        there = (self.output / _STATE).exists()
        require_room(self.output / _STATE, most if there else 2 * most)

    def resume(self) -> bool:
        """Go on where another process stopped, if one did.

        Raises:
            ValueError: The state is of another call, or damaged.
        """
        path = self.output / _STATE
        if not path.is_file():
            return False
        try:
            with safe_open(path, "pt") as file:
                description = file.metadata()
                settings, before = (dict(parse_json(description[name])) for name in ("settings", "before"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            self.before = (before.pop("dense"), Loss(**before))
            self.step = int(description["step"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from error
        self._compare(settings)
        try:
            with torch.no_grad():
                for name, change in self._changes.items():
                    change.copy_(tensors.pop(name))
            for name, tensor in tensors.items():
                change, moment = name.rsplit(".", 1)
                # Its count of steps stays on the CPU, where AdamW looks for it.
                place = "cpu" if moment == "step" else self.student.module.device
                self._optimizer.state[self._changes[change]][moment] = tensor.to(place)
        except (KeyError, ValueError, RuntimeError) as error:  # RuntimeError: of another shape
            raise _damaged(path, error) from error
        return True

    def _compare(self, theirs: dict[str, Any]) -> None:
        others = [name for name, value in self.settings.items() if theirs.get(name) != value]
        if others:
            known = [f"{name}={theirs.get(name)}" for name in others if name not in ("model", "text", "shares")]
            raise ValueError(
                f"output={str(self.output)!r} holds the state of training with another {', '.join(others)}"
                f"{' (' + ', '.join(known) + ')' if known else ''}: call it as before to go on, or name "
                f"another directory"
            )


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read ({error!r}): delete it and begin anew")


def _write_adapter(
    output: Path, model: str, mlp_density: float, rank: int, changes: dict[str, nn.Parameter]
) -> None:
    """Put the adapter in the place of the state. Its description goes last: without it there is no adapter."""
    tensors = {name: change.detach().contiguous() for name, change in changes.items()}
    data = format_tensors(tensors, {"format": "pt", "mlp_density": str(mlp_density)})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": list(PARTS),
        "bias": "none",
        "inference_mode": True,
    }

    replace_file(output / _WEIGHTS, data)
    replace_file(output / _CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    (output / _STATE).unlink()


@contextmanager
def _as_output(output: Path) -> Iterator[None]:
    """Let an error of writing name the argument, and say how to go on."""
    try:
        yield
    except StorageError as error:
        raise StorageError(
            f"output={str(output)!r} cannot be written ({error}). What was reached before is kept: when there is "
            f"room, the same call goes on from it"
        ) from error
