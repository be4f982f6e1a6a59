"""Logging of both programs: one JSON object a line on stderr, with the same keys everywhere.

Fixed keys: ``pod`` (namespace/name), ``pod_uid``, ``node``, ``gpu`` (UUID), ``verb``, ``reason``, ``generation``.
"""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog


def configure(program: str, **constant: str) -> None:
    """Send structlog's and the libraries' own lines to stderr, each with *program* and the *constant* keys."""

    # not structlog's contextvars: what one thread binds there the others do not see
    def add_constant(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        return {"program": program, **constant, **line}

    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        add_constant,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
