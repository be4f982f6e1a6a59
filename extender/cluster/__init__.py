"""The extender's ways to the API server: what it hears (feed), what it writes, and whether it may (writership)."""
