"""A newcomer's way: install from a clone on a whole cluster, share a GPU, look, explain, uninstall."""
