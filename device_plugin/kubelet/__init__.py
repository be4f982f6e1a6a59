"""What the plugin and the kubelet say to each other over gRPC."""
