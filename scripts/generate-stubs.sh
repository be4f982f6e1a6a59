#!/bin/sh
# Generates device_plugin/api/*_pb2.py, *_pb2.pyi and *_pb2_grpc.py from the .proto files beside them.
# Usage: generate-stubs.sh [FOLDER]   (writes under FOLDER instead of the repository)
#
# The generator is pinned: generated code refuses every grpcio and protobuf older than the generator's own, so these
# are the floors in pyproject.toml (grpcio 1.78, protobuf 6.31). $PYTHON may name an interpreter that has it.
set -eu
cd "$(dirname "$0")/.."
generator=grpcio-tools==1.78.0
${PYTHON:-uv run --no-project --with "$generator" python} -m grpc_tools.protoc --proto_path=. \
    --python_out="${1:-.}" --pyi_out="${1:-.}" --grpc_python_out="${1:-.}" \
    device_plugin/api/deviceplugin.proto device_plugin/api/podresources.proto
# The generator leaves its Mapping parameters bare.
sed -i '1i # mypy: disable-error-code="type-arg"' "${1:-.}"/device_plugin/api/*_pb2.pyi
