"""llama.cpp's converter with the name of a tokenizer's division given, where it would look for a hash that it knows.

Run as a program of its own: gguf_named.py CONVERTER NAME ARGUMENTS... It is not imported by gptcli.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def main(converter: Path, name: str, arguments: list[str]) -> None:
    """Run a converter whose class of text models answers `name`."""
    sys.path.insert(0, str(converter.parent))
    sys.argv = [str(converter), *arguments]
    program: Any = importlib.import_module(converter.stem)
    try:
        classes: Any = importlib.import_module("conversion.base")  # where they are since 2026
    except ModuleNotFoundError:
        classes = program
    kind: Any = getattr(classes, "TextModel", None)
    if not hasattr(kind, "get_vocab_base_pre"):
        sys.exit("this converter has no TextModel.get_vocab_base_pre; take llama.cpp's of 2025 or later")
    kind.get_vocab_base_pre = lambda self, tokenizer: name
    program.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2], sys.argv[3:])
