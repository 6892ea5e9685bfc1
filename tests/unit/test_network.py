from __future__ import annotations

import os
import socket

import pytest

from gptcli.errors import UsageError
from gptcli.network import address_for_others, interface_towards, is_ours_and_free, notice_silence, step_seconds

LOOPBACK_NAMES = {"lo", "lo0"}


def test_a_machine_that_meets_others_at_its_own_loopback_is_called_by_the_name_they_use() -> None:
    assert address_for_others("localhost") == "127.0.0.1"
    assert address_for_others("127.0.1.1") == "127.0.1.1"
    assert address_for_others("no-such-host.invalid") == "no-such-host.invalid"


def test_the_interface_is_never_the_loopback() -> None:
    assert interface_towards("127.0.0.1") not in LOOPBACK_NAMES


def test_an_address_is_ours_until_somebody_listens_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.listen()
        assert not is_ours_and_free("127.0.0.1", port)
    assert is_ours_and_free("127.0.0.1", port)
    assert not is_ours_and_free("192.0.2.1", port)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "soon"])
def test_a_timeout_that_is_no_number_of_seconds_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("GPTCLI_STEP_TIMEOUT", text)
    with pytest.raises(UsageError, match="GPTCLI_STEP_TIMEOUT"):
        step_seconds()


def test_the_timeout_is_ten_minutes_or_as_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPTCLI_STEP_TIMEOUT", raising=False)
    assert step_seconds() == 600
    monkeypatch.setenv("GPTCLI_STEP_TIMEOUT", "8")
    assert step_seconds() == 8


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux")
def test_connections_are_asked_and_nothing_else_is_touched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        before = sorted(os.listdir("/proc/self/fd"))
        notice_silence(9)
        assert sorted(os.listdir("/proc/self/fd")) == before
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 9000
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 3
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
