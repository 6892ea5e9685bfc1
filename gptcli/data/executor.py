"""Runs work on pieces: in this process, in several of this machine, or on a Ray cluster. The results are the same.

Local processes are started anew (not forked: the threads of a parent that has torch would not survive that) and end
with their parent, whatever ends it. Each has one pipe, over which it gets pieces and sends progress and results.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from gptcli.data.encode import PARALLELISM, tokenizer_threads
from gptcli.data.pieces import Chain, Piece
from gptcli.data.sources import shifted
from gptcli.data.work import OnBytes, Task, Work
from gptcli.errors import MissingError, OutOfMemoryError
from gptcli.files import cache_root

PROGRESS_SECONDS = 0.2
# Below this a process more is not worth the half second that it takes to start. The fast encoder breaks even at ten
# times as much, but that is a second in all, and a job's memory should not depend on its size.
FAST_BYTES = 8_000_000
SLOW_BYTES = 2_000_000


def run(
    work: Work,
    chains: Sequence[Chain],
    task: Task,
    *,
    processes: int,
    executor: str = "local",
    on_bytes: OnBytes = lambda done: None,
) -> Iterator[tuple[Piece, Any]]:
    """Do `work` on every piece and yield its result when it is there, in any order.

    In a chain of several pieces, each is told how many documents its source may still have, and when there are none it
    is left out. `on_bytes` is told how many bytes are done in all. An error in a piece ends the others and is raised.
    """
    queue = _Queue(chains)
    if executor == "ray":
        yield from _on_ray(work, queue, task, on_bytes)
    elif processes <= 1:
        yield from _here(work, queue, task, on_bytes)
    else:
        yield from _in_processes(work, queue, task, processes, on_bytes)


def process_count(wanted: int | str, chains: Sequence[Chain], *, fast: bool) -> int:
    """How many processes are worth it: `wanted`, or for "auto" one a core with enough to do; at most one a chain."""
    if isinstance(wanted, int):
        return min(wanted, max(1, len(chains)))
    total = sum(piece.size for chain in chains for piece in chain)
    return max(1, min(len(os.sched_getaffinity(0)), len(chains), total // (FAST_BYTES if fast else SLOW_BYTES)))


class _Queue:
    """Which pieces can be begun: the first of each chain, and the next one when the one before it is done."""

    def __init__(self, chains: Sequence[Chain]) -> None:
        self._ready = [(chain, 0, chain[0].stream.limit) for chain in chains][::-1]
        self._given: dict[int, tuple[Chain, int, int | None]] = {}
        self._finished_bytes = 0

    def __len__(self) -> int:
        return len(self._ready) + len(self._given)

    @property
    def has_next(self) -> bool:
        return bool(self._ready)

    def next(self) -> tuple[Piece, int | None]:
        chain, at, left = self._ready.pop()
        self._given[chain[at].index] = (chain, at, left)
        return chain[at], left

    def done(self, piece: Piece, documents: int) -> int:
        """Count a piece as done; return the bytes that are done in all."""
        chain, at, left = self._given.pop(piece.index)
        rest = None if left is None else left - documents
        self._finished_bytes += piece.size
        if at + 1 < len(chain):
            if rest != 0:
                self._ready.append((chain, at + 1, rest))
            else:
                self._finished_bytes += sum(piece.size for piece in chain[at + 1 :])
        return self._finished_bytes


def _here(work: Work, queue: _Queue, task: Task, on_bytes: OnBytes) -> Iterator[tuple[Piece, Any]]:
    finished = 0
    while queue.has_next:
        piece, left = queue.next()
        result = work(piece, task, left, shifted(on_bytes, finished))
        finished = queue.done(piece, result["documents"])
        on_bytes(finished)
        yield piece, result


def _in_processes(
    work: Work, queue: _Queue, task: Task, processes: int, on_bytes: OnBytes
) -> Iterator[tuple[Piece, Any]]:
    """This process works too: it has what the others still have to load, and looks after them between its rows."""
    context = multiprocessing.get_context("spawn")
    workers: dict[Connection, Any] = {}
    busy: dict[Connection, tuple[Piece, int]] = {}
    results: list[tuple[Piece, Any]] = []
    finished = own = 0

    def look_after(timeout: float | None) -> None:
        """Give idle workers pieces and take what they sent; None waits for something."""
        nonlocal finished
        for connection in workers:
            if connection not in busy and queue.has_next:
                piece, left = queue.next()
                busy[connection] = (piece, 0)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died: met again below
                    connection.send((piece, left))
        ready = set(wait(list(busy), timeout))
        for connection in [each for each in busy if each in ready]:
            piece = busy[connection][0]
            try:
                kind, value = connection.recv()
            except (EOFError, ConnectionResetError):
                raise _died(workers[connection]) from None
            if kind == "bytes":
                busy[connection] = (piece, value)
            elif kind == "error":
                raise value
            else:
                del busy[connection]
                finished = queue.done(piece, value["documents"])
                results.append((piece, value))
        on_bytes(finished + own + sum(done for _, done in busy.values()))

    shown = time.monotonic()

    def on_own_bytes(done: int) -> None:
        nonlocal own, shown
        own = done
        if time.monotonic() - shown > PROGRESS_SECONDS:
            shown = time.monotonic()
            look_after(0)

    try:
        for _ in range(processes - 1):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, work, task), daemon=True)
            with _interrupts_held():
                process.start()
                workers[ours] = process
            theirs.close()
        with tokenizer_threads(every_core=False):  # the cores are divided among processes
            while len(queue) or results:
                look_after(0 if queue.has_next or results else None)
                yield from results
                results.clear()
                if queue.has_next:
                    piece, left = queue.next()
                    result = work(piece, task, left, on_own_bytes)
                    finished, own = queue.done(piece, result["documents"]), 0
                    on_bytes(finished + sum(done for _, done in busy.values()))
                    yield piece, result
    finally:
        for connection, process in workers.items():
            process.kill()
            connection.close()
        for process in workers.values():
            process.join()


def _worker(connection: Connection, work: Work, task: Task) -> None:
    """Work on what comes over the pipe until it is closed; Ctrl+C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.environ[PARALLELISM] = "false"
    shown = time.monotonic()

    def on_bytes(done: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown > PROGRESS_SECONDS:
            shown = now
            connection.send(("bytes", done))

    # A parent that is gone closes the pipe: then there is nobody to tell, and what is committed stays.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            piece, left = connection.recv()
            try:
                connection.send(("done", work(piece, task, left, on_bytes)))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                error.add_note("".join(traceback.format_exception(error)))
                connection.send(("error", error))


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let a Ctrl+C wait, here and in a process that is started inside, in which it would be a traceback."""
    resource_tracker.ensure_running()  # else started by the first process, and it lets the signal through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _died(process: Any) -> Exception:
    process.join(5)
    code = process.exitcode
    if code == -signal.SIGKILL:
        return OutOfMemoryError(
            "a process that tokenized was killed, probably because memory ran out",
            remedy="Set tokenize.processes to a smaller number and run again; finished pieces are kept.",
        )
    return RuntimeError(f"a process that tokenized ended with {code}")


def _on_ray(work: Work, queue: _Queue, task: Task, on_bytes: OnBytes) -> Iterator[tuple[Piece, Any]]:
    """Every piece is a Ray task; the cache and the data have to be on a file system that all machines share."""
    try:
        import ray
    except ImportError:
        raise MissingError(
            "tokenize.executor: ray needs the package ray", remedy="pip install 'gptcli[ray]', or executor: local"
        ) from None
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here reports to nobody
        handler = signal.getsignal(signal.SIGTERM)
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="ERROR")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own prints its stack and exits
    try:
        remote = ray.remote(max_retries=3)(_ray_task)
        settings = ray.put((work, task, str(cache_root()), os.getcwd()))
        running: dict[Any, Piece] = {}
        room = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
        while len(queue):
            while queue.has_next and len(running) < room:
                piece, left = queue.next()
                running[remote.remote(settings, piece, left)] = piece
            for reference in ray.wait(list(running), num_returns=1)[0]:
                piece = running.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise (error.cause if isinstance(error.cause, Exception) else error) from None
                on_bytes(queue.done(piece, result["documents"]))
                yield piece, result
    finally:
        if started:
            ray.shutdown()


def _ray_task(settings: tuple[Work, Task, str, str], piece: Piece, left: int | None) -> Any:
    work, task, cache, folder = settings
    os.environ[PARALLELISM] = "false"
    os.environ["GPTCLI_CACHE"] = cache
    with contextlib.suppress(OSError):
        os.chdir(folder)  # messages name files from there
    return work(piece, task, left, lambda done: None)
