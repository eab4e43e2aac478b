# Two images: `api` (the API, migrations; no torch) and `worker` (CPU slots: validation, training of small models).
# A build against another package index: docker build --build-arg PIP_EXTRA_INDEX_URL=… --target worker .
# (the worker's torch is the CPU build there if that index has it; the default one brings CUDA along).

FROM python:3.11-slim AS base
ARG PIP_EXTRA_INDEX_URL
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --uid 10001 --create-home nibble \
    && mkdir /data && chown nibble: /data
WORKDIR /app
COPY pyproject.toml constraints.txt README.md models.toml ./
COPY api api
COPY worker worker
COPY service service
COPY qlora_core qlora_core
COPY nibble nibble
COPY operations operations
COPY migrations migrations
COPY examples/tiny-llama examples/tiny-llama
ENV NIBBLE_DATA_DIR=/data NIBBLE_MODELS_FILE=/app/models.toml
VOLUME /data

FROM base AS api
RUN pip install -c constraints.txt '.[server]'
USER nibble
ENV NIBBLE_HOST=0.0.0.0 NIBBLE_PORT=8000
EXPOSE 8000
CMD ["python", "-m", "api"]

FROM base AS worker
RUN pip install -c constraints.txt '.[server,engine]'
USER nibble
CMD ["python", "-m", "worker"]
