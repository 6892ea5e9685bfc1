"""A process that has imported everything and forks a child for each command, with a fault in it where one is asked for.

The child is the real command in a process of its own, in a fifth of the time. Requests are lines of JSON on standard
input: a command (see `become`), answered with its process id; or {"wait": PID, "stopped": BOOL}, answered with its
exit code, or null once it has stopped. A fault goes by what Python tells its audit hooks of files, and by fsync:

    {"at": REGEX, "then": N, "do": ACTION}: before the N-th event after the first that matches; the action is the names
        of signals that the process sends itself, or "error", which is an I/O error in place of the operation
    {"bytes": N}: the first file that grows beyond N bytes ends the process in the middle of a write, as SIGKILL would
    {"bytes": N, "do": "error"}: that write is an error
    {"at": REGEX, "do": ACTION, "reading": true}: files that are opened to be read are such events too
    {"memory": N}: no more than N bytes of address space beyond what the fork has
    {"unprivileged": true}: a superuser is bound by permissions too
"""

import ctypes
import errno
import gc
import importlib
import json
import os
import re
import resource
import signal
import sys
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree")
# What a short run imports on its way.
MODULES = (
    "gptcli.cli.pretrain",
    "gptcli.cli.console",
    "gptcli.train.run",
    "gptcli.train.trainer",
    "gptcli.train.arguments",
    "gptcli.train.samples",
    "gptcli.data.tokenize",
    "gptcli.data.dataset",
    "gptcli.model.build",
    "gptcli.model.load",
    "gptcli.runs.report",
    "gptcli.cli.generate",
    "gptcli.generation.file",
    "gptcli.generation.text",
    "gptcli.generation.choose",
    "gptcli.generation.decode",
    "gptcli.cli.evaluate",
    "gptcli.evaluation.evaluate",
    "gptcli.evaluation.tasks",
    "gptcli.cli.plan",
    "gptcli.train.estimate",
    "gptcli.cli.chat",
    "gptcli.generation.chat",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)
CAPABILITY_VERSION_3 = 0x20080522
CLONE_NEWNET = 0x40000000


def be_faulty(fault: dict[str, Any]) -> None:
    """Prepare this process for what is to happen to it."""
    if fault.get("unprivileged"):
        drop_capabilities()
    if "bytes" in fault:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if fault.get("do") != "error":  # Python ignores it, so that the write is an error
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
    if "at" in fault:
        watch(re.compile(fault["at"]), fault.get("then", 0), fault["do"], reading=fault.get("reading", False))
    if "memory" in fault:
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + fault["memory"], resource.RLIM_INFINITY))


def watch(first: re.Pattern[str], left: int, action: str, *, reading: bool = False) -> None:
    """Take the action `left` events after the first that matches."""
    begun = False

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal begun, left
        if event == "open":
            if not isinstance(arguments[2], int) or not (reading or arguments[2] & WRITING):
                return
        elif event not in (*EVENTS, "os.fsync") or (event == "os.mkdir" and os.path.isdir(arguments[0])):
            return
        begun = begun or bool(first.search(" ".join([event, *(str(value) for value in arguments[:2])])))
        if begun:
            left -= 1
            if left == -1:
                act(action)

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        look("os.fsync", (os.readlink(f"/proc/self/fd/{number}"),))
        real_fsync(descriptor)

    real_fsync = os.fsync
    os.fsync = fsync
    sys.addaudithook(look)


def act(action: str) -> None:
    """Do to this process what the fault says."""
    if action == "error":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    for name in action.split():
        os.kill(os.getpid(), signal.Signals[name])


def drop_capabilities() -> None:
    """Give up all that a superuser may: a folder that is read-only by its mode is so for this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def enter(namespace: str) -> None:
    """Move this process to a network namespace that `ip netns add` made."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(descriptor)


def become(command: dict[str, Any]) -> None:
    """Turn this forked process into a command.

    It is {"arguments", "cwd", "environment", "in", "out", "err", "terminal", "fault", "namespace"}; the namespace is
    null or one's name, the terminal null or the path of one, whose foreground it will be.
    """
    if command["terminal"]:
        os.setsid()  # so that the terminal that it opens is its own
        for number in (0, 1, 2):
            os.dup2(os.open(command["terminal"], os.O_RDWR), number)
    else:
        for number, path, flags in (
            (0, command["in"], os.O_RDONLY),
            (1, command["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (2, command["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            os.dup2(os.open(path, flags, 0o644), number)
    sys.stdin = open(0)  # noqa: SIM115  (this one has read requests)
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["environment"])
    sys.argv = ["gptcli", *command["arguments"]]
    if command["namespace"]:
        enter(command["namespace"])
    be_faulty(command["fault"])


def serve() -> bool:
    """Answer requests; True in the child that is to run a command, False when there are no more."""
    for line in sys.stdin:
        request = json.loads(line)
        answer: int | None = None
        if "wait" in request:
            _, status = os.waitpid(request["wait"], os.WUNTRACED if request["stopped"] else 0)
            answer = None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                become(request)
                return True
        print(json.dumps(answer), flush=True)
    return False


if __name__ == "__main__":
    for module in MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    if serve():
        from gptcli.__main__ import run

        try:
            run()
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            # To take apart all that was imported would take as long as the run.
            os._exit(end.code if isinstance(end.code, int) else 1)
