"""Another policy beside the one that decides."""
