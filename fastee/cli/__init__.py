"""The ``fastee`` command."""

from fastee.cli.app import app, main

__all__ = ["app", "main"]
