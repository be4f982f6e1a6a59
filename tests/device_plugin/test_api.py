"""The checked-in stubs are those of the .proto files, and the .proto files are the kubelet's wire."""

from importlib import resources
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor

from device_plugin.api import deviceplugin_pb2, podresources_pb2

ROOT = Path(__file__).parents[2]
# Where a Go module cache holds the kubelet's own files, they are compared with ours.
UPSTREAM = Path.home() / "go/pkg/mod/k8s.io/kubelet@v0.36.3/pkg/apis"

FILES = pytest.mark.parametrize(
    ("generated", "upstream"),
    [
        pytest.param(deviceplugin_pb2.DESCRIPTOR, "deviceplugin/v1beta1/api.proto", id="deviceplugin"),
        pytest.param(podresources_pb2.DESCRIPTOR, "podresources/v1/api.proto", id="podresources"),
    ],
)


def compiled(proto: Path, include: Path, tmp_path: Path) -> descriptor_pb2.FileDescriptorProto:
    """Compile one .proto file to its descriptor with whichever protoc grpcio-tools brings."""
    protoc = pytest.importorskip(
        "grpc_tools.protoc",
        reason="grpcio-tools is not installed (uv sync --group stubs), so nothing can compile protos",
    )
    out = tmp_path / "descriptors"
    well_known = resources.files("grpc_tools").joinpath("_proto")
    arguments = ["protoc", f"-I{include}", f"-I{well_known}", f"--descriptor_set_out={out}", str(proto)]
    assert 0 == protoc.main(arguments)
    return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file[0]


def fields(file: descriptor_pb2.FileDescriptorProto) -> set[tuple[str, str, int, int, int, str]]:
    """Every field of every message: message, name, number, label, type, type's name."""
    found: set[tuple[str, str, int, int, int, str]] = set()
    pending = [(message.name, message) for message in file.message_type]
    while pending:
        path, message = pending.pop()
        found.update((path, f.name, f.number, f.label, f.type, f.type_name) for f in message.field)
        pending += [(f"{path}.{inner.name}", inner) for inner in message.nested_type]
    return found


def methods(file: descriptor_pb2.FileDescriptorProto) -> set[tuple[str, str, str, str, bool, bool]]:
    """Every method of every service: service, name, request, response, which of them are streams."""
    return {
        (service.name, m.name, m.input_type, m.output_type, m.client_streaming, m.server_streaming)
        for service in file.service
        for m in service.method
    }


def descriptor(generated: FileDescriptor) -> descriptor_pb2.FileDescriptorProto:
    """Read back the descriptor that the generated module carries."""
    file = descriptor_pb2.FileDescriptorProto()
    generated.CopyToProto(file)  # type: ignore[no-untyped-call, unused-ignore]
    return file


@FILES
def test_the_checked_in_stubs_are_those_of_the_proto_files(
    generated: FileDescriptor,
    upstream: str,  # noqa: ARG001 - the other test's
    tmp_path: Path,
) -> None:
    proto = compiled(ROOT / generated.name, ROOT, tmp_path)
    stubs = descriptor(generated)
    assert (proto.package, fields(proto), methods(proto)) == (stubs.package, fields(stubs), methods(stubs))


@FILES
def test_the_wire_is_the_kubelets(generated: FileDescriptor, upstream: str, tmp_path: Path) -> None:
    if not (UPSTREAM / upstream).exists():
        pytest.skip(f"{UPSTREAM / upstream} is not there: no Go module cache with the kubelet's API on this machine")
    theirs = compiled(UPSTREAM / upstream, (UPSTREAM / upstream).parent, tmp_path)
    ours = descriptor(generated)
    assert ours.package == theirs.package
    assert fields(ours) <= fields(theirs)
    assert methods(ours) <= methods(theirs)
