"""Run by test_closed_cache.py as root: does something as other users, and prints what each of them saw."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from grating_core import GratingError, Reranker
from grating_core.cli.commands import app
from grating_core.lens import recalibrate as recalibration


def use(model: str) -> None:
    """Load twice, with something to be kept of each time."""
    recalibration.IDLE = 0.0
    for _ in range(2):
        with Reranker.from_pretrained(model, pruning="cluster", recalibrate=1.0, dtype="float32") as reranker:
            found = reranker.rerank("w1 w2", ["w1", "w2 w3", "w9", "w4"], top_k=2)
            stop = time.monotonic() + 20
            while not reranker.recalibration.requests and time.monotonic() < stop:
                time.sleep(0.01)
            print([ranked.index for ranked in found.ranking], reranker.recalibration.requests)


def doctor(model: str) -> None:
    for command in ("doctor", "models"):
        app([command], standalone_mode=False)


def convert(model: str) -> None:
    try:
        Reranker.from_pretrained("bundled:ms-marco-minilm-l12")
    except GratingError as error:
        print(type(error).__name__, error)


ACTIONS: dict[str, Callable[[str], None]] = {"use": use, "doctor": doctor, "convert": convert}


def seen(
    action: str, model: str, user: int, environment: dict[str, str | None], directory: str
) -> dict[str, object]:
    """What somebody sees who does this."""
    files = [os.memfd_create(name) for name in ("stdout", "stderr")]
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 1
        try:
            for number, file in enumerate(files, 1):
                os.dup2(file, number)
            os.chdir(directory)
            for name, value in environment.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            ACTIONS[action](model)
            status = 0
        except BaseException:
            logging.exception("it failed")
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    texts = [os.pread(file, 1 << 20, 0).decode() for file in files]
    for file in files:
        os.close(file)
    return {"status": status, "stdout": texts[0], "stderr": texts[1]}


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(message)s")
    os.environ["COLUMNS"] = "500"
    place, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    # All modules are loaded now: others may not be allowed to read them.
    sys.stdout = sys.stderr
    use(str(place / "model"))
    doctor("")
    sys.stdout = sys.__stdout__
    print(
        json.dumps(
            {
                case: {
                    action: seen(action, str(place / "model"), user, environment, str(place / "work"))
                    for action in ACTIONS
                }
                for case, (user, environment) in cases.items()
            }
        )
    )
