from __future__ import annotations

from gptcli.train.compiling import reason


def test_what_a_compiler_said_becomes_one_line() -> None:
    assert reason(RuntimeError("\n no such thing\nand a long story")) == "RuntimeError: no such thing"
    assert reason(ValueError("InvalidCxxCompiler: none found\nmore")) == "InvalidCxxCompiler: none found"
    assert reason(ValueError()) == "ValueError: "
    assert len(reason(ValueError("x" * 999))) == 200
