"""The process: `gptcli`, or `python -m gptcli`.

Kept apart from `gptcli.cli.main` so that Ctrl+C while Python still imports ends without a traceback too, and so that
the garbage collector rests until the command line is understood (a tenth of the time of `--help`).
"""

import gc
import os
import sys


def run() -> None:
    """Run the command line and leave with the exit code of `gptcli.errors`."""
    gc.disable()
    try:
        from gptcli.cli.main import main

        gc.enable()
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        os.write(2, b"\nstopped\n")
        os._exit(130)
    sys.exit(code)


if __name__ == "__main__":
    run()
