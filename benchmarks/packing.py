"""What packing is worth in fine-tuning, in supervised tokens a second, and how long packing itself takes.

    python benchmarks/packing.py --data PATH            PATH: a folder with sst2/ and multi30k/; else $DATA
    python benchmarks/packing.py --part pack            the time of packing alone, which needs no data

Training: `gptcli finetune` on one thread, a process a round and way, each once a round: documents packed into rows
(`data.packing: isolated`), a document a row with rows of like length in a batch (`none`), and the usual way, a document
a row in the order of the file, filled up to the longest of its batch (`none` without shuffling). A step has about as
many tokens that are no padding in each way. Supervised tokens are those that the loss counts; their number over the
seconds of all steps behind the first few is a round's figure, which medians are of. Seconds by the clock, and of the
CPU, which neighbours on the machine change less: on an idle one both are the same.

Packing: lengths of documents drawn from a log-normal distribution; ours is the index of rows, trl's `pack_dataset`
(`strategy="bfd"`, left out where trl is not installed) makes the rows themselves, so it copies the tokens too.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # this folder last: its tokenize.py would hide the standard library's

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from measuring import make_llama, print_machine

if TYPE_CHECKING:
    from gptcli.data.packed import PackedRows

LIBRARIES = ("gptcli", "torch", "transformers", "trl", "datasets", "numpy")
POLL_SECONDS = 0.02
LENGTH = 256
VOCABULARY = 2048
SKIPPED = 3  # steps at the start that are not counted
STEPS = 50  # that are counted: as many as rows of like length are dealt out over
PACKED, GROUPED, NAIVE = "isolated", "none, like lengths together", "none, order of the file"
WAYS: dict[str, dict[str, Any]] = {
    PACKED: {"packing": "isolated"},
    GROUPED: {"packing": "none"},
    NAIVE: {"packing": "none", "shuffle": False},
}


@dataclass(frozen=True)
class Size:
    """A llama's layers and width, and the tokens of a step."""

    layers: int
    width: int
    tokens: int


SIZES = {"tiny": Size(2, 128, 2048), "10M": Size(6, 320, 1024)}
SETS: dict[str, dict[str, Any]] = {
    "sst2": {
        "train": {
            "path": "sst2/train.tsv",
            "columns": ["sentence", "label"],
            "map": {"label": {"0": "negative", "1": "positive"}},
        },
        "prompt": "{sentence}\nThis film is",
        "completion": " {label}",
    },
    "multi30k": {
        "train": {"path": {"en": "multi30k/train_10k.en", "de": "multi30k/train_10k.de"}},
        "prompt": "English: {en}\nGerman:",
        "completion": " {de}",
    },
}


def main() -> None:
    arguments = parse()
    print_machine(LIBRARIES)
    if "train" in arguments.part:
        train(arguments)
    if "pack" in arguments.part:
        pack(arguments.documents, arguments.capacity, arguments.rounds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("DATA"), help="the folder of the sets [$DATA]")
    parser.add_argument("--part", nargs="+", choices=["train", "pack"], default=["train", "pack"])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=STEPS, help=f"that are timed [{STEPS}]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--documents", type=int, default=1_000_000, help="to be packed [1000000]")
    parser.add_argument("--capacity", type=int, default=512, help="of a row, for these [512]")
    return parser.parse_args()


# ---- training ----


def train(arguments: argparse.Namespace) -> None:
    """A table for each set and model."""
    for name in arguments.sets:
        if arguments.data is None or not (arguments.data / name).is_dir():
            print(f"skipped: {name}: give the folder that holds {name}/ with --data PATH or in $DATA")
            continue
        for size in arguments.sizes:
            with tempfile.TemporaryDirectory(prefix="gptcli-bench-") as work:
                measure(Path(work), name, size, arguments)


def measure(work: Path, name: str, size: str, arguments: argparse.Namespace) -> None:
    """Train each way on a set and print what it reached."""
    os.environ["GPTCLI_CACHE"] = str(work / "cache")  # for the rows, which are made here
    sources = SETS[name]["train"]["path"]
    files = sources.values() if isinstance(sources, dict) else [sources]
    lines = [line for file in files for line in (arguments.data / file).read_text(encoding="utf-8").splitlines()]
    shape = SIZES[size]
    make_llama(work / "base", lines, VOCABULARY, hidden_size=shape.width, num_hidden_layers=shape.layers)
    documents = rows_of(work, recipe(name, arguments, NAIVE, rows=1))
    inputs = documents.index.tokens / documents.rows_per_epoch
    speeds: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    about: dict[str, tuple[PackedRows, int]] = {}
    for way in WAYS:
        batch = round(shape.tokens / (LENGTH if way == PACKED else inputs))
        about[way] = rows_of(work, recipe(name, arguments, way, rows=batch)), batch
    for _ in range(arguments.rounds):
        for way, (rows, batch) in about.items():
            first, last = (rows.labels_at(step * batch) for step in (SKIPPED, SKIPPED + arguments.steps))
            clock, worked = run(work, recipe(name, arguments, way, rows=batch), arguments.steps)
            speeds[way].append(((last - first) / clock, (last - first) / worked))
    print_results(f"{name}, {size}: {shape.layers} x {shape.width}, {inputs:.1f} inputs a document", about, speeds)


def recipe(name: str, arguments: argparse.Namespace, way: str, *, rows: int) -> dict[str, Any]:
    """The recipe of a way with so many rows a step."""
    data: dict[str, Any] = {**SETS[name], **WAYS[way]}
    path, folder = data["train"]["path"], arguments.data.resolve()
    placed = {key: str(folder / file) for key, file in path.items()} if isinstance(path, dict) else str(folder / path)
    return {
        "name": "bench",
        "model": {"from": "base"},
        "data": {
            **data,
            "train": {**data["train"], "path": placed},
            "format": "prompt",
            "validation": 0,
            "sequence_length": LENGTH,
        },
        "train": {
            "max_steps": SKIPPED + arguments.steps + 1,  # so that the last that counts is not the last
            "global_batch_size": rows,
            "micro_batch_size": rows,
            "learning_rate": 1e-4,
            "precision": arguments.precision,
            "log_every": 1,
            "eval_every": 0,
            "save_every": 0,
            "sample_every": 0,
        },
    }


def rows_of(work: Path, content: dict[str, Any]) -> PackedRows:
    """The rows that a recipe trains on."""
    from gptcli.cli.console import console
    from gptcli.data.packed import PackedRows
    from gptcli.recipe.load import load_recipe
    from gptcli.runs.folder import RunFolder
    from gptcli.train.assemble import assemble

    path = work / "recipe.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    before = Path.cwd()
    os.chdir(work)
    try:
        loaded = load_recipe(path, ("train.precision=fp32",))  # nothing is to be timed for this
        rows = assemble(loaded, RunFolder(work / "runs" / "bench"), console(quiet=True)).rows
    finally:
        os.chdir(before)
    assert isinstance(rows, PackedRows)
    return rows


def run(work: Path, content: dict[str, Any], steps: int) -> tuple[float, float]:
    """Seconds of the steps of a run that count, by the clock and of a CPU."""
    folder = work / "runs" / "bench"
    shutil.rmtree(folder, ignore_errors=True)
    (work / "recipe.yaml").write_text(json.dumps(content))
    command = [sys.executable, "-m", "gptcli", "finetune", "recipe.yaml", "--quiet"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    worked: dict[int, float] = {}
    with (work / "errors.txt").open("w") as errors:
        process = subprocess.Popen(command, cwd=work, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            done = len(logged(folder))
            for step in (SKIPPED, SKIPPED + steps):
                if done >= step and step not in worked:
                    worked[step] = cpu_seconds(process.pid)
            time.sleep(POLL_SECONDS)
    if process.returncode:
        said = (work / "errors.txt").read_text()[-3000:]
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{said}")
    lines = logged(folder)
    clock = lines[SKIPPED + steps - 1]["seconds"] - lines[SKIPPED - 1]["seconds"]
    return clock, worked[SKIPPED + steps] - worked[SKIPPED]


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's steps so far."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [line for line in (json.loads(line) for line in lines if line.endswith("\n")) if "seconds" in line]


def cpu_seconds(pid: int) -> float:
    """What a process has worked so far, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def print_results(
    title: str, about: dict[str, tuple[PackedRows, int]], speeds: dict[str, list[tuple[float, float]]]
) -> None:
    """The table of a set and a model."""
    from gptcli.data.packed import padding

    print(f"\n### {title}\n")
    print(
        "| `data.packing` | rows a step | padding | supervised tokens/s | a CPU second (min to max) | over the last |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    medians = {way: statistics.median(worked for _, worked in found) for way, found in speeds.items()}
    for way, found in speeds.items():
        rows, batch = about[way]
        clock, worked = zip(*found, strict=True)
        print(
            f"| {way} | {batch} | {padding(rows, batch):.1%} | {statistics.median(clock):,.0f} | {medians[way]:,.0f}"
            f" ({min(worked):,.0f} to {max(worked):,.0f}) | {medians[way] / medians[NAIVE]:.2f} |",
            flush=True,
        )


# ---- packing ----


def pack(documents: int, capacity: int, rounds: int) -> None:
    """The time of packing synthetic documents, and how full the rows are."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(3.8, 0.8, documents), 2, capacity).astype(np.int64)
    ways: dict[str, Callable[[Any, int], int]] = {
        "`best_fit`, 100 K documents at a time": ours,
        "the whole index: pieces, rows, counts": index,
    }
    given: dict[str, Any] = dict.fromkeys(ways, lengths)
    if importlib.util.find_spec("trl") is None:
        print("skipped: trl's pack_dataset: pip install 'gptcli[rl]'")
    else:
        for name, size in (("1,000 at a time (its default)", 1000), ("100 K at a time", 100_000)):
            ways[f"trl's `pack_dataset`, {name}"] = partial(by_trl, batch_size=size)
            given[f"trl's `pack_dataset`, {name}"] = as_dataset(lengths)
    for name, way in ways.items():  # imports, and whatever else is done once
        way(given[name][:1000] if way in (ours, index) else given[name].select(range(1000)), capacity)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rows: dict[str, int] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            rows[name] = way(given[name], capacity)
            seconds[name].append(time.perf_counter() - started)
    mean, median = lengths.mean(), np.median(lengths)
    print(f"\n### {documents:,} documents of {mean:.1f} tokens (median {median:.0f}) in rows of {capacity}\n")
    print("| way | seconds (min to max) | documents/s | rows | padding |\n| --- | --- | --- | --- | --- |")
    for name, taken in seconds.items():
        middle, full = statistics.median(taken), int(lengths.sum()) / (rows[name] * capacity)
        print(
            f"| {name} | {middle:.2f} ({min(taken):.2f} to {max(taken):.2f}) | {documents / middle:,.0f}"
            f" | {rows[name]:,} | {1 - full:.2%} |"
        )


def ours(lengths: np.ndarray[Any, Any], capacity: int) -> int:
    """How many rows `best_fit` makes, a window at a time."""
    from gptcli.data.packing import WINDOW, best_fit

    parts = (lengths[first : first + WINDOW] for first in range(0, len(lengths), WINDOW))
    return sum(int(best_fit(part, capacity).max()) + 1 for part in parts)


def index(lengths: np.ndarray[Any, Any], capacity: int) -> int:
    """The same with all that a run's index needs; a document of n tokens has n - 1 inputs."""
    from gptcli.data.packing import Packing, windows

    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    how = Packing(capacity, "isolated", "error", every_label=True)
    stream: Any = None  # its marks are not asked for where every label counts
    return sum(len(window.tokens) for window in windows(stream, offsets, how))


def as_dataset(lengths: np.ndarray[Any, Any]) -> Any:
    """Documents of such lengths as trl takes them, in memory."""
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = pyarrow.array(np.zeros(offsets[-1], dtype=np.int32))
    return datasets.Dataset(pyarrow.table({"input_ids": pyarrow.ListArray.from_arrays(pyarrow.array(offsets), ids)}))


def by_trl(texts: Any, capacity: int, **options: int) -> int:
    """How many rows trl makes of them; `options`: of `Dataset.map`."""
    from trl import pack_dataset

    return len(pack_dataset(texts, capacity, strategy="bfd", map_kwargs=options))


if __name__ == "__main__":
    main()
