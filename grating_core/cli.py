"""The ``grating`` command."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grating_core.errors import GratingError
from grating_core.inputs import Format, read_documents
from grating_core.pruning import Route
from grating_core.results import RerankResult

# torch and transformers take seconds to import, so the commands that need them import them themselves.

# Options of several commands that are arguments of Reranker.from_pretrained.
_SETTINGS = frozenset(
    ("pruning", "target", "guarantee", "lens", "device", "dtype", "max_length", "long_documents", "template",
     "instruction", "adapter", "memory_budget")
)  # fmt: skip

BUNDLED = "bundled:ms-marco-minilm-l12"

app = typer.Typer(
    help="Rerank documents with a cross-encoder, on your own machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_out = Console()
_err = Console(stderr=True)

Query = Annotated[str, typer.Option("--query", "-q", help="The question.")]
Input = Annotated[str, typer.Option("--input", "-i", help="File of documents, or - for standard input.")]
InputFormat = Annotated[Format, typer.Option("--format", help="How the documents are stored.")]
Field = Annotated[str, typer.Option(help="JSON field or CSV column that holds the text.")]
TopK = Annotated[int, typer.Option("--top-k", "-k", help="How many to return.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Hub id, local directory or bundled name.")]
Pruning = Annotated[str, typer.Option(help="auto, cluster or off.")]
Target = Annotated[float, typer.Option(help="Share of the full model's top K that a lens promises to keep.")]
GuaranteeOf = Annotated[str, typer.Option("--guarantee", help="share, or set: the whole top K, so often.")]
LensDirectory = Annotated[
    Path | None, typer.Option("--lens", help="Lens to prune by; the model's own by default.")
]
Scores = Annotated[str, typer.Option(help="exact, or estimated: sure winners stop early as well.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps; the best there is by default.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
MaxLength = Annotated[int | None, typer.Option(help="Most tokens of query and document together.")]
LongDocuments = Annotated[str, typer.Option(help="truncate, or windows: the best window of a document counts.")]
TemplateName = Annotated[str | None, typer.Option(help="Official prompt of a decoder, if its name does not tell.")]
Instruction = Annotated[str | None, typer.Option(help="What to judge by, for models that take an instruction.")]
AdapterName = Annotated[str | None, typer.Option("--adapter", help="LoRA adapter: directory or hub id.")]
Budget = Annotated[str | None, typer.Option(help="Memory it may take, such as 300MB; no bound by default.")]


@app.command()
def rerank(
    context: typer.Context,
    query: Query,
    input: Input,
    top_k: TopK = 5,
    format: InputFormat = "auto",
    field: Field = "text",
    as_json: AsJson = False,
    model: Model = BUNDLED,
    pruning: Pruning = "auto",
    scores: Scores = "exact",
    device: Device = None,
    dtype: Dtype = "auto",
    max_length: MaxLength = None,
    long_documents: LongDocuments = "truncate",
    template: TemplateName = None,
    instruction: Instruction = None,
    adapter: AdapterName = None,
    memory_budget: Budget = None,
    target: Target = 0.98,
    guarantee: GuaranteeOf = "share",
    lens: LensDirectory = None,
) -> None:
    """Print the documents that answer a question best."""
    settings = _settings(context)
    with _plain_errors():
        result = _run(model, settings, query, read_documents(input, format=format, field=field), top_k, scores)
    if as_json:
        _print_json(_summary(query, result))
    else:
        _out.print(_ranking_table(result))
        _out.print(_closing_line(result), style="dim")


@app.command()
def explain(
    context: typer.Context,
    query: Query,
    input: Input,
    top_k: TopK = 5,
    format: InputFormat = "auto",
    field: Field = "text",
    as_json: AsJson = False,
    model: Model = BUNDLED,
    pruning: Pruning = "auto",
    scores: Scores = "exact",
    device: Device = None,
    dtype: Dtype = "auto",
    max_length: MaxLength = None,
    long_documents: LongDocuments = "truncate",
    template: TemplateName = None,
    instruction: Instruction = None,
    adapter: AdapterName = None,
    memory_budget: Budget = None,
    target: Target = 0.98,
    guarantee: GuaranteeOf = "share",
    lens: LensDirectory = None,
    plot: Annotated[Path | None, typer.Option(help="Draw score trajectories into this picture.")] = None,
) -> None:
    """Like rerank, and show layer by layer how the ranking came about."""
    settings = _settings(context)
    with _plain_errors():
        result = _run(model, settings, query, read_documents(input, format=format, field=field), top_k, scores)
        if plot is not None and result.trace.layers:
            from grating_core.plotting import plot_trajectories

            plot_trajectories(result, plot)
    if as_json:
        _print_json(_summary(query, result) | {"layers": [asdict(layer) for layer in result.trace.layers]})
        return
    _out.print(_ranking_table(result))
    _out.print(_trace_table(result))
    _out.print(_closing_line(result), style="dim")


@app.command()
def select(
    context: typer.Context,
    query: Query,
    input: Annotated[
        str, typer.Option("--input", "-i", help="File of a text or documents, or - for standard input.")
    ],
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", help="Most tokens to print, by the model's count.")
    ],
    chunk_tokens: Annotated[int, typer.Option(help="About how many tokens a chunk has at most.")] = 256,
    format: InputFormat = "auto",
    field: Field = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with positions, instead of text.")] = False,
    model: Model = BUNDLED,
    pruning: Pruning = "auto",
    device: Device = None,
    dtype: Dtype = "auto",
    max_length: MaxLength = None,
    template: TemplateName = None,
    instruction: Instruction = None,
    adapter: AdapterName = None,
    memory_budget: Budget = None,
    target: Target = 0.98,
    guarantee: GuaranteeOf = "share",
    lens: LensDirectory = None,
) -> None:
    """Print the passages of a long text that answer a question best, in their order, for a prompt."""
    with _plain_errors():
        texts = read_documents(input, format=format, field=field, plain="text")
        with _err.status("Loading ..."):
            from grating_core.context import join_passages, select_context
            from grating_core.reranker import Reranker

            with Reranker.from_pretrained(model, show_progress=True, **_settings(context)) as reranker:
                passages = select_context(
                    query, texts, reranker=reranker, max_tokens=max_tokens, chunk_tokens=chunk_tokens
                )
    if as_json:
        _print_json({"query": query, "passages": [asdict(passage) for passage in passages]})
    else:
        typer.echo(join_passages(passages))


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Hub id, local directory or bundled name.")],
    memory_budget: Annotated[str, typer.Option(help="Memory it may take, such as 300MB.")],
    candidates: Annotated[int, typer.Option(min=1, help="Documents of a request.")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each of them with the query.")] = 500,
    device: Device = None,
    dtype: Dtype = "auto",
    max_length: MaxLength = None,
    template: TemplateName = None,
    adapter: AdapterName = None,
) -> None:
    """Show what a memory budget is spent on, and what a request will read from disk and write to it."""
    with _plain_errors(), _err.status("Looking at the model ..."):
        from grating_core.memory.meter import resident_memory
        from grating_core.models.templates import load_template
        from grating_core.reranker import plan_memory

        directory, window, planned = plan_memory(
            model,
            memory_budget,
            device=device,
            dtype=dtype,
            max_length=max_length,
            template=template,
            adapter=adapter,
            show_progress=True,
        )
        before = resident_memory()
        loaded = load_template(directory, window)
        tokenizer = resident_memory() - before
        del loaded
    request = candidates * min(tokens, window)
    table = _table("what", "MB", "")
    details = {
        "resident layers": f"{len(planned.resident)} of {len(planned.sizes.layers)}",
        "embedding rows": f"{planned.embedding_rows:,} of {planned.sizes.vocabulary:,}",
        "intermediate results": f"chunks of {planned.chunk_tokens:,} tokens, documents of up to {window:,}",
        "hidden states": f"of up to {planned.hidden_tokens:,} tokens",
    }
    for part, size in planned.parts.items():
        table.add_row(part, f"{size / 1e6:,.1f}", details.get(part, ""))
    table.add_row("together", f"{planned.total / 1e6:,.1f}", f"of a budget of {planned.budget / 1e6:,.1f}")
    table.add_row("the tokenizer, beside the budget", f"{tokenizer / 1e6:,.1f}", "as just measured")
    _out.print(table)
    spilled = planned.bytes_spilled(request) / 1e6
    _out.print(
        f"A request of {candidates} candidates, {request:,} tokens, reads {planned.bytes_read() / 1e6:,.0f} MB of "
        f"weights and the embedding rows it lacks; "
        + (f"writes and reads {spilled:,.0f} MB of hidden states." if spilled else "no hidden states are spilled.")
    )


@app.command()
def calibrate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub id, local directory or bundled name.")],
    corpus: Annotated[list[Path], typer.Option(help="File of documents; several for several kinds of text.")],
    queries: Annotated[list[Path] | None, typer.Option(help="File of queries for each corpus, in order.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the lens goes; grating's cache by default.")] = None,
    format: InputFormat = "auto",
    field: Field = "text",
    candidates: Annotated[int, typer.Option(help="Documents of a request.")] = 20,
    requests: Annotated[int, typer.Option(help="Requests to compute, all corpora together.")] = 600,
    top_k: TopK = 5,
    target: Target = 0.98,
    seed: Annotated[int, typer.Option(help="Of the choice of queries.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    max_length: MaxLength = None,
    template: TemplateName = None,
    instruction: Instruction = None,
    adapter: AdapterName = None,
    memory_budget: Budget = None,
) -> None:
    """Fit a lens to a model on your own texts, so that it prunes early and keeps what it promises."""
    with _plain_errors():
        if queries and len(queries) != len(corpus):
            raise ValueError(f"there are {len(queries)} files of queries for {len(corpus)} of documents")
        how: dict[str, Any] = {"format": format, "field": field}
        documents = {str(path): read_documents(str(path), **how) for path in corpus}
        asked = {
            str(path): read_documents(str(file), **how) for path, file in zip(corpus, queries or (), strict=False)
        }
        from grating_core.reranker import Reranker

        with Reranker.from_pretrained(model, show_progress=True, **_settings(context)) as reranker:
            found = reranker.calibrate(
                documents,
                asked,
                top_k=top_k,
                candidates=candidates,
                requests=requests,
                output=output,
                seed=seed,
                show_progress=True,
            )
    summary = found.summary
    table = _table("layer", "γ of its estimates")
    for layer, gamma in enumerate(summary.gammas):
        table.add_row(str(layer), f"{gamma:.2f}")
    _out.print(table)
    _out.print(
        f"Fitted on {summary.fitted} requests. On {summary.measured} others with {summary.candidates} candidates, "
        f"top {summary.top_k}, target {summary.target:.2f}: compute share {summary.compute_share:.2f}, "
        f"{summary.agreement:.1%} of the full model's top {summary.top_k} kept."
    )
    if summary.compute_share == 1:
        _out.print(
            f"That is: nothing will be pruned. {summary.measured} requests are evidence for a target of "
            f"{1 - 1 / (summary.measured + 1):.3f} at most: take more --requests, or a lower --target."
        )
    _out.print(f"The lens is in {output}." if output else "From now on pruning='auto' finds it for this model.")


@app.command()
def models() -> None:
    """List the models that are bundled, cached and supported."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    from grating_core.models.bundled import BUNDLED_MODELS, bundled_directory
    from grating_core.models.families import FAMILIES

    table = _table("model", "kind", "layers", "size", "where")
    for name in BUNDLED_MODELS:
        directory = bundled_directory(name)
        if directory.is_dir():
            table.add_row(name, "bundled", *_described(directory), str(directory))
        else:
            table.add_row(name, "bundled", "", "", "made on first use")
    try:
        cached = scan_cache_dir().repos
    except CacheNotFound:
        cached = frozenset()
    for repo in sorted((repo for repo in cached if repo.repo_type == "model"), key=lambda repo: repo.repo_id):
        snapshot = max(repo.revisions, key=lambda revision: revision.last_modified).snapshot_path
        try:
            table.add_row(repo.repo_id, "hub cache", *_described(snapshot), str(snapshot))
        except GratingError:
            continue  # not a reranker that grating runs
    _out.print(table)
    _out.print("Supported, as safetensors and if classifiers with one label: " + ", ".join(FAMILIES) + ".")


@app.command()
def doctor() -> None:
    """Show versions, the device and dtype that will be used and why, and where the caches are."""
    import torch
    from huggingface_hub import constants

    from grating_core.models.bundled import bundled_source, cache_directory
    from grating_core.models.placement import choose_device, choose_dtype

    device = choose_device(None)
    dtype, reason = choose_dtype("auto", device)
    try:
        bundled_source(BUNDLED)
        bundled = "ready to be converted, or converted"
    except GratingError as error:
        bundled = str(error)
    table = _table("what", "found")
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for package in ("grating-core", "torch", "transformers", "tokenizers", "langchain-grating",
                    "llama-index-postprocessor-grating", "matplotlib", "onnx"):  # fmt: skip
        table.add_row(package, _version(package))
    table.add_row(
        "device", f"{device} (CUDA: {torch.cuda.is_available()}, MPS: {torch.backends.mps.is_available()})"
    )
    table.add_row("dtype", f"{str(dtype).removeprefix('torch.')}: {reason}")
    table.add_row("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors")
    table.add_row("grating's cache", str(cache_directory()))
    table.add_row("hub cache", f"{constants.HF_HUB_CACHE}{', offline' if constants.HF_HUB_OFFLINE else ''}")
    table.add_row("bundled model", bundled)
    _out.print(table)


@app.command()
def demo(
    query: Annotated[str | None, typer.Option("--query", "-q", help="Your own question about Python.")] = None,
    top_k: TopK = 5,
    candidates: Annotated[int, typer.Option(help="Passages that BM25 picks.")] = 50,
) -> None:
    """Answer a question from the Python language reference: BM25 picks 50 passages, the reranker returns 5."""
    from grating_core.demo import QUESTION, first_stage, load_passages

    query = query or QUESTION
    with _plain_errors():
        passages = load_passages()
        _err.print(f"Passages of the Python language reference: {len(passages)}. BM25 picks {candidates} ...")
        found = first_stage(query, passages, candidates)
        pruned = _measured("auto", query, found, top_k)
        full = _measured("off", query, found, top_k)
    _out.print(Text(f"\n{query}", style="bold"))
    _out.print(_ranking_table(pruned[0]))
    table = _table("", "seconds", "compute share", f"same top {top_k}")
    winners = {ranked.index for ranked in full[0].ranking}
    for name, (result, seconds) in {"unpruned": full, "pruning='auto'": pruned}.items():
        same = len(winners & {ranked.index for ranked in result.ranking})
        table.add_row(name, f"{seconds:.3f}", f"{result.trace.compute_share:.2f}", f"{same} of {len(winners)}")
    _out.print(table)


def _settings(context: typer.Context) -> dict[str, Any]:
    """Those of a command's options that :meth:`Reranker.from_pretrained` takes."""
    return {name: value for name, value in context.params.items() if name in _SETTINGS}


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What the user can do something about is told in a sentence, not in a traceback."""
    try:
        yield
    except (GratingError, ValueError, OSError, ModuleNotFoundError) as error:
        _err.print(Text(f"Error: {error}", style="red"))
        raise typer.Exit(2) from error


def _run(
    model: str, settings: dict[str, Any], query: str, documents: list[str], top_k: int, scores: Any
) -> RerankResult:
    with _err.status("Loading ..."):
        from grating_core.reranker import Reranker

        with Reranker.from_pretrained(model, show_progress=True, **settings) as reranker:
            return reranker.rerank(query, documents, top_k, scores=scores)


def _measured(pruning: str, query: str, documents: list[str], top_k: int) -> tuple[RerankResult, float]:
    """The result, and the median seconds of three runs after a warm-up."""
    from grating_core.reranker import Reranker

    with Reranker.from_pretrained(BUNDLED, pruning=pruning, show_progress=True) as reranker:
        _err.print(f"Reranking with pruning={pruning!r} ...", markup=False, highlight=False)
        results = [reranker.rerank(query, documents, top_k) for _ in range(4)]
    return results[-1], median(result.trace.seconds for result in results[1:])


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _ranking_table(result: RerankResult) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("rank", "score", "index"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("text")
    for rank, ranked in enumerate(result.ranking, 1):
        score = f"{ranked.score:.3f}{' (estimate)' if ranked.estimated else ''}"
        table.add_row(str(rank), score, str(ranked.index), Text(_shortened(ranked.text)))
    return table


def _trace_table(result: RerankResult) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title="By layer", title_justify="left")
    for heading in (
        "layer",
        "alive",
        *(route.value for route in Route),
        "best",
        "worst",
        "tokens",
        "ms",
        "waited",
    ):
        table.add_column(heading, justify="right")
    for layer in result.trace.layers:
        table.add_row(
            str(layer.layer),
            str(len(layer.alive)),
            *(str(layer.routes.count(route)) for route in Route),
            f"{max(layer.scores):.2f}",
            f"{min(layer.scores):.2f}",
            f"{layer.tokens:,}",
            f"{1000 * layer.seconds:.1f}",
            f"{1000 * layer.seconds_waited:.1f}",
        )
    return table


def _closing_line(result: RerankResult) -> str:
    trace = result.trace
    cut = f", {len(trace.truncated)} cut to the window" if trace.truncated else ""
    line = (
        f"{len(trace.lengths)} documents, {sum(trace.lengths):,} tokens{cut}; {trace.seconds:.2f} s, "
        f"compute share {trace.compute_share:.2f}"
    )
    if trace.peak_memory is None:
        return line
    spilled = f", spilled {trace.bytes_spilled / 1e6:,.0f} MB" if trace.bytes_spilled else ""
    return (
        f"{line}; read {trace.bytes_read / 1e6:,.0f} MB{spilled}, waited {trace.seconds_waited:.2f} s for the "
        f"disk, {trace.peak_memory / 1e6:,.0f} MB in memory at most"
    )


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:299] + "…"


def _summary(query: str, result: RerankResult) -> dict[str, Any]:
    ranking = [asdict(ranked) for ranked in result.ranking]
    return {"query": query, "ranking": ranking, **result.trace.summary()}


def _print_json(value: dict[str, Any]) -> None:
    json.dump(value, sys.stdout, ensure_ascii=False, indent=2)
    sys.stdout.write("\n")


def _described(directory: Path) -> tuple[str, str]:
    from grating_core.models.directory import describe_weights

    described = describe_weights(directory)
    return str(described["layers"]), f"{described['bytes'] / 1e6:,.0f} MB"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
