"""The ways in which this node's GPUs are counted: which GPU is in which, and how each answers the kubelet."""
