"""Files that are written whole or not at all, and fingerprints of content.

Every file that another step depends on goes through `write_atomic` (temporary sibling, fsync, rename) or
`committed_folder` (the same for a folder): a reader never sees half of one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import platformdirs

HASH_BLOCK = 1 << 20
PROBE_BYTES = 1 << 20


def cache_root() -> Path:
    """The folder of prepared data and trained tokenizers: `$GPTCLI_CACHE`, else the platform's cache folder."""
    given = os.environ.get("GPTCLI_CACHE")
    return Path(given).expanduser().resolve() if given else Path(platformdirs.user_cache_dir("gptcli"))


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable (a rename is not, before this)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file through a temporary sibling, fsync and rename."""
    raw = data.encode("utf-8") if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document atomically, indented, in the order given."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read one JSON document."""
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def committed_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `target` by one rename when the block ends without an error.

    All files are fsynced first. An existing `target` is replaced. On an error the temporary folder is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        yield work
        for path in sorted(work.rglob("*")):
            if path.is_file():
                path.chmod(0o644)  # safetensors writes for its own user alone
                fsync_file(path)
            else:
                fsync_folder(path)
        fsync_folder(work)
        os.chmod(work, 0o755)
        remove(target)
        os.rename(work, target)
        fsync_folder(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def remove(path: Path) -> None:
    """Remove a file, a folder with what is in it, or a link (not what it leads to), if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_uncommitted(target: Path) -> None:
    """Remove what processes that were killed in `committed_folder` left; only for who holds a lock on `target`."""
    for work in target.parent.glob(f".{target.name}.tmp-*"):
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def locked(name: str, on_wait: Callable[[], None], *, shared: bool = False) -> Iterator[None]:
    """Hold a lock of the cache, so that two processes do not do the same work; `on_wait` is called before waiting.

    `shared`: beside others that share it, and not beside one that does not.

    It ends with the process, however that ends. On a file system without locks there is none.
    """
    folder = cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with (folder / name).open("w") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, kind)
        except OSError:
            pass
        yield


@contextlib.contextmanager
def held_alone(lock: Path, refuse: Callable[[str], Exception]) -> Iterator[None]:
    """Hold a lock file that names this process; one that another process holds raises what `refuse` makes of its id."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refuse(os.read(descriptor, 32).decode(errors="replace").strip() or "unknown") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def system_errors(work: Path) -> Iterator[None]:
    """Inside, what safetensors and torch raise when a file in `work` cannot be written is the system's error again.

    safetensors tells its number. torch's writer of archives does not, so the system is asked once more.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        if "inline_container" in str(error):
            with tempfile.TemporaryFile(dir=work) as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
        raise


def sha256_file(path: Path) -> str:
    """The sha256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """The sha256 (first 16 hexadecimal digits) of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def leads_out(path: Path) -> Path | None:
    """Where a link leads to, out of its folder and of the Hub's cache; None: it is no link, or stays there."""
    if not path.is_symlink():
        return None
    folder, real = path.parent.resolve(), path.resolve()
    return None if real.is_relative_to(folder) or real.parent == folder.parent.parent / "blobs" else real
