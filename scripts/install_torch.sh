#!/usr/bin/env bash
# Installs torch into the virtual environment $1, as the CPU build where there is no NVIDIA driver: the default Linux
# wheel brings several gigabytes of CUDA libraries that such a machine cannot use. It takes the version of
# constraints.txt; with "newest" as $2 the newest that pyproject.toml allows, where that can be had as a CPU build.
# What the CPU build needs besides is in the files that scripts/resolve.sh writes.
set -euo pipefail
python="$1/bin/python"
root="$(dirname "$0")/.."
wanted="torch==$(sed -n 's/^torch==//p' "$root/constraints.txt")"
newest=$(sed -n 's/^ *"\(torch>.*\)",$/\1/p' "$root/pyproject.toml")

without_gpu() {
    [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1
}

from_pytorch() { # uv knows where PyTorch publishes its CPU builds
    if [ -z "${UV:-}" ]; then
        "$python" -m pip install --quiet uv
        UV="$1/bin/uv"
    fi
    "$UV" pip install --quiet --python "$python" --no-deps --torch-backend cpu --upgrade-package torch "$2"
}

if [ "${2:-}" = newest ]; then
    if without_gpu; then
        from_pytorch "$1" "$newest" 2>/dev/null && exit 0
        echo "No newer CPU build of torch can be had here: going on with $wanted"
    else
        exec "$python" -m pip install --quiet --upgrade "$newest"
    fi
fi

if "$python" -c "import torch" 2>/dev/null; then
    exit 0
fi
without_gpu || exec "$python" -m pip install --quiet "$wanted"
# A local index or wheel folder may hold the CPU build.
"$python" -m pip install -qq --no-deps "$wanted+cpu" 2>/dev/null || from_pytorch "$1" "$wanted"
