"""The `flexattn` command: doctor, explain, mask, bench, demo.

In: words of a command line. Out: tables and pictures on a terminal, or JSON. Needs the packages of
`flexattn[cli]` (typer and what it brings), and says so where they are missing.
"""

from __future__ import annotations

import sys

_REMEDY = "The flexattn command needs packages that are not installed.\n" \
          "  remedy:   pip install 'flexattn[cli]'"


def main() -> None:
    """The entry point of the command."""
    try:
        from flexattn.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("typer", "rich", "click"):
            sys.exit(f"{_REMEDY}\n  got:      {error}")
        raise
    app()
