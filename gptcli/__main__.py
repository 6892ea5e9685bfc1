"""The process: `gptcli`, or `python -m gptcli`.

Kept apart from `gptcli.cli.main` so that Ctrl+C while Python still imports ends without a traceback too.
"""

import gc
import os
import signal
import sys
from typing import Any

# Long enough to be out of the code that cannot raise, too short to be noticed.
AGAIN_SECONDS = 0.01


def run() -> None:
    """Run the command line and leave with the exit code of `gptcli.errors`."""
    # A collection every 700 new objects, Python's default, is a tenth of the time until a recipe error is printed.
    gc.set_threshold(50_000)
    # Read when torch loads its OpenMP: threads that wait spin for some microseconds, then sleep. Beside another process
    # on the same cores longer spinning made training up to nine times slower, and none at all costs a tenth of a small
    # model's step (benchmarks/waiting.py).
    if os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE") == "PASSIVE":
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # A file's name may hold bytes that are no UTF-8: shown as \udcff, as on standard error, not a crash.
    if sys.stdout is not None:  # None: it was closed
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # Until training has its own handlers, SIGTERM ends a command as Ctrl+C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.unraisablehook = _repeat_interrupt
    try:
        from gptcli.cli.main import main

        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        os.write(2, b"\nstopped\n")
        os._exit(130)
    sys.exit(code)


def _repeat_interrupt(ignored: Any) -> None:
    """Ctrl+C that fell into a destructor or a callback, where Python drops what is raised: let it come once more."""
    if not isinstance(ignored.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(ignored)
        return
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)


if __name__ == "__main__":
    run()
