"""`cotenant migrate`: read what was written for other ways of sharing GPUs, and print what says the same to us."""

from cotenant.cli.migrate.documents import Migrated, migrated
from cotenant.cli.migrate.systems import Options

__all__ = ["Migrated", "Options", "migrated"]
