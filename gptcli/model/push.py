"""A folder to the Hugging Face Hub. Whether it may go there is asked before the folder is made, not after."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptcli.errors import MissingError, first_line
from gptcli.reporting import Reporter


def check_login(repository: str) -> str:
    """Ask the Hub who we are; returns the name.

    Raises:
        MissingError: nobody is logged in, or the Hub is not reached.
    """
    from huggingface_hub import HfApi, get_token

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise MissingError(
            "--push needs the network, and HF_HUB_OFFLINE is set", remedy="Unset it, or leave out --push."
        )
    if not get_token():
        raise MissingError(
            "--push needs a login at the Hugging Face Hub, and there is none",
            remedy="hf auth login, or set HF_TOKEN to a token that may write (https://huggingface.co/settings/tokens).",
        )
    with _hub_errors(repository, "Nothing was written."):
        who: dict[str, Any] = HfApi().whoami()
    return str(who.get("name", ""))


def push(folder: Path, repository: str, *, private: bool, message: str, comfort: str, reporter: Reporter) -> str:
    """Upload a folder into a repository, which is made if it is not there; returns its address.

    Args:
        folder: what to upload, all of it.
        repository: OWNER/NAME.
        private: whether a new repository is; one that is there stays as it is.
        message: of the commit.
        comfort: what is not lost when it fails.
        reporter: where it is said what was done.

    Raises:
        MissingError: the Hub refuses, or is not reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_errors(repository, comfort):
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    kind = "private where it is new" if private else "public where it is new"
    reporter.say(f"pushed to {address} ({kind})")
    return str(address)


@contextmanager
def _hub_errors(repository: str, comfort: str) -> Iterator[None]:
    """Turn what the Hub's client raises into our error."""
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            what = f"the Hub does not let this login write to {repository}"
        elif status is not None:
            what = f"the Hub answered {status} for {repository}"
        elif isinstance(error, OSError) or "http" in type(error).__module__.lower():
            what = "the Hub is not reached"
        else:
            raise
        raise MissingError(what, remedy=f"{first_line(error)[:300]}\n{comfort}") from error
    finally:
        enable_progress_bars()
