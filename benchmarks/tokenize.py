"""Text files to finished token files on disk: `gptcli tokenize` beside the ways of other tools, time and memory.

    python benchmarks/tokenize.py                       or, to try it: --megabytes 3 --rounds 1 --tokenizers gpt2
    python benchmarks/tokenize.py --memory              peak memory on the corpus and on one 20 times larger

The corpus is Python's standard library, WikiText-2 and Chinese poetry, repeated under other names; every way is a
process of its own with an empty cache and the files in the page cache, each once a round. Peak memory is sampled
every 50 ms over the process and its descendants: anonymous proportional size, RSS beside it; that takes up to a fifth
of a core, so it has a round of its own, which is not timed. The ratios set our whole process, start-up included,
against the peers' time behind their imports. Goals: 10 times run_clm by lines, 2 times nanoGPT's way, 1.5 GB whatever
the corpus.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring import MEBI, Sampler, print_machine

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PEERS = Path(__file__).parent / "peers_tokenize.py"
MEGA = 1_000_000
POEM_BYTES = 100_000
VOCAB_SIZE = 50_000
LARGER = 20  # how many times larger the second corpus of --memory is
LIBRARIES = ("gptcli", "tokenizers", "transformers", "datasets", "tiktoken", "pyarrow", "numpy")
OURS = "gptcli"
WAYS = {
    OURS: "gptcli tokenize",
    "lines": "run_clm, a line a row (one file)",
    "documents": "run_clm, a document a row",
    "nanogpt": "nanoGPT's prepare.py (tiktoken)",
    "tokenizers": "tokenizers' encode_batch_fast",
}
ARTICLE = re.compile(r"^ = [^=](?:.*[^=])? = $", re.MULTILINE)


@dataclass
class Measured:
    """One run of a way. `inner_seconds`: a peer's time behind its imports; `kept`: the tokens left in blocks."""

    seconds: float
    tokens: int
    inner_seconds: float | None = None
    kept: int | None = None
    anonymous_bytes: int = 0
    rss_bytes: int = 0


@dataclass
class Corpus:
    """A folder of .txt files, a document each."""

    folder: Path
    parts: dict[str, int] = field(default_factory=dict)
    files: int = 0

    @property
    def megabytes(self) -> float:
        """The size in MB (10^6 bytes)."""
        return sum(self.parts.values()) / MEGA


def main() -> None:
    arguments = parse()
    # A killed run cleans up as an ended one does.
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="gptcli-bench-") as name:
        work = Path(name)
        # For the tokenizers and the standard library's text; what is measured gets its own.
        os.environ["GPTCLI_CACHE"] = str(work / "cache")
        texts = base_texts()
        corpus = write_corpus(work / "corpus", texts, arguments.megabytes, arguments.distinct)
        print_setup(arguments, corpus)
        tokenizers = make_tokenizers(work, corpus, arguments.tokenizers)
        if arguments.memory:
            larger = write_corpus(work / "larger", texts, arguments.megabytes * LARGER, arguments.distinct)
            for pattern, folder in tokenizers.items():
                compare_memory(work, pattern, folder, corpus, larger)
            return
        ways = available(arguments.ways)
        # So that no way is the first to read its libraries from disk.
        warm = write_corpus(work / "warm", texts, 0.2, distinct=False)
        for way in ways:
            run_way(way, work, *next(iter(tokenizers.items())), warm, arguments.processes)
        equal = True
        for pattern, folder in tokenizers.items():
            if "nanogpt" in ways:
                check_ids(work / "run", pattern, folder, corpus)
            timed: dict[str, list[Measured]] = {way: [] for way in ways}
            for _ in range(arguments.rounds):
                for way in ways:
                    timed[way].append(run_way(way, work, pattern, folder, corpus, arguments.processes))
            sampled = {
                way: run_way(way, work, pattern, folder, corpus, arguments.processes, sample=True) for way in ways
            }
            print_results(pattern, timed, sampled, corpus)
            equal &= same_counts(timed, corpus)
    if not equal:
        raise SystemExit("the ways do not make the same tokens: the times above compare different work")


def parse() -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=60, help="size of the corpus [60]")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way runs [3]")
    parser.add_argument("--ways", type=listed(WAYS), default=list(WAYS), help=f"[{','.join(WAYS)}]")
    parser.add_argument("--tokenizers", type=listed(TOKENIZERS), default=list(TOKENIZERS), help="[gpt2,llama3]")
    parser.add_argument("--processes", type=int, default=cores, help=f"num_proc of the peers' map [the cores: {cores}]")
    parser.add_argument(
        "--distinct", action="store_true", help="make every repeat differ, by a number at its lines' ends"
    )
    parser.add_argument("--memory", action="store_true", help=f"ours alone, here and on {LARGER} times as much")
    return parser.parse_args()


def listed(known: dict[str, object]) -> Callable[[str], list[str]]:
    """A reader of `a,b` for argparse, which takes the names in `known` only."""

    def read(value: str) -> list[str]:
        names = value.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return read


def available(ways: list[str]) -> list[str]:
    """The ways whose libraries are installed; the others are named in a printed line."""
    if "nanogpt" in ways and importlib.util.find_spec("tiktoken") is None:
        print(f"skipped: {WAYS['nanogpt']}: tiktoken is not installed")
        return [way for way in ways if way != "nanogpt"]
    return ways


# The corpus


def base_texts() -> dict[str, list[str]]:
    """The documents of each part, unrepeated. What is not there is named in a printed line."""
    from gptcli.data.builtin import builtin_file

    with builtin_file("stdlib").open(encoding="utf-8") as file:
        texts = {"stdlib": [json.loads(line)["text"] for line in file]}
    for name, path, cut in (
        ("wikitext2", SHARED / "wikitext-2" / "train.txt", articles),
        ("poetry", SHARED / "chinese_poetry" / "train.txt", poems),
    ):
        if path.is_file():
            texts[name] = cut(path.read_text(encoding="utf-8"))
        else:
            print(f"skipped: the corpus's part {name}: there is no {path}")
    return texts


def articles(text: str) -> list[str]:
    """WikiText cut into its articles: one begins at a line of the form ` = Title = `."""
    starts = [match.start() for match in ARTICLE.finditer(text)]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def poems(text: str) -> list[str]:
    """The poetry in documents of about `POEM_BYTES`, cut at blank lines."""
    found: list[str] = []
    pieces: list[str] = []
    size = 0
    for piece in re.split(r"(?<=\n)(?=\n)", text):
        pieces.append(piece)
        size += len(piece.encode())
        if size >= POEM_BYTES:
            found.append("".join(pieces))
            pieces, size = [], 0
    return [*found, "".join(pieces)] if pieces else found


def write_corpus(folder: Path, texts: dict[str, list[str]], megabytes: float, distinct: bool) -> Corpus:
    """Write `megabytes` of the parts in proportion to their sizes, each repeated under other names or cut short."""
    folder.mkdir()
    corpus = Corpus(folder)
    whole = sum(len(text.encode()) for part in texts.values() for text in part)
    for name, part in texts.items():
        wanted = megabytes * MEGA * sum(len(text.encode()) for text in part) / whole
        corpus.parts[name] = 0
        for repeat, index, text in endless(part):
            if corpus.parts[name] >= wanted:
                break
            raw = (text.replace("\n", f" {repeat}\n") if distinct and repeat else text).encode()
            (folder / f"{name}-{repeat:03}-{index:05}.txt").write_bytes(raw)
            corpus.parts[name] += len(raw)
            corpus.files += 1
    return corpus


def joined(corpus: Corpus) -> Path:
    """The corpus as one file, which is what run_clm reads (and by lines three times as fast as many files)."""
    path = corpus.folder.with_suffix(".txt")
    if not path.is_file():
        with path.open("wb") as file:
            for document in sorted(corpus.folder.iterdir()):
                raw = document.read_bytes()
                file.write(raw if raw.endswith(b"\n") else raw + b"\n")
    return path


def endless(part: list[str]) -> Iterator[tuple[int, int, str]]:
    """(repeat, index, text) of the documents of a part, over and over."""
    repeat = 0
    while True:
        for index, text in enumerate(part):
            yield repeat, index, text
        repeat += 1


# The tokenizers


def make_tokenizers(work: Path, corpus: Corpus, patterns: list[str]) -> dict[str, Path]:
    """The folder of a tokenizer for each pattern, without the ones that cannot be made here."""
    made = ((pattern, TOKENIZERS[pattern](work, corpus)) for pattern in patterns)
    found = {pattern: folder for pattern, folder in made if folder is not None}
    if not found:
        raise SystemExit("none of the tokenizers can be made here")
    return found


def gpt2_tokenizer(work: Path, corpus: Corpus) -> Path | None:
    """GPT-2's own tokenizer, or None with a printed line."""
    del work, corpus
    from gptcli.data.tokenizer_import import import_tokenizer

    origin = SHARED / "gpt2_tokenizer"
    if not origin.is_dir():
        print(f"skipped: the tokenizer gpt2: there is no {origin}")
        return None
    return import_tokenizer(str(origin))


def llama3_tokenizer(work: Path, corpus: Corpus) -> Path:
    """A BPE with Llama 3's pattern, trained on the corpus."""
    from gptcli.data.tokenizer import train_bpe

    folder = work / "llama3"
    texts = (path.read_bytes().decode() for path in sorted(corpus.folder.iterdir()))
    start = time.perf_counter()
    size = train_bpe(texts, folder, vocab_size=VOCAB_SIZE, pattern="llama3")
    print(f"trained a tokenizer of {size:,} entries with Llama 3's pattern in {time.perf_counter() - start:.0f} s")
    return folder


TOKENIZERS: dict[str, Callable[[Path, Corpus], Path | None]] = {"gpt2": gpt2_tokenizer, "llama3": llama3_tokenizer}


# One run


def run_way(
    way: str, work: Path, pattern: str, tokenizer: Path, corpus: Corpus, processes: int, *, sample: bool = False
) -> Measured:
    """Run a way with an empty cache, the corpus read beforehand; what it wrote is removed. `sample`: its memory too."""
    read_from = joined(corpus) if way == "lines" else corpus.folder
    for path in corpus.folder.iterdir() if read_from == corpus.folder else [read_from]:
        path.read_bytes()
    folder = work / "run"
    with fresh(folder):
        if way != OURS:
            command = peer_command(way, folder, pattern, tokenizer, read_from)
            result, seconds, sampler = watch([*command, "--processes", str(processes)], folder, sample)
            measured = Measured(seconds, result["tokens"], result["seconds"], result.get("kept"))
        else:
            recipe = {
                "tokenizer": {"from": str(tokenizer)},
                "data": {"train": str(corpus.folder), "validation": 0, "sequence_length": 1024},
            }
            (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
            command = [str(Path(sys.executable).parent / "gptcli"), "tokenize", "recipe.yaml", "--json"]
            result, seconds, sampler = watch(command, folder, sample)
            if result["reused"]:
                raise SystemExit("the cache was not empty")
            measured = Measured(seconds, result["train"]["tokens"])
    measured.anonymous_bytes, measured.rss_bytes = sampler.anonymous_bytes, sampler.rss_bytes
    return measured


def check_ids(folder: Path, pattern: str, tokenizer: Path, corpus: Corpus) -> None:
    """Compare tiktoken's ids with the tokenizer's on some documents. Raises `SystemExit` if they differ."""
    with fresh(folder):
        result, *_ = watch(peer_command("check", folder, pattern, tokenizer, corpus.folder), folder)
    print(f"\ntiktoken's ids are the tokenizer's ({pattern}): {result['documents']} documents compared")


def peer_command(way: str, folder: Path, pattern: str, tokenizer: Path, read_from: Path) -> list[str]:
    """The command that runs a peer on a file or the files of a folder; it writes into `folder`."""
    return [sys.executable, "-P", str(PEERS), way, str(read_from), str(tokenizer), pattern, str(folder)]


@contextlib.contextmanager
def fresh(folder: Path) -> Iterator[None]:
    """An empty folder, removed at the end."""
    folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder)


def watch(command: list[str], folder: Path, sample: bool = False) -> tuple[dict[str, Any], float, Sampler]:
    """Run a command in `folder`, all caches inside it: the JSON it printed last, its seconds, the memory if asked."""
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    environment |= {
        "GPTCLI_CACHE": str(folder / "gptcli"),
        "HF_HOME": str(folder / "huggingface"),
        "HF_DATASETS_CACHE": str(folder / "huggingface" / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    with (folder / "stdout").open("w+") as stdout, (folder / "stderr").open("w+") as stderr:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
        )
        sampler = Sampler(process.pid)
        try:
            with sampler if sample else contextlib.nullcontext():
                process.wait()
                seconds = time.perf_counter() - start
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        stdout.seek(0)
        stderr.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{stderr.read()[-3000:]}")
        return json.loads(stdout.read().splitlines()[-1]), seconds, sampler


# What is printed


def print_setup(arguments: argparse.Namespace, corpus: Corpus) -> None:
    parts = ", ".join(f"{name} {size / MEGA:.1f}" for name, size in corpus.parts.items())
    repeats = "every repeat different" if arguments.distinct else "repeats identical"
    print_machine(LIBRARIES)
    print(f"corpus: {corpus.megabytes:.1f} MB in {corpus.files:,} files ({parts} MB; {repeats})")
    print(f"rounds: {arguments.rounds}, interleaved; num_proc of the peers: {arguments.processes}")


def print_results(
    pattern: str, results: dict[str, list[Measured]], sampled: dict[str, Measured], corpus: Corpus
) -> None:
    """The table of a tokenizer and, where ours ran, the ratios."""
    print(f"\n### Tokenizer {pattern}, {corpus.megabytes:.1f} MB\n")
    print(
        "| way | seconds, whole process | seconds without imports | MB/s (whole) | peak MiB anonymous | peak MiB RSS"
        " | tokens |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    for way, runs in results.items():
        inner = [run.inner_seconds for run in runs if run.inner_seconds is not None]
        tokens = f"{runs[0].tokens:,}" + (f" ({runs[0].kept:,} in blocks)" if runs[0].kept is not None else "")
        print(
            f"| {WAYS[way]} | {spread([run.seconds for run in runs])} | {spread(inner) if inner else '-'}"
            f" | {corpus.megabytes / middle(runs):.2f} | {sampled[way].anonymous_bytes / MEBI:,.0f}"
            f" | {sampled[way].rss_bytes / MEBI:,.0f} | {tokens} |"
        )
    print("\nMedians (min to max); start-up is in the whole process of every way. Memory: one more run, sampled.")
    if OURS not in results or len(results) == 1:
        return
    ours = results[OURS]
    print(
        "\n| gptcli's speed over | peer without imports | whole processes | anonymous memory, gptcli's / peer's |\n"
        "| --- | --- | --- | --- |"
    )
    for way, runs in results.items():
        if way != OURS:
            inner = statistics.median(run.inner_seconds or 0.0 for run in runs)
            print(
                f"| {WAYS[way]} | {inner / middle(ours):.2f} | {middle(runs) / middle(ours):.2f}"
                f" | {sampled[OURS].anonymous_bytes / sampled[way].anonymous_bytes:.2f} |"
            )
    print("\nThe first column sets our process with its start-up against the peer without its imports.")


def same_counts(results: dict[str, list[Measured]], corpus: Corpus) -> bool:
    """Whether the ways that tokenize whole documents made the same tokens; run_clm puts no EOS behind them."""
    counts = {
        way: run.tokens + (corpus.files if way == "documents" else 0)
        for way, runs in results.items()
        for run in runs
        if way != "lines"
    }
    equal = len(set(counts.values())) <= 1
    found = ", ".join(f"{WAYS[way]} {count:,}" for way, count in counts.items())
    print(f"Tokens with an EOS a document {'are the same' if equal else 'DIFFER'}: {found}")
    return equal


def compare_memory(work: Path, pattern: str, tokenizer: Path, small: Corpus, large: Corpus) -> None:
    """Ours on two corpora: both peaks and their ratio."""
    print(f"\n### Peak memory of gptcli tokenize, tokenizer {pattern}\n")
    print("| corpus | seconds | MB/s | peak MiB anonymous | peak MiB RSS |\n| --- | --- | --- | --- | --- |")
    peaks = []
    for corpus in (small, large):
        run = run_way(OURS, work, pattern, tokenizer, corpus, 1, sample=True)
        peaks.append(run.anonymous_bytes)
        print(
            f"| {corpus.megabytes:,.1f} MB, {corpus.files:,} files | {run.seconds:.1f}"
            f" | {corpus.megabytes / run.seconds:.2f}"
            f" | {run.anonymous_bytes / MEBI:,.0f} | {run.rss_bytes / MEBI:,.0f} |"
        )
    print(f"\nPeak of the larger over the smaller: {peaks[1] / peaks[0]:.2f}")


def middle(runs: list[Measured]) -> float:
    """The median seconds of whole processes."""
    return statistics.median(run.seconds for run in runs)


def spread(values: list[float]) -> str:
    """`median (min to max)`."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
