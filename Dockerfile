# Two images of one lock: `--target cpu` for heads and replicas, `--target cuda` for ranks on GPUs. docs/install.md has the commands.
# Starts offline: the model comes as package data, and no hub is asked.

FROM python:3.11.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PATH=/opt/plora/bin:$PATH
WORKDIR /build
RUN python -m venv /opt/plora
COPY requirements.lock ./
RUN pip install --constraint requirements.lock setuptools

# torch without CUDA has the same version elsewhere: TORCH_INDEX is the address of a package index with such builds.
FROM build AS cpu-torch
ARG TORCH_INDEX
RUN test -n "$TORCH_INDEX" || { echo "give --build-arg TORCH_INDEX=..., an index with CPU builds of torch" >&2; exit 1; }
RUN pip install --constraint requirements.lock --no-deps --index-url "$TORCH_INDEX" torch

# The default build brings its CUDA libraries as packages; a driver comes from the node.
FROM build AS cuda-torch
RUN pip install --constraint requirements.lock torch

# The project with what it needs to run, in the locked versions; tools for tests stay out.
FROM cpu-torch AS cpu-build
ARG EXTRAS=embedded
COPY pyproject.toml README.md LICENSE ./
COPY plora_ray plora_ray
COPY deployments deployments
COPY cluster cluster
RUN pip install --constraint requirements.lock --no-build-isolation ".[$EXTRAS]"

FROM cuda-torch AS cuda-build
ARG EXTRAS=embedded
COPY pyproject.toml README.md LICENSE ./
COPY plora_ray plora_ray
COPY deployments deployments
COPY cluster cluster
RUN pip install --constraint requirements.lock --no-build-isolation ".[$EXTRAS]"

FROM python:3.11.11-slim-bookworm AS runtime
ENV PATH=/opt/plora/bin:$PATH HOME=/home/plora PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0
# A login shell, with which some operators start Ray, forgets the PATH of the image.
RUN echo 'export PATH=/opt/plora/bin:$PATH' > /etc/profile.d/plora.sh && \
    groupadd --gid 1000 plora && useradd --uid 1000 --gid 1000 --create-home --home-dir /home/plora plora
WORKDIR /home/plora

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda-build /opt/plora /opt/plora
USER 1000:1000
CMD ["plora", "--help"]

# Last, so that it is the default.
FROM runtime AS cpu
COPY --from=cpu-build /opt/plora /opt/plora
USER 1000:1000
CMD ["plora", "--help"]
