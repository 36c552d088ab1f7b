"""Images on the web: fetched once, within limits, and kept in the user's cache by their URL.

The one place where a row of a stranger makes this computer ask the network.
Only http and https are spoken, after a redirect too.
"""

import hashlib
import time
import urllib.error
import urllib.request
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO

from engine.chat.conversation import RowProblem
from engine.chat.images import IMAGE_LIMIT_BYTES, check_image
from engine.errors import WorkError
from engine.files import write_whole

# Without a byte for so long, and for one image in all.
SILENCE_SECONDS = 20.0
TOTAL_SECONDS = 120.0
_BLOCK_BYTES = 2**16
_AGENT = "windtunnel"
# The server's word that there is no image here; every other status may pass.
_GONE = (400, 401, 403, 404, 405, 406, 410, 414, 415, 451)


def find_fetched(url: str) -> bytes | None:
    """The bytes of a URL that was fetched before, else None."""
    try:
        return _place(url).read_bytes()
    except OSError:
        return None


def fetch_image(url: str) -> bytes:
    """The image behind a URL, from the cache or the web.

    Raises RowProblem where the server says that there is none, and where what it sends is no image
    within the limits; WorkError where it does not answer: a row must not be left out because a
    network was down.
    """
    found = find_fetched(url)
    if found is not None:
        return found
    try:
        content = _download(url)
    except urllib.error.HTTPError as error:
        error.close()
        # A redirect that is not followed: to another scheme, or round in circles.
        if error.code in _GONE or error.code // 100 == 3:
            raise RowProblem(
                f"The image {url[:100]} cannot be fetched.",
                f"The server answered {error.code} {error.reason}.",
                "Correct the URL, or delete the row.",
            ) from error
        raise _unanswered(url, f"The server answered {error.code} {error.reason}.") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise _unanswered(url, f"{type(error).__name__}: {reason}.") from error
    except ValueError as error:
        raise RowProblem(
            f"The image {url[:100]} cannot be fetched.",
            f"The URL is not one that is followed: {error}.",
            "Correct the URL, or delete the row.",
        ) from error
    check_image(content)
    _keep(url, content)
    return content


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message,
        newurl: str,
    ) -> urllib.request.Request | None:
        if not newurl.lower().startswith(("http://", "https://")):
            raise ValueError(f"it leads to {newurl[:60]}, and only http and https are followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": _AGENT})
    deadline = time.monotonic() + TOTAL_SECONDS
    opener = urllib.request.build_opener(_WebRedirects)
    with opener.open(request, timeout=SILENCE_SECONDS) as answer:
        blocks, size = [], 0
        while size <= IMAGE_LIMIT_BYTES and (block := answer.read1(_BLOCK_BYTES)):
            blocks.append(block)
            size += len(block)
            if time.monotonic() > deadline:
                raise TimeoutError(f"it took longer than {TOTAL_SECONDS:.0f} seconds")
    return b"".join(blocks)[: IMAGE_LIMIT_BYTES + 1]


def _unanswered(url: str, why: str) -> WorkError:
    return WorkError(
        f"The image {url[:100]} could not be fetched.",
        why,
        "Run the command again when the network answers; what was fetched stays.",
    )


def _place(url: str) -> Path:
    from platformdirs import user_cache_path

    name = hashlib.blake2b(url.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return user_cache_path("windtunnel") / "images" / name[:2] / name


def _keep(url: str, content: bytes) -> None:
    place = _place(url)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, content)
    except OSError as error:
        raise WorkError(
            f"The fetched image cannot be kept in {place.parent}.",
            f"{error.strerror or error}.",
            "Free space there.",
        ) from error
