"""Fault 27: a tokenizing that is killed, stopped or divided, in any way, ends with the bytes of one that was not."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Finished

# Pieces of 200 KB instead of 8 MB, so that a corpus of some MB has as many as one of some GB. Only the parent divides:
# a process that works on pieces is sent them. `DIE` ends the process in a function, before or after its work.
DRIVER = """\
import importlib, os, signal
from gptcli.data import pieces

pieces.SMALLEST = 200_000


def deadly(call, when):
    def dying(*arguments, **options):
        if when == "after":
            call(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    return dying


if __name__ == "__main__":
    if die := os.environ.get("DIE"):
        when, name = die.split()
        module, _, name = name.rpartition(".")
        owner = importlib.import_module(module)
        setattr(owner, name, deadly(getattr(owner, name), when))
    from gptcli.__main__ import run
    run()
"""
DATA = "{train: corpus, documents: line, validation: 10%, sequence_length: 32"
RECIPES = {
    "given": f"tokenizer: {{train: {{algorithm: bytes}}}}\ndata: {DATA}}}\n",
    "trained": f"tokenizer: {{train: {{algorithm: bpe, vocab_size: 400}}}}\ndata: {DATA}, deduplicate: exact}}\n",
}
SHARDS = "tokenize.shard_tokens=100000"
GONE_SECONDS = 15.0
# One more way to what a quicker test covers too.
SLOW = pytest.mark.slow_fault
POLL_SECONDS = 0.01


def write_corpus(folder: Path, megabytes: float) -> None:
    """Two files of lines and two of JSON lines, of 96 bytes a document; one in twenty stands twice, a few thrice."""
    rng = np.random.default_rng(27)
    words = rng.integers(97, 123, (300, 8), dtype=np.uint8)
    words[:, 7] = ord(" ")
    folder.mkdir()
    count = int(megabytes * 250_000) // 96
    for number in range(4):
        rows = words[rng.integers(0, len(words), (count, 12))].reshape(count, 96)
        rows[count // 2 : count // 2 + count // 20] = rows[: count // 20]
        rows[count // 4] = 33  # the same in all files
        rows[:, 95] = ord("\n")
        if number % 2:
            ends = [np.frombuffer(raw, np.uint8)[None].repeat(count, 0) for raw in (b'{"text": "', b'"}\n')]
            rows = np.concatenate([ends[0], rows[:, :95], ends[1]], axis=1)
        (folder / f"part-{number}.{('txt', 'jsonl')[number % 2]}").write_bytes(rows.tobytes())


@dataclass
class Jobs:
    """A folder with a corpus and recipes, and commands on it with a cache that can be changed."""

    folder: Path
    cache: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, recipe: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start `gptcli tokenize` at the head of a session of its own."""
        process = subprocess.Popen(
            [sys.executable, str(self.folder / "driver.py"), "tokenize", f"{recipe}.yaml", SHARDS, *arguments],
            cwd=self.folder,
            env={**self.environment, "GPTCLI_CACHE": str(self.cache), **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, recipe: str, *arguments: str, **variables: str) -> Finished:
        return finished(self.start(recipe, *arguments, **variables))

    def result(self) -> dict[str, bytes]:
        """All that is left in the cache but locks and memories, hidden files too."""
        roots = [self.cache / name for name in ("data", "tokenizers")]
        found = (path for root in roots for path in root.rglob("*") if path.is_file())
        return {str(path.relative_to(self.cache)): path.read_bytes() for path in found}

    def pieces(self) -> list[Path]:
        """The folders of finished pieces."""
        return sorted(path.parent for path in self.cache.glob("data/.*/[0-9]*/piece.json"))

    def stamps(self) -> dict[Path, tuple[int, int]]:
        """(inode, time of change) of each file in a finished piece: linked or kept it has them, made again not."""
        found: dict[Path, tuple[int, int]] = {}
        for path in (file for folder in self.pieces() for file in folder.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                found[path] = (path.stat().st_ino, path.stat().st_mtime_ns)
        return found

    def tokens(self) -> set[tuple[int, int]]:
        """(inode, time of change) of the tokens of finished pieces, also when they are prepared data by now."""
        while True:
            with contextlib.suppress(FileNotFoundError):  # a running job renames folders while they are looked through
                found = [path for path in self.cache.glob("data/**/*.tokens.npy") if ".tmp-" not in str(path)]
                return {(path.stat().st_ino, path.stat().st_mtime_ns) for path in found}

    def anew(self) -> None:
        """Go on with an empty cache, but for what is remembered of files and encoders."""
        for name in ("data", "tokenizers"):
            shutil.rmtree(self.cache / name, ignore_errors=True)


def finished(process: subprocess.Popen[str]) -> Finished:
    out, err = process.communicate(timeout=120)
    return Finished(process.returncode, out, err)


def members(session: int) -> dict[int, str]:
    """The processes of a session that are alive, with their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, its = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its) == session and state not in "ZX":
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def workers(process: subprocess.Popen[str]) -> list[int]:
    return [pid for pid, command in members(process.pid).items() if "spawn_main" in command]


def until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(POLL_SECONDS)


def assert_gone(process: subprocess.Popen[str]) -> None:
    until(lambda: not members(process.pid), "no process is left", GONE_SECONDS)


@contextlib.contextmanager
def make_jobs(folder: Path, environment: dict[str, str], megabytes: float) -> Iterator[Jobs]:
    write_corpus(folder / "corpus", megabytes)
    (folder / "driver.py").write_text(DRIVER)
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "cache").mkdir()
    jobs = Jobs(folder, folder / "cache", environment)
    try:
        yield jobs
    finally:  # what a test that failed left running
        for process in jobs.started:
            for pid in members(process.pid) if process.poll() is None else ():
                os.kill(pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Jobs]:
    with make_jobs(tmp_path_factory.mktemp("tokenizing"), environment, 2.5) as jobs:
        yield jobs


@pytest.fixture
def jobs(shared: Jobs) -> Jobs:
    """Some 13 pieces and an empty cache."""
    shared.anew()
    return shared


@pytest.fixture(scope="module")
def expected(shared: Jobs) -> dict[str, dict[str, bytes]]:
    """What an undisturbed job in one process leaves, for each recipe."""
    found = {}
    for recipe in RECIPES:
        shared.anew()
        done = shared.run(recipe, "tokenize.processes=1")
        assert done.code == 0, done.err
        found[recipe] = shared.result()
    return found


def assert_goes_on(jobs: Jobs, recipe: str, expected: dict[str, bytes]) -> None:
    """The next run uses the pieces that are there, and leaves what an undisturbed one does."""
    kept = jobs.tokens()
    done = jobs.run(recipe, "tokenize.processes=2")
    assert done.code == 0, done.err
    assert jobs.result() == expected
    assert kept and kept <= jobs.tokens()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", ["given", pytest.param("trained", marks=SLOW)])
def test_a_job_killed_at_random_moments_ends_with_the_bytes_of_an_undisturbed_one(
    recipe: str, tmp_path: Path, environment: dict[str, str], pytestconfig: pytest.Config
) -> None:
    kills, megabytes = (8, 25) if pytestconfig.getoption("--all-faults") else (3, 2.5)
    with make_jobs(tmp_path, environment, megabytes) as jobs:
        started = time.monotonic()
        assert jobs.run(recipe, "tokenize.processes=2").code == 0
        seconds = time.monotonic() - started
        expected = jobs.result()
        jobs.anew()
        rand = random.Random(27)
        moments = [(number + rand.random()) / kills * seconds for number in range(kills)]
        rand.shuffle(moments)
        for moment in moments:
            before, kept = jobs.stamps(), jobs.tokens()
            process = jobs.start(recipe, "tokenize.processes=2")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            if process.poll() is None:
                process.kill()
                assert finished(process).code == -signal.SIGKILL
                assert_gone(process)
                after = jobs.stamps()
                assert all(after.get(path, stamp) == stamp for path, stamp in before.items())
                assert kept <= jobs.tokens()
            else:  # it found so much done that it ended before its moment
                assert finished(process).code == 0
                assert jobs.result() == expected
                assert kept <= jobs.tokens()
                jobs.anew()
        # And once when there are pieces for sure: a job that was quicker than this look at it begins anew.
        while not jobs.tokens():
            jobs.anew()
            process = jobs.start(recipe, "tokenize.processes=2")
            until(lambda job=process: len(jobs.tokens()) >= 3 or job.poll() is not None, "pieces have tokens")
            process.kill()
            finished(process)
            assert_gone(process)
        assert_goes_on(jobs, recipe, expected)


@pytest.mark.parametrize(
    ("recipe", "die"),
    [
        pytest.param("given", "before gptcli.data.tokenize.finish", marks=SLOW),
        ("given", "after gptcli.data.tokenize.finish"),
        pytest.param("given", "before shutil.rmtree", marks=SLOW),
        pytest.param("trained", "after gptcli.data.stages.repeated", marks=SLOW),
        ("trained", "after gptcli.data.tokenizer_training.train_bpe"),
        ("trained", "before shutil.rmtree"),
    ],
)
def test_a_job_killed_at_its_turning_points_leaves_nothing_behind_in_the_end(
    jobs: Jobs, expected: dict[str, dict[str, bytes]], recipe: str, die: str
) -> None:
    process = jobs.start(recipe, "tokenize.processes=2", DIE=die)
    assert finished(process).code == -signal.SIGKILL
    assert_gone(process)
    done = jobs.run(recipe, "tokenize.processes=2")
    assert done.code == 0, done.err
    assert jobs.result().keys() == expected[recipe].keys()
    assert jobs.result() == expected[recipe]


@pytest.mark.parametrize(("recipe", "processes"), [("given", 2), pytest.param("given", 3, marks=SLOW), ("trained", 3)])
def test_any_number_of_processes_gives_the_same_bytes(
    jobs: Jobs, expected: dict[str, dict[str, bytes]], recipe: str, processes: int
) -> None:
    done = jobs.run(recipe, f"tokenize.processes={processes}")
    assert done.code == 0, done.err
    assert jobs.result() == expected[recipe]


@pytest.mark.parametrize("recipe", ["given", pytest.param("trained", marks=SLOW)])
def test_the_tasks_of_an_array_give_the_same_bytes_two_at_a_time_and_in_any_order(
    jobs: Jobs, expected: dict[str, dict[str, bytes]], recipe: str
) -> None:
    early = jobs.run(recipe, "--finish")
    both = [jobs.start(recipe, "--piece", part) for part in ("3/3", "1/3")]
    for done in map(finished, both):
        assert done.code == 0, done.err
        assert "pieces are there in all" in done.out
    two_of_three = len([path for path in jobs.pieces() if ".pieces" in path.parent.name])
    missing = jobs.run(recipe, "--finish")
    assert (early.code, missing.code) == (3, 3)
    left = jobs.run(recipe, "--piece", "2/3", "--json")
    assert left.code == 0, left.err
    pieces = left.json()["pieces"]
    assert left.json() == {"share": "2/3", "pieces": pieces, "missing": 0}
    assert f"{pieces} of {pieces} pieces are not done" in early.err
    assert f"{pieces - two_of_three} of {pieces} pieces are not done" in missing.err
    assert "--piece I/N" in missing.err
    kept = jobs.tokens()
    done = jobs.run(recipe, "--finish")
    assert done.code == 0, done.err
    assert jobs.result() == expected[recipe]
    assert jobs.tokens() == kept
    again = jobs.run(recipe, "--piece", "2/3", "--json")
    assert again.code == 0 and again.json()["missing"] == 0
    assert jobs.result() == expected[recipe]


def interrupt(jobs: Jobs, recipe: str, send: Callable[[int], None]) -> tuple[Finished, float]:
    """Interrupt a job when pieces are done; what it ended with, and after how many seconds."""
    process = jobs.start(recipe, "tokenize.processes=2")
    until(lambda: len(jobs.pieces()) >= 3, "three pieces are done")
    started = time.monotonic()
    send(process.pid)
    done = finished(process)
    seconds = time.monotonic() - started
    assert_gone(process)
    return done, seconds


@pytest.mark.parametrize(
    ("recipe", "send"),
    [
        ("given", lambda pid: os.kill(pid, signal.SIGTERM)),
        ("given", lambda pid: os.killpg(pid, signal.SIGINT)),
        pytest.param("given", lambda pid: os.killpg(pid, signal.SIGTERM), marks=SLOW),
        ("trained", lambda pid: os.kill(pid, signal.SIGTERM)),
    ],
    ids=["SIGTERM", "Ctrl+C", "SIGTERM to all", "SIGTERM in the survey"],
)
def test_an_interrupted_job_ends_at_once_with_75_and_the_same_command_goes_on(
    jobs: Jobs, expected: dict[str, dict[str, bytes]], recipe: str, send: Callable[[int], None]
) -> None:
    done, seconds = interrupt(jobs, recipe, send)
    assert done.code == 75, done.err
    assert seconds < 5
    assert "pieces are done and kept" in done.err
    assert "Run the same command again to go on" in done.err
    assert "Traceback" not in done.err
    assert jobs.pieces()
    again = jobs.run(recipe, "tokenize.processes=2")
    assert again.code == 0, again.err
    assert jobs.result() == expected[recipe]


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3])
def test_ctrl_c_while_processes_start_is_no_traceback(jobs: Jobs, seconds: float) -> None:
    process = jobs.start("given", "tokenize.processes=3")
    until(lambda: len(workers(process)) == 2, "both of the others are there")
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    os.killpg(process.pid, signal.SIGINT)
    done = finished(process)
    assert done.code in (75, 130), done.err
    assert "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) <= 8
    assert_gone(process)


def test_a_second_job_of_the_same_data_waits_and_finds_the_result(
    jobs: Jobs, expected: dict[str, dict[str, bytes]]
) -> None:
    first = jobs.start("given", "tokenize.processes=2")
    until(jobs.pieces, "a piece is done")
    first.send_signal(signal.SIGSTOP)
    second = jobs.start("given", "tokenize.processes=2")
    assert second.stdout is not None
    assert "another process is preparing this data: waiting" in second.stdout.readline()
    first.send_signal(signal.SIGCONT)
    ended = finished(first)
    assert ended.code == 0, ended.err
    stamps = {path: path.stat().st_ino for path in jobs.cache.rglob("*.npy")}
    done = finished(second)
    assert done.code == 0, done.err
    assert jobs.result() == expected["given"]
    assert {path: path.stat().st_ino for path in jobs.cache.rglob("*.npy")} == stamps
    assert [line for line in done.out.splitlines() if "training:" in line] == [
        line for line in ended.out.splitlines() if "training:" in line
    ]


def test_a_process_that_the_kernel_kills_is_code_6_and_the_next_run_goes_on(
    jobs: Jobs, expected: dict[str, dict[str, bytes]]
) -> None:
    process = jobs.start("given", "tokenize.processes=2")
    until(lambda: len(jobs.pieces()) >= 3, "three pieces are done")
    os.kill(workers(process)[0], signal.SIGKILL)
    done = finished(process)
    assert done.code == 6, done.err
    assert "tokenize.processes" in done.err and "finished pieces are kept" in done.err
    assert_gone(process)
    assert_goes_on(jobs, "given", expected["given"])


def test_a_fault_of_the_data_in_another_process_is_code_3_with_its_line(jobs: Jobs) -> None:
    bad = jobs.folder / "corpus" / "part-4.txt"
    bad.write_bytes(b"a good line\n" * 60_000 + b"\xff\n")
    try:
        done = jobs.run("given", "tokenize.processes=2")
    finally:
        bad.unlink()
    assert done.code == 3, done.err
    assert "corpus/part-4.txt:60001: is not UTF-8" in done.err
    assert "Traceback" not in done.err
    assert jobs.result().keys() == {name for name in jobs.result() if name.startswith("tokenizers/")}


RAY = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'gptcli[ray]'"
)


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[str]:
    """A cluster of two workers, started as its administrator would, from another folder."""
    folder = tmp_path_factory.mktemp("ray")
    # Its sockets have paths of at most 107 bytes.
    variables = {**environment, "RAY_TMPDIR": "/tmp", "RAY_USAGE_STATS_ENABLED": "0"}
    variables.pop("GPTCLI_CACHE")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus=2", "--port=0", "--block"]
    with (folder / "out").open("w") as out:
        process = subprocess.Popen(
            [*command, "--include-dashboard=false", "--disable-usage-stats"],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until(lambda: "--address='" in (folder / "out").read_text() or process.poll() is not None, "ray runs")
        yield (folder / "out").read_text().split("--address='")[1].split("'")[0]
    finally:
        process.terminate()
        process.wait(60)
        assert_gone(process)


@RAY
@pytest.mark.parametrize("recipe", ["given", pytest.param("trained", marks=SLOW)])
def test_a_ray_cluster_gives_the_same_bytes_and_one_json_document(
    jobs: Jobs, expected: dict[str, dict[str, bytes]], ray_address: str, recipe: str
) -> None:
    done = jobs.run(recipe, "tokenize.executor=ray", "--json", RAY_ADDRESS=ray_address)
    assert done.code == 0, done.err
    assert done.json()["train"]["documents"] > 0
    # Ray says much on standard error, and none of it is shown: what a slow machine shows is our own progress.
    assert all(line.startswith(("tokenizing ", "reading ", "sampling ", "train")) for line in done.err.splitlines())
    assert jobs.result() == expected[recipe]


@RAY
@SLOW
def test_a_fault_of_the_data_on_a_ray_cluster_is_code_3_with_its_line(jobs: Jobs, ray_address: str) -> None:
    bad = jobs.folder / "corpus" / "part-4.txt"
    bad.write_bytes(b"a good line\n" * 60_000 + b"\xff\n")
    try:
        done = jobs.run("given", "tokenize.executor=ray", RAY_ADDRESS=ray_address)
    finally:
        bad.unlink()
    assert done.code == 3, done.err
    assert done.err.startswith("error: corpus/part-4.txt:60001: is not UTF-8")
    assert len(done.err.strip().splitlines()) <= 8


@RAY
@SLOW
def test_an_interrupted_job_on_a_ray_cluster_ends_with_75_and_goes_on(
    jobs: Jobs, expected: dict[str, dict[str, bytes]], ray_address: str
) -> None:
    process = jobs.start("given", "tokenize.executor=ray", RAY_ADDRESS=ray_address)
    until(lambda: len(jobs.pieces()) >= 3, "three pieces are done")
    process.terminate()
    done = finished(process)
    assert done.code == 75, done.err
    assert "pieces are done and kept" in done.err and "Traceback" not in done.err
    assert_gone(process)
    assert_goes_on(jobs, "given", expected["given"])
