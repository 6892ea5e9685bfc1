from __future__ import annotations

import pytest
import torch

from gptcli.train.compiling import failure


def nothing() -> None:
    pass


def fails(error: Exception) -> None:
    raise error


def test_what_only_the_compiled_way_does_not_do_is_told_in_a_line() -> None:
    assert failure(nothing, nothing) is None
    reason = failure(lambda: fails(RuntimeError("no such thing\nand a long story")), nothing)
    assert reason == "RuntimeError: no such thing"


def test_what_fails_both_ways_is_no_fault_of_the_compiler() -> None:
    with pytest.raises(ValueError, match="plain"):
        failure(lambda: fails(RuntimeError("compiled")), lambda: fails(ValueError("plain")))


def test_a_lack_of_memory_is_raised() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        failure(lambda: fails(torch.OutOfMemoryError("full")), nothing)
