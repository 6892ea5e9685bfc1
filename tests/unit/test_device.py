"""Cards by the names that their drivers give them, where a name that is not known has no peak; memory used again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gptcli.device import CARDS, card_named, data_sheet_flops


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA A40", 149.7),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("Tesla T4", 65),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_a_known_card_has_its_data_sheets_peak(name: str, teraflops: float) -> None:
    assert data_sheet_flops(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000",
        "NVIDIA RTX A4000",
        "NVIDIA T400 4GB",
        "Quadro RTX 6000",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "GRID A100-10C",
        "",
    ],
)
def test_a_card_that_only_looks_like_one_has_none(name: str) -> None:
    assert data_sheet_flops(name) is None


def test_every_card_is_found_by_its_own_name_and_by_its_drivers() -> None:
    for card in CARDS:
        assert card_named(card.slug) is card
        assert data_sheet_flops(f"NVIDIA {card.name} ZZZ") == card.flops


@pytest.mark.parametrize(
    "name, gigabytes, capability",
    [
        ("h100", 80, (9, 0)),
        ("H200", 141, (9, 0)),
        ("a100-40gb", 40, (8, 0)),
        ("a100-80gb", 80, (8, 0)),
        ("NVIDIA A100-SXM-80GB", 80, (8, 0)),
        ("l40s", 48, (8, 9)),
        ("v100-16gb", 16, (7, 0)),
        ("v100-32gb", 32, (7, 0)),
        ("t4", 16, (7, 5)),
        ("NVIDIA GeForce RTX 4090", 24, (8, 9)),
        ("rtx_3090", 24, (8, 6)),
        ("b200", 180, (10, 0)),
        ("mi300x", 192, (9, 4)),
    ],
)
def test_a_card_has_its_memory_and_generation(name: str, gigabytes: int, capability: tuple[int, int]) -> None:
    card = card_named(name)
    assert card is not None
    assert (card.gigabytes, card.capability) == (gigabytes, capability)


@pytest.mark.parametrize("name", ["h1000", "a100-60gb", "rtx", "rtx-4090-laptop", "80gb", "", "cpu"])
def test_a_name_that_is_nearly_a_cards_is_none(name: str) -> None:
    assert card_named(name) is None


# Pages that come new from the system while the same sizes are taken and freed; in a thread too, as in the second half
# of a micro-batch.
PAGES = """
import platform, resource, sys, threading
import numpy as np
from gptcli.device import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    def work():
        for _ in range(5):
            kept = [np.ones(16 << 20, dtype=np.uint8) for _ in range(5)]
            del kept
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "kept":
    keep_freed_memory(one_heap=True)
new_pages()
print(platform.libc_ver()[0] or "other", new_pages())
"""


def new_pages(how: str, **variables: str) -> tuple[str, int]:
    command = [sys.executable, "-c", PAGES, how]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env={**plain, **variables})
    library, pages = done.stdout.split()
    return library, int(pages)


def test_memory_that_is_kept_is_not_taken_from_the_system_again() -> None:
    library, kept = new_pages("kept")
    if library != "glibc":
        pytest.skip("only glibc's heap can be told to keep what is freed")
    assert kept < new_pages("given back")[1] / 50
    assert kept < new_pages("kept", MALLOC_MMAP_THRESHOLD_="1048576")[1] / 50  # who sets it has it as it is set
