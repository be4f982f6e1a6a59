"""What others have of this node's GPUs: pods that went around the extender, other plugins, processes outside pods."""
