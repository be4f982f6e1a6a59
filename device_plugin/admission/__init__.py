"""Which container the kubelet is asking for, what it was granted, and what it gets."""
