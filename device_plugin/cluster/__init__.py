"""What the plugin reads from the API server, and tells it, beside the inventory."""
