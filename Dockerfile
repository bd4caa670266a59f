# syntax=docker/dockerfile:1
# One image for the head and for the workers of a cluster:
#
#   docker build -t launch .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/runs:/workspace/runs" launch experiment=mnist
#
# BASE needs apt and Python 3.11 to 3.13. PyTorch brings its own CUDA libraries, of the release named here; the driver on
# the host has to be at least as new as BASE asks. `--build-arg BASE=ubuntu:24.04` makes a smaller image with the same
# PyTorch. No compiler is left in it: for `trainer.compile=true`, which generates C, add gcc and python3-dev in an image
# of your own `FROM launch`.
ARG BASE=nvidia/cuda:13.0.2-runtime-ubuntu24.04

# --- dependencies: what locks/linux.txt pins, with hashes, in an environment of its own --------------------------------------------
FROM ${BASE} AS dependencies

ENV DEBIAN_FRONTEND=noninteractive \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

# Ubuntu's packages follow the tag of BASE: a version pinned here vanishes from the mirrors with its next fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/launch
ENV PATH=/opt/launch/bin:$PATH
WORKDIR /src

# Without our code, so that a change of it neither installs nor sends these gigabytes again.
COPY locks locks
RUN pip install --require-hashes --requirement locks/linux.txt

# --- package: our code as a wheel -------------------------------------------------------------------------------------
FROM dependencies AS package

COPY pyproject.toml LICENSE ./
COPY launcher launcher
COPY conf conf
COPY models models
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

# --- the image: the same base and the two above, without compilers ----------------------------------------------------
FROM ${BASE}

LABEL org.opencontainers.image.title="launch" \
      org.opencontainers.image.description="Distributed PyTorch training from one command: head and workers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.2.0"

# git: a run's record holds the commit and the uncommitted changes. openssh-client and rsync: Ray's cluster launcher
# carries files with them. procps and wget: health checks of Ray and Kubernetes.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates git openssh-client procps python3 rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --no-log-init --create-home --uid 10001 --shell /bin/bash launch \
    && install --directory --owner=launch --group=launch /workspace

COPY --from=dependencies /opt/launch /opt/launch
ENV PATH=/opt/launch/bin:$PATH \
    PYTHONUNBUFFERED=1
RUN --mount=type=bind,from=package,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps --no-index /wheels/*.whl \
    && launch --help >/dev/null

# By number, so that Kubernetes can tell that it is not root.
USER 10001
WORKDIR /workspace
ENTRYPOINT ["launch"]
CMD ["--help"]
