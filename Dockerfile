# The trainer with all that it needs but the GPU's driver: `docker build -t phased-consistency .` (docs/cloud.md)
FROM python:3.12-slim-bookworm

# The compiler is Triton's, for train.compile; any version will do. The user is at home in the volume.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --home-dir /data --uid 1000 pcm

# a layer of its own: these gigabytes, CUDA's libraries among them, stay as they are when the code changes
ARG TORCH="torch>=2.10"
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "${TORCH}"

WORKDIR /opt/phased-consistency
COPY pyproject.toml README.md LICENSE __init__.py py.typed ./
COPY nodes nodes
COPY samplers samplers
COPY trainer trainer
COPY locales locales
COPY workflows workflows
# pyproject.toml says which versions
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[train,quantize,optimizers]"

# so that a user whom the image does not know (`--user`) has a name and a place for caches
ENV HOME=/data \
    USER=pcm \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /data
VOLUME /data
ENTRYPOINT ["pcm"]
CMD ["doctor"]
