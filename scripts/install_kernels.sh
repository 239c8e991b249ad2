#!/usr/bin/env bash
# Builds kernels/ and installs it into the virtual environment $1, which has what the lock names. The wheel stays there, for other
# environments. Without a C++ compiler it says so, which is no failure: grating computes in torch then.
set -euo pipefail
environment=$1
wheels="$environment/kernels"
log="$environment/kernels.log"
root="$(dirname "$0")/.."

echo "Building the kernels ..."
rm -rf "$wheels"
if "$environment/bin/python" -m pip wheel --no-deps --no-build-isolation --wheel-dir "$wheels" "$root/kernels" >"$log" 2>&1
then
    "$environment/bin/python" -m pip install -qq --no-deps --no-index --force-reinstall "$wheels"/*.whl
    exit
fi
# What was built from older sources does not stay.
"$environment/bin/python" -m pip uninstall -qq --yes grating-kernels
if grep -q "No C++ compiler" "$log"; then
    echo "No C++ compiler: grating computes in torch, more slowly, until 'make kernels' finds one."
else
    echo "The kernels could not be built ($log says why): grating computes in torch, more slowly." >&2
    exit 1
fi
