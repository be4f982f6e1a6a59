"""HTTP: the only package that knows Flask and the server behind it."""
