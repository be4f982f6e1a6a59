# One image, two programs: the manifests say which one a container runs (cotenant-extender, cotenant-device-plugin).
#
#   docker build --tag cotenant:0.1.0 .

FROM python:3.11-slim AS build
RUN pip install --no-cache-dir uv==0.13.9
ENV UV_PROJECT_ENVIRONMENT=/opt/cotenant \
    UV_PYTHON_DOWNLOADS=never \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy
WORKDIR /src
# The dependencies first, exactly those of the lock file: they change less often than the code.
COPY pyproject.toml uv.lock ./
RUN uv sync --frozen --no-default-groups --no-install-project
COPY README.md LICENSE ./
COPY cotenant cotenant
COPY extender extender
COPY device_plugin device_plugin
RUN uv sync --frozen --no-default-groups --no-editable

FROM python:3.11-slim
COPY --from=build /opt/cotenant /opt/cotenant
ENV PATH=/opt/cotenant/bin:$PATH \
    PYTHONUNBUFFERED=1
# The device plugin's manifest overrides this: the kubelet's directories belong to root.
USER 65532:65532
CMD ["cotenant", "--help"]
