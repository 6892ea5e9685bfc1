"""A command that only launches: `parent.py OPTIONS BEHAVIOUR FOLDER`, the options of `launch` as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gptcli.cli.main as cli
from gptcli.cli.console import console
from gptcli.launch import launch

if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    worker = str(Path(__file__).with_name("worker.py"))
    cli.build_app = lambda wanted: (
        lambda args, standalone_mode: launch(  # type: ignore[assignment,misc]
            args, entrypoint=[worker], warn=console().warn, **options
        )
    )
    sys.exit(cli.main(sys.argv[2:]))
