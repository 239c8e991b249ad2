"""Run by test_killed.py: does something again and again, killed at random moments, and prints what came of it."""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from grating_core import Reranker, StreamedCausalLM
from grating_core.lab import training
from grating_core.lab.distill import distill as distil_adapter
from grating_core.models.bundled import bundled_model
from tests.core.conftest import WORDS
from tests.core.parity import random_text

SOURCE = random.Random(3)
TEXTS = [random_text(40, SOURCE, WORDS) for _ in range(60)]


def convert(model: Path, place: Path) -> None:
    bundled_model("bundled:ms-marco-minilm-l12")


def calibrate(model: Path, place: Path) -> None:
    with Reranker.from_pretrained(model, dtype="float32") as reranker:
        reranker.calibrate(TEXTS, top_k=2, candidates=10, requests=25)


def write_columns(model: Path, place: Path) -> None:
    StreamedCausalLM.from_pretrained(model, dtype="float32", mlp_density=0.5).close()


def distill(model: Path, place: Path) -> None:
    training.SECONDS_BETWEEN_STATES = -1.0
    distil_adapter(
        model, TEXTS, place / "adapter", rank=8, steps=12, tokens_per_step=64, window=16, dtype="float32"
    )


JOBS: dict[str, Callable[[Path, Path], None]] = {
    "convert": convert, "calibrate": calibrate, "columns": write_columns, "distill": distill,
}  # fmt: skip


def start(job: str, model: Path, place: Path) -> int:
    child = os.fork()
    if not child:
        status = 1
        try:
            JOBS[job](model, place)
            status = 0
        finally:
            os._exit(status)
    return child


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(path: Path) -> bytes:
    """What a file holds; the metadata of a safetensors file come in any order."""
    data = path.read_bytes()
    if path.suffix != ".safetensors" or path.name.startswith("."):
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]


def files(place: Path) -> dict[str, str]:
    """The digests of all files, which tell what is there."""
    return {
        str(path.relative_to(place)): hashlib.sha256(content(path)).hexdigest()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


def clear(place: Path) -> None:
    """Remove what was made, and leave what the dead have left."""
    for path in sorted(place.rglob("*"), reverse=True):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(place).parts):
            path.unlink()
    for path in (place / "models", place / "adapter"):
        for inner in path.glob("[!.]*"):
            if inner.is_dir():
                shutil.rmtree(inner)


def main(job: str, model: Path, place: Path, times: int) -> dict[str, object]:
    os.environ["GRATING_CACHE"] = str(place)
    began = time.perf_counter()
    assert wait(start(job, model, place)) == 0
    seconds, expected = time.perf_counter() - began, files(place)
    chance, killed, half, wrong = random.Random(0), 0, 0, []
    while killed < times:
        clear(place)
        child = start(job, model, place)
        moment = chance.uniform(0, seconds)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        if wait(child) != -signal.SIGKILL:  # it was quicker
            seconds *= 0.9
            continue
        killed += 1
        there = files(place)
        half += bool(there) and there != expected
        if there != expected:  # a finished adapter is not distilled again
            again = wait(start(job, model, place))
            if again or files(place) != expected:
                wrong.append(
                    {"moment": moment, "status": again, "before": sorted(there), "after": sorted(files(place))}
                )
    return {"seconds": seconds, "killed": killed, "half": half, "wrong": wrong, "files": sorted(expected)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
