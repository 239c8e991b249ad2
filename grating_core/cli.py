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
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from grating_core.errors import GratingError
from grating_core.inputs import Format, read_documents
from grating_core.pruning import Route
from grating_core.results import RerankResult

if TYPE_CHECKING:
    from grating_core.generation import Generation, StreamedCausalLM

# torch and transformers take seconds to import, so the commands that need them import them themselves.

# Options of several commands that are arguments of Reranker.from_pretrained, StreamedCausalLM.from_pretrained.
_SETTINGS = frozenset(
    ("pruning", "target", "guarantee", "lens", "device", "dtype", "max_length", "long_documents", "template",
     "instruction", "adapter", "memory_budget", "mlp_density")
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
MlpDensity = Annotated[float | None, typer.Option(help="Share of the MLPs' weights that is used; all by default.")]


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
    mlp_density: MlpDensity = None,
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
    mlp_density: MlpDensity = None,
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
    mlp_density: MlpDensity = None,
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
def generate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub id or local directory of a language model.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text, or - for standard input.")],
    chat: Annotated[bool, typer.Option("--chat/--raw", help="Answer it as a message, or just go on.")] = True,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token always.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Probability of the tokens that are picked from.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers; another every time by default.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends it; several may be given.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    memory_budget: Budget = None,
    mlp_density: MlpDensity = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of prompt and answer together.")] = None,
    adapter: AdapterName = None,
) -> None:
    """Answer a prompt with a language model, which need not fit into memory."""
    with _plain_errors():
        text = sys.stdin.read() if prompt == "-" else prompt
        with _err.status("Loading ..."):
            from grating_core.generation import StreamedCausalLM

            loaded = StreamedCausalLM.from_pretrained(model, show_progress=True, **_settings(context))
        with loaded:
            generation = _written(
                loaded,
                [{"role": "user", "content": text}] if chat else text,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                stop=stop or (),
            )
    _err.print(_speed_line(generation), style="dim")


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
    mlp_density: MlpDensity = None,
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
            mlp_density=mlp_density,
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
        "columns": f"{planned.column_share:.0%} of those of the MLPs",
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
        + (" Of the MLPs each chunk reads the columns that it uses and lacks." if planned.sizes.columns else "")
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
def simulate(
    model: Annotated[str, typer.Argument(help="Decoder whose activations are recorded: hub id or directory.")],
    text: Annotated[str, typer.Option(help="Real text for it to read: a file of text or of JSON Lines.")],
    memory: Annotated[
        str, typer.Option(help="For all weights, such as 2GB, or the share of the MLPs in memory, such as 50%.")
    ],
    mlp_density: Annotated[
        list[float], typer.Option(help="Share of the MLPs that a token uses; may be given several times.")
    ] = [0.83, 0.67, 0.57, 0.5],  # noqa: B006 - typer copies it
    tokens: Annotated[int, typer.Option(help="Tokens of the text to go through.")] = 512,
    trace: Annotated[
        Path | None, typer.Option(help="File of recorded activations; in grating's cache by default.")
    ] = None,
    shape: Annotated[
        Path | None, typer.Option(help="Directory with the config.json of another model to simulate.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16, float16 or float32.")] = "bfloat16",
    inputs_preference: Annotated[
        float, typer.Option(help="What an input counts where its column is not in memory, in cache-aware DIP.")
    ] = 0.9,
    products_preference: Annotated[float, typer.Option(help="The same of a product.")] = 0.3,
    machine: Annotated[
        str, typer.Option(help="this, which is measured; phone, sata-ssd, nvme; or what the options below say.")
    ] = "this",
    disk_bandwidth: Annotated[str | None, typer.Option(help="Of long reads, such as 500MB/s.")] = None,
    disk_reads: Annotated[float | None, typer.Option(help="Random reads of 4 KB a second, 8 at a time.")] = None,
    memory_bandwidth: Annotated[str | None, typer.Option(help="Such as 20GB/s.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw perplexity against tokens/s into this picture.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate how fast a decoder larger than memory generates: streamed, or pruned by dynamic input pruning."""
    with _plain_errors():
        read = "\n\n".join(read_documents(text, plain="text"))
        with _err.status("Loading ..."):
            import torch

            from grating_core.models.directory import find_model
            from grating_core.models.placement import choose_dtype
            from grating_core.sparsity.cache import Preference
            from grating_core.sparsity.comparison import compare
            from grating_core.sparsity.machine import describe_machine, parse_rate
            from grating_core.sparsity.probe import find_machine
            from grating_core.sparsity.simulator import Shape

            directory = find_model(model)
            weights, _ = choose_dtype(dtype, torch.device("cpu"))
            simulated = Shape.of(shape or directory, weights)
            bytes_of_weights = simulated.parse_memory(memory)
            preference = Preference(inputs_preference, products_preference)
            if disk_bandwidth is not None and disk_reads is not None and memory_bandwidth is not None:
                found = describe_machine(
                    parse_rate(disk_bandwidth, "disk_bandwidth"),
                    disk_reads,
                    parse_rate(memory_bandwidth, "memory_bandwidth"),
                )
            elif any(given is not None for given in (disk_bandwidth, disk_reads, memory_bandwidth)):
                raise ValueError(
                    "a machine is described by --disk-bandwidth, --disk-reads and --memory-bandwidth together"
                )
            else:
                found = find_machine(machine, weights)
        points = compare(
            directory,
            read,
            simulated,
            found,
            memory=bytes_of_weights,
            densities=mlp_density,
            tokens=tokens,
            preference=preference,
            trace=trace,
            perplexity=figure is not None,
            show_progress=True,
        )
        if figure is not None:
            from grating_core.plotting import plot_simulation

            plot_simulation(points, figure)
    if as_json:
        _print_json({"memory": bytes_of_weights, "points": [asdict(point) for point in points]})
        return
    table = _table("way", "density", "tokens/s", "MB a token", "hit rate", "perplexity")
    for point in points:
        table.add_row(
            point.estimate.way,
            f"{point.density:.2f}",
            f"{point.estimate.tokens_per_second:.2f}",
            f"{point.estimate.bytes_per_token / 1e6:,.1f}",
            "" if point.estimate.hit_rate is None else f"{point.estimate.hit_rate:.1%}",
            "" if point.perplexity is None else f"{point.perplexity:.2f}",
        )
    _out.print(table)
    _out.print(
        f"{bytes_of_weights / 1e6:,.0f} of {simulated.total / 1e6:,.0f} MB of weights in memory; "
        f"buffers, keys and values aside.",
        style="dim",
    )


@app.command()
def distill(
    model: Annotated[str, typer.Argument(help="Language model: hub id or local directory.")],
    text: Annotated[list[Path], typer.Option(help="File of texts, of the kind the model will read; or several.")],
    output: Annotated[Path, typer.Option(help="New directory for the adapter, or one that a stopped run left.")],
    mlp_density: Annotated[float, typer.Option(help="Share of the MLPs' weights that a token will use.")] = 0.5,
    rank: Annotated[int, typer.Option(help="Of the adapter's changes.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Its highest value.")] = 1e-3,
    steps: Annotated[int, typer.Option(help="How often the adapter is changed.")] = 400,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens that each change is computed from.")] = 1024,
    window: Annotated[int, typer.Option(help="Tokens that the model sees at once.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the order of the text, and of what is held out.")] = 0,
    format: InputFormat = "auto",
    field: Field = "text",
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Train an adapter that makes up for pruned MLPs. The same command goes on where it stopped."""
    with _plain_errors():
        texts = [
            document
            for path in text
            for document in read_documents(str(path), format=format, field=field, plain="text")
        ]
        with _err.status("Loading ..."):
            from grating_core.sparsity.distill import distill as train
        try:
            found = train(
                model,
                texts,
                output,
                mlp_density=mlp_density,
                rank=rank,
                learning_rate=learning_rate,
                steps=steps,
                tokens_per_step=tokens_per_step,
                window=window,
                seed=seed,
                device=device,
                dtype=dtype,
                show_progress=True,
            )
        except KeyboardInterrupt:
            _err.print(f"Stopped. The same command goes on from the last state in {output}, if there is one.")
            raise typer.Exit(130) from None
    table = _table(f"on {found.held_out:,} tokens held out", "perplexity", "", "KL to dense")
    table.add_row("dense", f"{found.dense:.2f}")
    for name, loss in {"pruned": found.pruned, "pruned, with the adapter": found.recovered}.items():
        cost = f"{loss.perplexity / found.dense - 1:+.1%}"
        table.add_row(name, f"{loss.perplexity:.2f}", cost, f"{loss.divergence:.4f}")
    _out.print(table)
    _out.print(f"Trained on {found.trained:,} tokens. The adapter is in {found.directory}: give it as --adapter.")


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

    from grating_core.files import cache_directory
    from grating_core.models.bundled import bundled_source
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


def _written(model: StreamedCausalLM, prompt: Any, **how: Any) -> Generation:
    """Generate, and print the text as it comes."""
    stream = model.stream(prompt, **how)
    while True:
        try:
            typer.echo(next(stream), nl=False)
        except StopIteration as end:
            typer.echo()
            generation: Generation = end.value
            return generation


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


def _speed_line(generation: Generation) -> str:
    tokens, after = generation.new_tokens, generation.seconds - generation.seconds_to_first
    speed = f", the others {(tokens - 1) / after:,.1f} a second" if tokens > 1 else ""
    line = f"{tokens} tokens; the first after {generation.seconds_to_first:.2f} s{speed}"
    if not generation.bytes_read:
        return line
    rate = generation.hit_rate
    found = "" if rate is None else f", {rate:.0%} of the columns were in memory"
    each = (generation.bytes_read - generation.bytes_to_first) / max(1, tokens - 1)
    return (
        f"{line}; read {generation.bytes_to_first / 1e6:,.0f} MB for the prompt and {each / 1e6:,.1f} MB a token, "
        f"waited {generation.seconds_waited:.2f} s for the disk{found}"
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
