"""This machine's side of the way to another: asked of the kernel, which picks an address by its routes. No packet goes.

torch and gloo take the address that a machine finds for its own name instead, which is often no address for others:
Debian writes `127.0.1.1 NAME` into /etc/hosts, and containers know names that nobody else does.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from typing import Any

from gptcli.environment import HERE, LOOPBACK
from gptcli.errors import UsageError

# Nobody's (RFC 5737): the way there is the way out of this machine.
OUTSIDE = "192.0.2.1"
STEP_SECONDS = 600
# Unanswered questions after which a silent machine is gone.
QUESTIONS = 3


def address_for_others(meeting: str) -> str:
    """The address by which the machines that meet at a host reach this one.

    On the machine that they meet at, where its name may stand for the loopback, it is that name.
    """
    if meeting in LOOPBACK:
        return HERE
    return _source(meeting) or meeting


def interface_towards(host: str) -> str | None:
    """The interface that leads to a host, or out of this machine when it is this one by name; None: not known."""
    import psutil

    address = _source(host) or _source(OUTSIDE) or ""
    interfaces: dict[str, list[Any]] = psutil.net_if_addrs()
    return next((name for name, has in interfaces.items() if address in [found.address for found in has]), None)


def is_ours_and_free(address: str, port: int) -> bool:
    """Whether this machine has the address, by whatever name, and nobody listens there."""
    try:
        kind, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError:
        return False
    return True


def port_to_listen_at(host: str, port: int) -> int:
    """The port that a server can listen at, or one that is free where `port` is 0.

    Raises:
        UsageError: somebody listens there, it is not ours to take, or the host is no address of this machine.
    """
    try:
        kind, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            found: int = probe.getsockname()[1]
            return found
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            what, remedy = f"port {port} of {host} is taken", "Name another, or take any free one: --port auto."
        elif error.errno == errno.EACCES:
            what, remedy = f"port {port} of {host} is not yours to take", "Name one from 1024 on, or --port auto."
        else:
            what = f"{host} is no address of this machine ({error.strerror or error})"
            remedy = "--host 127.0.0.1 is this machine alone, 0.0.0.0 all of its addresses."
        raise UsageError(what, remedy=remedy) from None


def step_seconds() -> int:
    """How long a step waits for a process, and a connection for an answer; GPTCLI_STEP_TIMEOUT or ten minutes.

    Raises:
        UsageError: it is no whole number above 0.
    """
    text = os.environ.get("GPTCLI_STEP_TIMEOUT", str(STEP_SECONDS))
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(
            f"GPTCLI_STEP_TIMEOUT={text}: not a number of seconds",
            remedy=f"How long a step waits for a process that neither goes on nor dies; {STEP_SECONDS} if unset.",
        )
    return int(text)


def notice_silence(seconds: int) -> None:
    """Let every connection that this process has now fail once its other end has been silent so long (Linux).

    torch and gloo ask for no such thing: without it one waits a quarter of an hour for a machine that lost its power
    or its network when it owes an answer, and forever when it owes none. A busy or stopped process is not silent: its
    kernel answers.
    """
    folder = "/proc/self/fd"
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            connection = held.enter_context(socket.socket(fileno=os.dup(int(name))))
            connection.getpeername()
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                pause = max(1, seconds // QUESTIONS)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, pause)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, pause)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, QUESTIONS)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)


def _source(host: str) -> str | None:
    """The address from which this machine sends to a host; None: it cannot, or only to itself."""
    with contextlib.suppress(OSError):
        kind, _, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            address: str = probe.getsockname()[0]
        if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            return address
    return None
