#!/usr/bin/env bash
# Writes into the file $1 what our distributions need, for Python 3.11 and newer; further arguments are uv's,
# such as --group. It names no index, so that every machine takes the files from its own; hashes say that they are the same.
# torch is left out: which build is right depends on the machine, and each has its own hash (scripts/install_torch.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
output=$1
shift

printf '%s\n' '-e .[demo,gguf,mcp,plot,serve,telemetry]' '-e integrations/langchain[langgraph]' '-e integrations/llamaindex' \
    '-e integrations/llamaindex-llms' |
    "${UV:-uv}" pip compile - --quiet --output-file "$output" --python-version 3.11 --constraint constraints.txt \
        --no-header --no-annotate --no-emit-index-url --no-emit-package torch --no-emit-package grating-core \
        --no-emit-package langchain-grating --no-emit-package llama-index-postprocessor-grating \
        --no-emit-package llama-index-llms-grating "$@"
