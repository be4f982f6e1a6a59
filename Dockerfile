# One image, two programs: the manifests say which one a container runs (cotenant-extender, cotenant-device-plugin).
# linux/amd64 and linux/arm64; e2e/dockerfile.py runs these lines without a container engine, for `make e2e`.
#
#   docker buildx build --platform linux/amd64,linux/arm64 --provenance=true --sbom=true --tag REGISTRY/cotenant:0.2.0 --push .

# Debian's own Python: half the size of Docker's image of Python, and mended with the rest of the system.
FROM debian:bookworm-slim AS base
RUN apt-get update -qq \
    && apt-get install --yes -qq --no-install-recommends python3 ca-certificates >/dev/null \
    && rm -rf /var/lib/apt/lists/* /var/cache/*

FROM base AS build
RUN apt-get update -qq && apt-get install --yes -qq --no-install-recommends python3-venv >/dev/null
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --quiet --no-cache-dir uv==0.13.9
ENV UV_PROJECT_ENVIRONMENT=/opt/cotenant UV_PYTHON=/usr/bin/python3 UV_PYTHON_DOWNLOADS=never
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy
WORKDIR /src
# The dependencies first, exactly those of the lock file: they change less often than the code.
COPY pyproject.toml uv.lock ./
RUN /opt/uv/bin/uv sync --quiet --frozen --no-default-groups --no-install-project
# The Kubernetes client's asynchronous twin, which nothing of ours imports, is half of what all dependencies weigh.
RUN rm -rf /opt/cotenant/lib/python3.*/site-packages/kubernetes/aio /opt/cotenant/lib/python3.*/site-packages/numpy/*/tests
COPY README.md LICENSE ./
COPY cotenant cotenant
COPY extender extender
COPY device_plugin device_plugin
RUN /opt/uv/bin/uv sync --quiet --frozen --no-default-groups --no-editable

FROM base
COPY --from=build /opt/cotenant /opt/cotenant
COPY LICENSE /usr/share/doc/cotenant/LICENSE
ENV PATH=/opt/cotenant/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin PYTHONUNBUFFERED=1
# Else NumPy begins a thread for each core of the node, which spin after a large product and use up the container's CPU.
ENV OPENBLAS_NUM_THREADS=1
# The device plugin's manifest overrides this: the kubelet's directories belong to root.
USER 65532:65532
CMD ["cotenant", "--help"]
