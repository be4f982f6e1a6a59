"""The kubelet's gRPC interfaces: our own .proto files and the code generated from them (scripts/generate-stubs.sh)."""
