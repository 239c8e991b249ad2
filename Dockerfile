# The server alone. docs/docker.md says how to build and run it. The compiler stays in the first stage.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir "uv>=0.9,<1"
ENV UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy
WORKDIR /source
# torch comes first, as PyTorch's build for CPUs: it is large and seldom changes.
COPY constraints.txt ./
RUN uv venv --python /usr/local/bin/python3 /opt/grating \
    && uv pip install --python /opt/grating --torch-backend cpu --constraint constraints.txt torch
COPY kernels kernels
RUN uv pip install --python /opt/grating ./kernels
COPY pyproject.toml requirements.lock hatch_build.py README.md LICENSE ./
COPY grating_core grating_core
ARG EXTRAS=demo,serve
RUN uv pip install --python /opt/grating --constraint requirements.lock ".[${EXTRAS}]"

FROM python:${PYTHON}-slim-bookworm
RUN useradd --uid 10001 --create-home grating \
    && install --directory --owner grating --group grating /cache
COPY --from=build /opt/grating /opt/grating
ENV PATH=/opt/grating/bin:$PATH GRATING_CACHE=/cache/grating HF_HOME=/cache/huggingface
USER 10001
WORKDIR /home/grating
VOLUME /cache
EXPOSE 8080
# Failures count after five minutes: a model may have to be downloaded first.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["grating", "serve", "--host", "0.0.0.0", "--port", "8080"]
CMD ["bundled:ms-marco-minilm-l12"]
