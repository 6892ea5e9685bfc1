"""Images and sounds behind http and https, where `data.allow_urls` lets them be fetched: bounded in size and time.

No other kind of address is followed, not after a redirection either. The system's proxies are used.
"""

from __future__ import annotations

import http.client
import string
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from gptcli.data.media.fault import MediaFault
from gptcli.errors import first_line
from gptcli.reporting import mebibytes

MAX_BYTES = 128 << 20
# For an answer, and for all of it: a server that sends a byte a second is given up too.
SILENT_SECONDS, TOTAL_SECONDS = 20.0, 120.0
_BLOCK = 1 << 16
_AGENT = "gptcli"


def fetched(address: str, name: str, *, max_bytes: int = MAX_BYTES, seconds: float = TOTAL_SECONDS) -> bytes:
    """What an address answers.

    Raises:
        MediaFault: nothing answers in time, the answer is another than 200, cut short or of more than `max_bytes`.
    """
    until = time.monotonic() + seconds
    try:
        request = urllib.request.Request(_ascii(address), headers={"User-Agent": _AGENT})
        with _opener().open(request, timeout=min(SILENT_SECONDS, seconds)) as answer:
            return _body(answer, name, max_bytes, until)
    except urllib.error.HTTPError as error:
        error.close()
        raise MediaFault(name, "not fetched", f"cannot be fetched: the answer is {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        reason = error.reason
        text = first_line(reason) if isinstance(reason, Exception) else str(reason)
        raise MediaFault(name, "not fetched", f"cannot be fetched: {text}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MediaFault(name, "not fetched", f"cannot be fetched: {first_line(error)}") from None


def _body(answer: Any, name: str, max_bytes: int, until: float) -> bytes:
    told = answer.headers.get("Content-Length", "")
    expected = int(told) if told.isascii() and told.isdecimal() else None
    parts: list[bytes] = []
    size = 0
    while True:
        if max(size, expected or 0) > max_bytes:
            raise MediaFault(name, "too large", f"is larger than {mebibytes(max_bytes)}")
        if time.monotonic() > until:
            raise MediaFault(name, "not fetched", "cannot be fetched: the answer takes too long")
        part = answer.read1(_BLOCK)
        if not part:
            break
        parts.append(part)
        size += len(part)
    if expected is not None and size < expected:
        raise MediaFault(name, "not fetched", f"cannot be fetched: the answer ends after {size} of {expected} bytes")
    return b"".join(parts)


def _ascii(address: str) -> str:
    """An address as it is sent: spaces and letters of other alphabets in its path as percent signs."""
    parts = urllib.parse.urlsplit(address)
    host = parts.netloc.encode("idna").decode() if not parts.netloc.isascii() else parts.netloc
    path, query = (urllib.parse.quote(part, safe=string.punctuation) for part in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))


class _SameKind(urllib.request.HTTPRedirectHandler):
    """Redirections to http and https only; urllib would follow one to ftp too."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(newurl).scheme.lower() not in ("http", "https"):
            fp.close()
            raise urllib.error.URLError("it leads to an address that is neither http nor https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _SameKind(),
    ):
        opener.add_handler(handler)
    return opener
