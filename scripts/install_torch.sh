#!/usr/bin/env bash
# Installs torch into the virtual environment given as $1, as the CPU build where there is no NVIDIA driver:
# the default Linux wheel brings several gigabytes of CUDA libraries that such a machine cannot use.
set -euo pipefail
python="$1/bin/python"
version=$(sed -n 's/^torch==//p' "$(dirname "$0")/../constraints.txt")

if "$python" -c "import torch" 2>/dev/null; then
    exit 0
fi
if [ "$(uname -s)" != Linux ] || nvidia-smi >/dev/null 2>&1; then
    exec "$python" -m pip install --quiet "torch==$version"
fi
# A local index or wheel folder may hold the CPU build; otherwise uv knows where PyTorch publishes it.
if "$python" -m pip install --quiet "torch==$version+cpu" 2>/dev/null; then
    exit 0
fi
"$python" -m pip install --quiet uv
exec "$1/bin/uv" pip install --quiet --python "$python" --torch-backend cpu "torch==$version"
