# The producers' side: API, dispatcher and migration are this one image with another command. It holds no torch.
#   docker build -f docker/producer.Dockerfile -t ovis-batch/producer .
ARG BASE=python:3.11.15-slim-bookworm

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/ovis
WORKDIR /app
# The dependencies are a layer of their own: a change of the code does not install them again.
COPY pyproject.toml constraints.txt ./
RUN python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > requirements.txt \
    && /opt/ovis/bin/pip install -c constraints.txt -r requirements.txt
COPY . .
# Editable: the migrations are found beside the packages, in /app.
RUN /opt/ovis/bin/pip install --no-deps -e . \
    && /opt/ovis/bin/pip uninstall --yes pip setuptools \
    && /opt/ovis/bin/python -m compileall -q pipeline producer migrations

FROM ${BASE}
RUN groupadd --gid 10001 ovis \
    && useradd --uid 10001 --gid ovis --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin ovis
WORKDIR /app
COPY --from=build /opt/ovis /opt/ovis
COPY --from=build /app/LICENSE /app/pyproject.toml ./
COPY --from=build /app/docker docker
COPY --from=build /app/migrations migrations
COPY --from=build /app/pipeline pipeline
COPY --from=build /app/producer producer
ENV PATH=/opt/ovis/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    OVIS_API_HOST=0.0.0.0 \
    OVIS_API_PORT=8000
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["sh", "-c", "exec python docker/healthy.py http://127.0.0.1:$OVIS_API_PORT/healthz"]
ENTRYPOINT ["ovis-batch"]
CMD ["api"]
