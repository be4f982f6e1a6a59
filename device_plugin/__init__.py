"""The device plugin: tells the kubelet what GPU memory this node has, and hands containers what they were granted."""
