"""Which GPUs may be given to new pods: troubles, what ends them, and what an administrator keeps back."""
