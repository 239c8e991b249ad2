"""This is the command ``grating bench``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from grating_core.cli.options import HUB, InputOptions, Takes
from grating_core.cli.output import err, show, tell, write_json
from grating_core.cli.tables import plain_table
from grating_core.lab.peers import (
    PEERS,
    PRUNED,
    SENTENCE_TRANSFORMERS,
    UNPRUNED,
    Job,
    Measured,
    agreement,
    installed,
    measure,
)
from grating_core.settings import RerankSettings


def bench(
    settings: Annotated[RerankSettings, Takes(("dtype", "max_length", "memory_budget", *HUB))],
    corpus: Path,
    how_stored: InputOptions,
    queries: Path | None = None,
    candidates: int = 20,
    top_k: int = 5,
    requests: int = 5,
    rounds: int = 5,
    threads: int | None = None,
    seed: int = 0,
    as_json: bool = False,
) -> None:
    """Compare time, memory and top K with sentence-transformers and OpenVINO on your own texts.

    Args:
        corpus: The file of documents like yours.
        queries: The file of queries. The default makes them of leading sentences.
        requests: The number of requests to compute.
        rounds: How often each request is timed. Medians are shown.
        threads: The number of threads of each system. The default is what torch chooses.
        seed: The seed of the choice of requests.
    """
    documents = how_stored.documents(corpus)
    asked = None if queries is None else how_stored.documents(queries)
    with err.status("Preparing ..."):
        import torch

        from grating_core.lens.requests import make_requests
        from grating_core.models.directory import read_config
        from grating_core.reranker import Reranker

        settings = replace(settings, device="cpu")
        made = make_requests(documents, asked, candidates=candidates, count=requests, seed=seed, fewest=1)
        with Reranker.open(settings) as reranker:
            directory, window = reranker.model_path, reranker.max_length
        family = read_config(directory).family
        job = Job(
            directory=str(directory),
            requests=[(request.query, list(request.documents)) for request in made],
            top_k=top_k,
            rounds=rounds,
            threads=threads or torch.get_num_threads(),
            max_length=window,
            settings=settings,
        )
    peers = [] if family.causal else [peer for peer in PEERS if installed(peer)]
    found = measure(job, [*peers, UNPRUNED, PRUNED], show_progress=True)
    if as_json:
        write_json(_as_json(job, found))
    else:
        _print(job, found)
    if family.causal:
        tell("The others do not know the prompts of language models, so grating is compared with itself.")
    for peer in PEERS if not family.causal else ():
        if not installed(peer):
            tell(f"{peer} is not installed: pip install {peer.lower()}")
    if any(one.error for one in found if one.system in (UNPRUNED, PRUNED)):
        raise typer.Exit(1)


def _reference(found: list[Measured]) -> Measured:
    """Return what the others have to agree with: sentence-transformers in float32, else grating unpruned."""
    worked = {one.system: one for one in found if one.error is None}
    return worked.get(SENTENCE_TRANSFORMERS) or worked.get(UNPRUNED) or found[-1]


def _agreement(one: Measured, reference: Measured) -> float | None:
    return None if one.error or reference.error else agreement(one, reference)


def _as_json(job: Job, found: list[Measured]) -> dict[str, Any]:
    reference = _reference(found)
    systems = [asdict(one) | {"agreement": _agreement(one, reference)} for one in found]
    for system in systems:
        del system["rankings"]
    return {
        "model": str(job.settings.model),
        "requests": len(job.requests),
        "candidates": len(job.requests[0][1]),
        "top_k": job.top_k,
        "rounds": job.rounds,
        "threads": job.threads,
        "reference": reference.system,
        "systems": systems,
    }


def _print(job: Job, found: list[Measured]) -> None:
    reference = _reference(found)
    table = plain_table("system", "s / request", "speed", "memory", "loads in", f"same top {job.top_k}")
    for one in found:
        if one.error is not None:
            table.add_row(one.system, "failed", "", "", "", "")
            continue
        same = _agreement(one, reference)
        table.add_row(
            one.system,
            f"{one.seconds:.3f}",
            f"{reference.seconds / one.seconds:.2f} ×",
            f"{one.peak_memory / 1e6:,.0f} MB",
            f"{one.load_seconds:.1f} s",
            "reference" if one is reference else f"{same:.1%}",
        )
    show(table, whole=True)
    for one in found:
        show(f"{one.system}: {one.error or one.setting}.", style="dim" if one.error is None else "red")
    show(
        f"{len(job.requests)} requests of {len(job.requests[0][1])} documents, medians of {job.rounds} rounds, "
        f"{job.threads} threads; each system in a process of its own, one after the other. Memory is the most "
        f"that the process had while it reranked, imports included.",
        style="dim",
    )
    if (line := verdict(job, found)) is not None:
        show(line, style="bold")


def verdict(job: Job, found: list[Measured]) -> str | None:
    """Return what it comes to, in a sentence; None if grating or all that it is compared with failed."""
    worked = {one.system: one for one in found if one.error is None}
    ours, unpruned = worked.pop(PRUNED, None), worked.pop(UNPRUNED, None)
    others = list(worked.values()) or ([unpruned] if unpruned else [])
    if ours is None or not others:
        return None
    fastest = min(others, key=lambda one: one.seconds)
    ratio = fastest.seconds / ours.seconds
    speed = f"{ratio:.1f} times as fast as" if ratio >= 1 else f"slower by {1 / ratio - 1:.0%} than"
    same = _agreement(ours, _reference(found))
    return (
        f"On these texts grating is {speed} the fastest other ({fastest.system}), with {same:.1%} of the "
        f"reference's top {job.top_k}, and {ours.peak_memory / 1e6:,.0f} MB against "
        f"{fastest.peak_memory / 1e6:,.0f} MB."
    )
