"""The bundled reranker in other runtimes for CPUs, with the same weights, quantised as each runtime does it.

The weights are exported once, in float32, and the quantised files are made of that export. A runtime computes
batches of pairs of like length. It may compute in several lanes: each lane takes the next batch as soon as it is
free, and has its share of the threads. The quickest of these ways is found on the first request of a collection.
"""

from __future__ import annotations

import json
import queue
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, product
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.collections import Request
from benchmarks.report import installed
from benchmarks.shapes import seen_when_finished
from grating_core.files.places import cache_directory

PACKAGES = ("sentence-transformers", "onnx", "onnxruntime", "ctranslate2", "openvino", "nncf")
INPUTS = ("input_ids", "token_type_ids", "attention_mask")
BATCH_SIZES = (1, 2, 4)  # 8 was never the quickest
CALIBRATION_PAIRS = 100

Scores = NDArray[np.float32]
Way = Callable[[Request], Scores]
"""Scores the candidates of a request."""

Batch = dict[str, NDArray[np.int64]]
Run = Callable[[Batch], Scores]
"""Scores a padded batch, in one lane."""

Open = Callable[[Path, int, int], list[Run]]
"""Opens the files of a directory in a number of lanes, which share a number of threads."""


class Quickest:
    """Scores requests in the quickest of several ways, which is found on the first request of each collection.

    Args:
        ways: The ways, by their names.
    """

    def __init__(self, ways: Mapping[str, Way]) -> None:
        self._ways = ways
        self._best: dict[str, str] = {}

    def scores(self, collection: str, request: Request) -> tuple[Scores, str]:
        """Return the scores of the candidates, and the name of the way."""
        if collection not in self._best:
            ways = list(self._ways)
            self._best[collection] = (
                min(ways, key=lambda way: self._seconds(way, request)) if ways[1:] else ways[0]
            )
        return self._ways[self._best[collection]](request), self._best[collection]

    def _seconds(self, way: str, request: Request) -> float:
        self._ways[way](request)  # the first time is slower than all others
        started = perf_counter()
        self._ways[way](request)
        return perf_counter() - started


def runtime_ways(tokenizer: Any, files: Path, open_lanes: Open, threads: int) -> dict[str, Way]:
    """Return the ways to rerank with a runtime: with one lane or one a thread, and in batches of several sizes.

    Args:
        tokenizer: Tokenizes pairs.
        files: What :func:`prepare` returned.
        open_lanes: Opens the runtime.
        threads: All lanes share them.
    """
    lanes = {count: open_lanes(files, count, threads) for count in {1, threads}}

    def way(count: int, batch_size: int) -> Way:
        return lambda request: _score(tokenizer, lanes[count], request, batch_size)

    return {
        f"{'one lane' if count == 1 else f'{count} lanes'}, batches of {size}": way(count, size)
        for count, size in product(lanes, BATCH_SIZES)
    }


def _score(tokenizer: Any, lanes: Sequence[Run], request: Request, batch_size: int) -> Scores:
    """Score the candidates in batches of like length, the longest first."""
    number = len(request.documents)
    pairs = tokenizer([request.query] * number, request.documents, truncation="only_second")
    order = iter(sorted(range(number), key=lambda i: -len(pairs["input_ids"][i])))
    waiting: queue.SimpleQueue[tuple[int, ...]] = queue.SimpleQueue()
    while batch := tuple(islice(order, batch_size)):
        waiting.put(batch)
    scores = np.empty(number, np.float32)

    def work(run: Run) -> None:
        while True:
            try:
                batch = list(waiting.get_nowait())
            except queue.Empty:
                return
            scores[batch] = run({name: _padded([pairs[name][i] for i in batch]) for name in INPUTS})

    if len(lanes) == 1:
        work(lanes[0])
    else:
        with ThreadPoolExecutor(len(lanes)) as pool:
            list(pool.map(work, lanes))
    return scores


def _padded(rows: list[list[int]]) -> NDArray[np.int64]:
    padded = np.zeros((len(rows), max(map(len, rows))), np.int64)  # 0 is the padding token, too
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return padded


def open_onnx_runtime(files: Path, lanes: int, threads: int) -> list[Run]:
    """Open ONNX Runtime: 8-bit weights, activations quantised by tensor while it runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads // lanes

    def lane() -> Run:
        session = onnxruntime.InferenceSession(
            str(files / "dynamic.onnx"), options, providers=["CPUExecutionProvider"]
        )
        names = [entry.name for entry in session.get_inputs()]
        return lambda batch: session.run(None, {name: batch[name] for name in names})[0][:, 0]

    return [lane() for _ in range(lanes)]


def open_openvino(files: Path, lanes: int, threads: int, *, file: str, settings: Mapping[str, Any]) -> list[Run]:
    """Open OpenVINO.

    Args:
        files: See :data:`Open`.
        lanes: See :data:`Open`.
        threads: See :data:`Open`.
        file: The model.
        settings: Properties of the processor's plugin.
    """
    import openvino

    properties = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": lanes, **settings}
    compiled = openvino.compile_model(files / file, "CPU", properties)

    def lane() -> Run:
        request = compiled.create_infer_request()
        return lambda batch: request.infer(batch)[0][:, 0]

    return [lane() for _ in range(lanes)]


def open_ctranslate2(files: Path, lanes: int, threads: int) -> list[Run]:
    """Open CTranslate2 in 8 bits; it computes all but the classifier."""
    import ctranslate2

    encoder = ctranslate2.Encoder(
        str(files / "ctranslate2"), compute_type="int8", inter_threads=lanes, intra_threads=threads // lanes
    )
    with safe_open(files / "checkpoint" / "model.safetensors", "np") as weights:
        weight, bias = (weights.get_tensor(f"classifier.{name}")[0] for name in ("weight", "bias"))

    def run(batch: Batch) -> Scores:
        ids, lengths = batch["input_ids"].astype(np.int32), batch["attention_mask"].sum(1, dtype=np.int32)
        view = ctranslate2.StorageView.from_array
        output = encoder.forward_batch(view(ids), view(lengths), batch["token_type_ids"].tolist())
        scores: Scores = np.array(output.pooler_output) @ weight + bias
        return scores

    return [run] * lanes


# The files.


def prepare(directory: Path) -> Path:
    """Return the directory of the exported and quantised files, which are made if they are not there yet.

    Args:
        directory: Holds a ``BertForSequenceClassification``.
    """
    versions = "-".join(f"{package}-{installed(package)}" for package in ("onnxruntime", "ctranslate2", "nncf"))
    files = cache_directory() / "benchmarks" / f"{directory.name}-{versions}"
    if not files.is_dir():
        with seen_when_finished(files) as unfinished, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _export(directory, unfinished)
            _quantise_onnx_runtime(directory, unfinished)
            _quantise_ctranslate2(directory, unfinished)
            _quantise_openvino(directory, unfinished)
    return files


def _export(directory: Path, files: Path) -> None:
    """Write ``model.onnx``, in float32."""
    model = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> Any:
            return self.model(**dict(zip(INPUTS, inputs, strict=True))).logits

    example = tuple(torch.ones(2, 8, dtype=torch.int64) for _ in INPUTS)
    axes = {name: {0: "batch", 1: "length"} for name in INPUTS}
    torch.onnx.export(
        Logits().eval(), example, str(files / "model.onnx"), dynamo=False, opset_version=17,
        input_names=list(INPUTS), output_names=["logits"], dynamic_axes=axes,
    )  # fmt: skip


def _quantise_onnx_runtime(directory: Path, files: Path) -> None:
    """Fuse what ONNX Runtime fuses in a BERT, and quantise the weights."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    fused, config = files / "fused.onnx", AutoConfig.from_pretrained(directory, trust_remote_code=False)
    optimize_model(
        str(files / "model.onnx"), "bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size
    ).save_model_to_file(str(fused))
    options = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # fused operators have no type of their own
    quantize_dynamic(fused, files / "dynamic.onnx", weight_type=QuantType.QInt8, extra_options=options)


def _quantise_ctranslate2(directory: Path, files: Path) -> None:
    import ctranslate2

    checkpoint = Path(shutil.copytree(directory, files / "checkpoint"))
    settings = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    settings["position_embedding_type"] = "absolute"  # which older releases of transformers wrote, and it asks for
    (checkpoint / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    converter = ctranslate2.converters.TransformersConverter(str(checkpoint))
    converter.convert(str(files / "ctranslate2"), quantization="int8")


def _quantise_openvino(directory: Path, files: Path) -> None:
    """Write OpenVINO's files: float32, 8-bit weights, and static, calibrated on pairs of another collection."""
    import nncf
    import openvino

    def save(model: Any, name: str) -> None:
        openvino.save_model(model, files / f"{name}.xml", compress_to_fp16=False)

    def read() -> Any:
        return openvino.Core().read_model(files / "model.onnx")

    save(read(), "model")
    data = nncf.Dataset(list(calibration_pairs(directory)))
    save(
        nncf.quantize(read(), data, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION_PAIRS),
        "static",
    )
    save(nncf.compress_weights(read(), mode=nncf.CompressWeightsMode.INT8_SYM), "weights")


def calibration_pairs(directory: Path) -> Iterator[Batch]:
    """Give pairs from the Python language reference, which comes with Python: a topic's title and a passage."""
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    passages = [
        (text.splitlines()[0], text[start : start + 1000])
        for text in topics.values()
        for start in range(0, len(text), 1000)
    ]
    for title, passage in Random(0).sample(passages, CALIBRATION_PAIRS):
        yield dict(tokenizer(title, passage, truncation="only_second", return_tensors="np"))
