# One worker process for each GPU that the container is given, under a supervisor; or one on the CPU.
#   docker build -f docker/worker.Dockerfile -t ovis-batch/worker .
#   docker build -f docker/worker.Dockerfile -t ovis-batch/worker-cpu \
#     --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu .
#
# The base is plain Python and not an nvidia/cuda image: torch's Linux wheels on PyPI bring the CUDA libraries that
# they were built with, so an image with CUDA inside would carry them twice, in two versions. The host gives the
# driver alone (through the NVIDIA container toolkit).
# One stage: a second one would only copy several GB of wheels. The C compiler stays in, for torch compiles the model's
# kernels when a worker starts.
ARG BASE=python:3.11.15-slim-bookworm
FROM ${BASE}

# Empty: torch from PyPI, with CUDA. Else one of PyTorch's own indexes: .../whl/cpu, or an older CUDA for an older driver.
ARG TORCH_INDEX_URL=

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# hadolint ignore=DL3008  # Debian keeps no older version: a pinned one could not be installed for long
RUN apt-get update \
    && apt-get install --no-install-recommends -y gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 ovis \
    && useradd --uid 10001 --gid ovis --no-create-home --home-dir /var/lib/ovis --shell /usr/sbin/nologin ovis \
    && install -d -o ovis -g ovis /var/lib/ovis \
    && python3 -m venv /opt/ovis
WORKDIR /app
# Several GB: a layer of their own, which a change of the code does not touch.
COPY pyproject.toml constraints.txt ./
# torch alone comes from that index; what it depends on comes from PyPI with the rest, in the versions of constraints.txt.
RUN if [ -n "${TORCH_INDEX_URL}" ]; then \
        /opt/ovis/bin/pip install --no-deps --index-url "${TORCH_INDEX_URL}" "$(grep '^torch==' constraints.txt)"; \
    fi
RUN python3 -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*p["dependencies"], *p["optional-dependencies"]["worker"], sep="\n")' \
        > /tmp/requirements.txt \
    && /opt/ovis/bin/pip install -c constraints.txt -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt
COPY . .
# Editable: the migrations, against which the worker checks the schema, are found beside the packages.
RUN /opt/ovis/bin/pip install --no-deps -e . \
    && rm -rf ./*.egg-info \
    && /opt/ovis/bin/python -m compileall -q pipeline producer worker migrations

# Everything that is written goes to /var/lib/ovis: a volume there keeps the weights over a new container.
ENV PATH=/opt/ovis/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/ovis \
    HF_HOME=/var/lib/ovis/huggingface \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    OVIS_DATA_DIR=/var/lib/ovis \
    OVIS_METRICS_HOST=0.0.0.0 \
    OVIS_METRICS_PORT=9100
USER 10001:10001
EXPOSE 9100
# The first worker's metrics, which answer while the model is still being loaded, too; the next worker's port is one
# higher. Docker only reports it; that a step hangs is seen by the worker itself.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30m --retries=4 \
    CMD ["sh", "-c", "exec python docker/healthy.py http://127.0.0.1:$OVIS_METRICS_PORT/metrics"]
# The exec form: SIGTERM reaches the supervisor, which passes it on, and workers give back what they cannot finish.
ENTRYPOINT ["python", "-m", "worker"]
