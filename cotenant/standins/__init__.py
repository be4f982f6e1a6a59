"""Stand-ins for the API server, kube-scheduler and the kubelet, for the demo and the tests."""
