"""The device plugin: tells the kubelet what GPU memory this node has, and hands containers what they were granted."""

import os

# Read when gRPC is loaded, which is after this: its C core would put lines that are no JSON among our log lines.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
