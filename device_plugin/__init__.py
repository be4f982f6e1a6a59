"""The device plugin: tells the kubelet which GPU memory this node has, and hands a container the share it was granted."""
