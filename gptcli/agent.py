"""The workers of this machine: torch's elastic agent (rendezvous, ranks, restarts), with our own way to end them.

`SimpleElasticAgent` leaves starting, watching and stopping to a subclass. torch's own treats every exit code but 0 as a
crash and kills workers 30 seconds after it asked them to end, also in the middle of a save. Here an orderly end (0, 75)
is waited for without limit and never restarted, a signal is passed on once to each worker, and a failure ends the
others: they have `FOLLOW_SECONDS` to say what they have to say, then SIGTERM, then SIGKILL `KILL_SECONDS` later, since
a worker that waits in a collective runs no Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.multiprocessing import ProcessFailure

from gptcli.endings import (
    GOES_ON,
    LESS_MEMORY,
    WORTH_A_RESTART,
    Ending,
    WorkersError,
    is_orderly,
    on_stop_signals,
    read_report,
    verdict,
)
from gptcli.errors import AbortedError, StoppedError
from gptcli.network import notice_silence

FOLLOW_SECONDS = 3.0
KILL_SECONDS = 10.0
# A killed process whose memory or device the kernel still holds is left to it.
GONE_SECONDS = 30.0
POLL_SECONDS = 0.05
# Between machines: how often one looks whether another failed, and how long it waits to hear or to be heard.
LOOK_SECONDS = 1.0
HEAR_SECONDS = 3.0
CAUSE = "gptcli/cause"
HEARD = "gptcli/heard"


@contextmanager
def hearing_signals(agents: Sequence[Agent]) -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP (unless ignored, as by nohup) go to the agent, once there is one."""

    def hear(number: int, frame: FrameType | None) -> None:
        del frame
        if not agents:
            raise AbortedError("there was nothing to save")
        agents[0].pass_on(number)

    with on_stop_signals(hear):
        yield


class Agent(SimpleElasticAgent):
    """Starts, watches and ends the workers of one machine.

    Args:
        spec: torch's: the command, how many, and the rendezvous.
        reports: an empty folder, where workers leave what they have to say.
        variables: the environment of the workers, but for what their rank decides.
        warn: where a restart is said.
        silence: seconds after which a machine that does not answer is gone.
        advice: what is said where a worker was killed, see `gptcli.endings.verdict`.

    After `run`, `error` is what they ended with; None: all are done.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        reports: Path,
        variables: Mapping[str, str],
        warn: Callable[[str], None],
        silence: int,
        advice: tuple[str, str] = (LESS_MEMORY, GOES_ON),
    ) -> None:
        super().__init__(spec)
        self.error: WorkersError | None = None
        self._reports = reports
        self._variables = variables
        self._warn = warn
        self._silence = silence
        self._advice = advice
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._endings: dict[int, Ending] = {}
        self._starts = 0
        self._starting = False
        self._waiting_signals: list[int] = []
        self._signalled = False
        self._looked = 0.0
        self._failed_elsewhere: WorkersError | None = None

    def pass_on(self, number: int) -> None:
        """Send a signal that came to this process to every worker, once."""
        if self._starting:
            self._waiting_signals.append(number)
        elif not self._processes or getattr(self, "_in_exit_barrier", False):
            raise AbortedError("there was nothing to save")
        else:
            self._signalled = True
            for process in self._processes.values():
                process.send_signal(number)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        restarts = self._agreed_starts(worker_group)
        notice_silence(self._silence)
        folder = self._reports / str(self._starts)
        folder.mkdir()
        self._starts += 1
        self._endings.clear()
        spec = worker_group.spec
        self._starting = True
        try:
            for worker in worker_group.workers:
                variables = {
                    **self._variables,
                    "RANK": str(worker.global_rank),
                    "WORLD_SIZE": str(worker.world_size),
                    "LOCAL_RANK": str(worker.local_rank),
                    "LOCAL_WORLD_SIZE": str(spec.local_world_size),
                    "GROUP_RANK": str(worker_group.group_rank),
                    "GROUP_WORLD_SIZE": str(worker_group.group_world_size),
                    "MASTER_ADDR": str(worker_group.master_addr),
                    "MASTER_PORT": str(worker_group.master_port),
                    "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
                    "TORCHELASTIC_RESTART_COUNT": str(restarts),
                    "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
                    "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
                    "GPTCLI_LAUNCHER_PID": str(os.getpid()),
                    "GPTCLI_REPORTS": str(folder),
                }
                # Its own session: a terminal's signals reach the parent alone, and what it leaves behind can be ended.
                self._processes[worker.local_rank] = subprocess.Popen(
                    [str(spec.entrypoint), *spec.args],
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
        finally:
            self._starting = False
        while self._waiting_signals:
            self.pass_on(self._waiting_signals.pop(0))
        return {rank: process.pid for rank, process in self._processes.items()}

    def _agreed_starts(self, worker_group: WorkerGroup) -> int:
        """How often workers were started before, the same on every machine.

        torch counts for itself on each, and one that restarts because another did counts nothing: the workers then meet
        under different names in the store. The store here is that of the round.
        """
        machines, store = _machines(worker_group)
        if machines == 1:
            return self._starts
        store.set(f"gptcli/starts/{worker_group.group_rank}", str(self._starts))
        return max(int(store.get(f"gptcli/starts/{machine}")) for machine in range(machines))

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        running = self._watch(worker_group)
        failures = [ending for ending in self._endings.values() if not is_orderly(ending)]
        if not failures:
            self._look_elsewhere(worker_group)
        first = min((ending.seconds for ending in failures), default=time.time())
        if running and self._failed_elsewhere is None and time.time() < first + FOLLOW_SECONDS:
            return RunResult(state=WorkerState.HEALTHY)
        self._end(signal.SIGTERM, KILL_SECONDS)
        self._watch(worker_group, stopped=set(running))
        endings, size = list(self._endings.values()), worker_group.workers[0].world_size
        error = verdict(endings, size, signalled=self._signalled, advice=self._advice)
        if self._failed_elsewhere is not None:
            error = self._failed_elsewhere
        if error is None or error.exit_code == StoppedError.exit_code:
            self.error = error
            return RunResult(
                state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(w.global_rank for w in worker_group.workers)
            )
        self.error = error = self._heard_from_all(worker_group, error)
        if self._signalled or error.exit_code not in WORTH_A_RESTART:
            self._remaining_restarts = 0
        elif self._remaining_restarts:
            self._warn(f"{error.what}; starting again, {self._remaining_restarts - 1} restarts are left after this one")
        return RunResult(state=WorkerState.FAILED, failures=self._torch_failures(worker_group))

    def _watch(self, worker_group: WorkerGroup, stopped: set[int] | None = None) -> list[int]:
        """Take down the workers that have ended; return the local ranks of those that run."""
        running = []
        for worker in worker_group.workers:
            code = self._processes[worker.local_rank].poll()
            if code is None:
                running.append(worker.local_rank)
            elif worker.local_rank not in self._endings:
                report = read_report(self._reports / str(self._starts - 1), worker.global_rank)
                by_us = worker.local_rank in (stopped or ())
                self._endings[worker.local_rank] = Ending(worker.global_rank, code, time.time(), report, by_us)
        return running

    def _torch_failures(self, worker_group: WorkerGroup) -> dict[int, ProcessFailure]:
        return {
            ending.rank: ProcessFailure(local_rank, self._processes[local_rank].pid, ending.code, "")
            for local_rank, ending in self._endings.items()
            if ending.code
        } or {worker_group.workers[0].global_rank: ProcessFailure(0, 0, 1, "")}

    def _look_elsewhere(self, worker_group: WorkerGroup) -> None:
        """Look, once a second, whether workers of another machine failed: ours may wait for them in a collective."""
        machines, store = _machines(worker_group)
        if machines == 1 or time.monotonic() < self._looked + LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        with contextlib.suppress(RuntimeError):  # the store is gone with its machine: torch's own watch ends this
            self._failed_elsewhere = _told(store, 0.0)

    def _heard_from_all(self, worker_group: WorkerGroup, error: WorkersError) -> WorkersError:
        """On several machines: tell the others the cause, or hear it when ours only lost a connection."""
        machines, store = _machines(worker_group)
        if machines == 1:
            return error
        with contextlib.suppress(RuntimeError, ValueError):  # the store is gone with its machine
            if error is self._failed_elsewhere:
                store.add(HEARD, 1)
            elif error.lost and (told := _told(store, HEAR_SECONDS)) is not None:
                store.add(HEARD, 1)
                return told
            else:
                store.set(CAUSE, json.dumps([error.exit_code, error.label, error.lines(), error.lost]))
                until = time.monotonic() + HEAR_SECONDS
                while store.add(HEARD, 0) < machines - 1 and time.monotonic() < until:
                    time.sleep(POLL_SECONDS)
        return error

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown()
        self._processes.clear()
        self._failed_elsewhere = None

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 0) -> None:
        del timeout
        self._end(death_sig, KILL_SECONDS)

    def _end(self, number: signal.Signals, seconds: float) -> None:
        """End the workers that run, and whatever processes any of them left behind."""
        for process in self._processes.values():
            process.send_signal(number)
        self._wait(seconds)
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        self._wait(GONE_SECONDS)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(process.poll() is None for process in self._processes.values()):
            time.sleep(POLL_SECONDS)


def _machines(worker_group: WorkerGroup) -> tuple[int, Any]:
    """How many machines met, and the store that they share."""
    machines: Any = worker_group.group_world_size  # which torch declares to be None, as it is before they met
    return machines, worker_group.store


def _told(store: Any, seconds: float) -> WorkersError | None:
    """What another machine said that it failed of, waiting so long for it."""
    until = time.monotonic() + seconds
    while not store.check([CAUSE]):
        if time.monotonic() >= until:
            return None
        time.sleep(POLL_SECONDS)
    code, label, lines, lost = json.loads(store.get(CAUSE))
    return WorkersError(code, label, lines, lost=lost)
