"""What the benchmarks share: the memory of a process tree, a small model, and lines that say what was measured on."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

MEBI = 1 << 20
POLL_SECONDS = 0.002
END = "<|endoftext|>"


class Sampler:
    """A thread that reads the memory of a process and its descendants and keeps the peaks of the sums."""

    def __init__(self, root: int, interval_seconds: float = 0.05) -> None:
        self.anonymous_bytes = 0
        self.rss_bytes = 0
        self._root = root
        self._interval_seconds = interval_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            sizes = [memory(pid) for pid in tree(self._root)]
            self.anonymous_bytes = max(self.anonymous_bytes, sum(size[0] for size in sizes))
            self.rss_bytes = max(self.rss_bytes, sum(size[1] for size in sizes))
            self._ended.wait(self._interval_seconds)


def tree(root: int) -> list[int]:
    """The process and all its descendants."""
    found = [root]
    for pid in found:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # the thread has ended
                found += map(int, children.read_text().split())
    return found


def memory(pid: int) -> tuple[int, int]:
    """(anonymous proportional bytes, resident bytes) of a process, (0, 0) for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    sizes = {name: int(value.split()[0]) << 10 for name, value in (line.split(":", 1) for line in lines)}
    return sizes.get("Pss_Anon", 0), sizes.get("Rss", 0)


def print_machine(libraries: tuple[str, ...]) -> None:
    """The date, the machine and the versions of libraries, in two lines."""
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    cores = len(os.sched_getaffinity(0))
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    print(f"{datetime.date.today()}: {cpu()}, {cores} cores, {memory_gib:.0f} GiB; Linux {platform.release()}")
    print(f"Python {platform.python_version()}, {versions}")


def cpu() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def version(name: str) -> str:
    """The installed version of a library, or "not installed"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def seconds_until(ready: Callable[[], bool], command: list[str], folder: Path) -> float:
    """Seconds from the start of a command in `folder`, its cache there, until something is so; then it is killed."""
    environment = {**os.environ, "GPTCLI_CACHE": str(folder / "cache")}
    with (folder / "errors.txt").open("w") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=errors)
        while not ready():
            if process.poll() is not None:
                said = (folder / "errors.txt").read_text()
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode} too early: {said}")
            time.sleep(POLL_SECONDS)
        took = time.perf_counter() - start
        process.kill()
        process.wait()
    return took


def make_llama(folder: Path, documents: list[str], vocabulary: int, **sizes: int) -> None:
    """A llama with random weights and a byte-level BPE that was trained on the documents."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    plain.train_from_iterator(documents, trainer)
    width = {"intermediate_size": 4 * sizes["hidden_size"], "num_attention_heads": sizes["hidden_size"] // 32}
    config = {**sizes, **width, "vocab_size": vocabulary, "max_position_embeddings": 512}
    torch.manual_seed(0)
    llama = AutoConfig.for_model("llama", **config, bos_token_id=0, eos_token_id=0, initializer_range=0.1)
    AutoModelForCausalLM.from_config(llama).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=plain, bos_token=END, eos_token=END).save_pretrained(folder)
