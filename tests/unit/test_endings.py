from __future__ import annotations

import signal
from pathlib import Path

import pytest

from gptcli.endings import Ending, Report, WorkersError, read_report, report_of, verdict, write_report
from gptcli.errors import DataError, GptcliError, StoppedError

LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"


def ending(rank: int, code: int, seconds: float = 1.0, says: str | None = None, typed: bool = True) -> Ending:
    label = "stopped" if code in (75, 130) else "error"
    report = None if says is None else Report(rank, code, label, [says], typed, seconds)
    return Ending(rank, code, seconds, report)


def judged(*endings: Ending, signalled: bool = False) -> tuple[int, str]:
    error = verdict(endings, len(endings), signalled=signalled)
    assert isinstance(error, WorkersError)
    return error.exit_code, (error.lines() or [""])[0]


def test_all_done_is_no_error_and_all_stopped_is_75_said_once() -> None:
    assert verdict([ending(0, 0), ending(1, 0)], 2, signalled=False) is None
    stopped = [ending(rank, 75, says="by SIGTERM; step 3 is saved") for rank in (0, 1)]
    assert judged(*stopped) == (75, "by SIGTERM; step 3 is saved")
    assert judged(ending(0, 0), ending(1, 75, says="by SIGTERM")) == (75, "by SIGTERM")


def test_the_cause_is_what_a_worker_decided_before_what_it_did_not_expect_before_a_loss() -> None:
    lost = ending(0, 1, 1.0, LOST, typed=False)
    unexpected = ending(1, 1, 3.0, "ValueError: x", typed=False)
    decided = ending(2, 3, 4.0, "a.txt: is empty")
    killed = ending(3, -signal.SIGKILL, 2.0)
    assert judged(lost, unexpected, decided, killed) == (3, "process 2 of 4: a.txt: is empty")
    assert judged(lost, unexpected, killed) == (1, "process 1 of 3: ValueError: x")
    assert judged(lost, killed) == (6, "process 3 of 2 was killed (SIGKILL): probably out of memory")
    assert judged(lost) == (1, f"process 0 of 1: {LOST}")


def test_a_loss_that_nothing_explains_says_what_may_have_failed_and_no_advice_of_gloo() -> None:
    said = f"{LOST}. This is typically caused by a remote worker hanging. GLHF!"
    error = verdict([ending(0, 1, 1.0, said, typed=False)], 2, signalled=False)
    assert error is not None and error.lost
    head, remedy = error.lines()
    assert head == f"process 0 of 2: {LOST}"
    assert "network has probably failed" in remedy and "from the last checkpoint" in remedy


def test_of_two_decisions_the_earlier_is_the_cause() -> None:
    assert judged(ending(0, 3, 2.0, "later"), ending(1, 4, 1.0, "earlier")) == (4, "process 1 of 2: earlier")


def test_an_error_that_rank_0_says_too_names_no_rank() -> None:
    assert judged(ending(0, 3, 2.0, "a.txt: is empty"), ending(1, 3, 1.0, "a.txt: is empty"))[1] == "a.txt: is empty"


@pytest.mark.parametrize(
    ("code", "head"),
    [
        (-signal.SIGSEGV, "process 1 of 2 died by SIGSEGV"),
        (-signal.SIGTERM, "process 1 of 2 died by SIGTERM"),
        (17, "process 1 of 2 ended with code 17 and no message"),
    ],
)
def test_an_end_without_a_word_is_told_by_its_code(code: int, head: str) -> None:
    assert judged(ending(0, 0), ending(1, code)) == (17 if code == 17 else 1, head)


def test_leaving_at_once_is_130_whatever_the_others_lost_by_it() -> None:
    # The worker has said so itself.
    assert judged(ending(0, 130), ending(1, 130), signalled=True) == (130, "")
    # The second signal found it in a collective, where it is not heard.
    assert judged(ending(0, 130), ending(1, 1, says=LOST, typed=False), signalled=True) == (130, "")
    # A signal before the worker listened.
    assert judged(ending(0, -signal.SIGTERM), ending(1, -signal.SIGINT), signalled=True)[0] == 130
    assert judged(ending(0, 130, says="there was nothing to save"), signalled=True) == (
        130,
        "there was nothing to save",
    )


def test_a_stop_with_work_saved_is_75_whatever_the_waiting_others_had_to_save() -> None:
    stopped, waited = ending(0, 75, says="40% is tokenized"), ending(1, 130, says="there was nothing to save")
    assert judged(stopped, waited, signalled=True) == (75, "40% is tokenized")
    assert judged(stopped, ending(1, 130), signalled=True)[0] == 130


def test_a_worker_that_its_parent_ended_is_no_cause() -> None:
    ended = Ending(0, -signal.SIGKILL, 9.0, None, stopped=True)
    assert judged(ended, ending(1, 3, says="a.txt: is empty")) == (3, "process 1 of 2: a.txt: is empty")


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    error = DataError("is empty", where="a.txt", remedy="Fill it.\nOr leave it out.")
    report = report_of(error, 1, "Traceback")
    assert write_report(tmp_path, report)
    assert read_report(tmp_path, 1) == report
    assert report.lines == ["a.txt: is empty", "Fill it.", "Or leave it out."]
    assert (report.code, report.label, report.typed) == (3, "error", True)
    assert not report_of(GptcliError("RuntimeError: x"), 0).typed
    assert report_of(StoppedError("by SIGTERM"), 0).label == "stopped"


def test_a_report_that_is_not_there_or_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    assert read_report(tmp_path, 0) is None
    (tmp_path / "0.json").write_text("{")
    assert read_report(tmp_path, 0) is None
    assert not write_report(tmp_path / "gone", report_of(DataError("x"), 0))
