"""Images on the web: what the URL of a stranger's row may reach, and what comes of it.

A row can name any address, and so ask for what only this computer can reach: its own services, a
router, a cloud's metadata. So a connection goes to the very address that was checked (a second look
at the name could find another), at every redirect again. Proxies of the environment are used only
with `allow_private_image_hosts`: they look names up themselves, behind the check.

One bad URL costs its row. Many hosts in a row that do not answer are a network that is down, which
must not leave rows out.
"""

import contextlib
import hashlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeAlias
from urllib.parse import quote, urlsplit, urlunsplit

from engine.chat.conversation import RowProblem
from engine.chat.images import IMAGE_LIMIT_BYTES, check_image
from engine.errors import WorkError
from engine.files import PRIVATE, write_whole

Resolver: TypeAlias = Callable[[str, int], Sequence[str]]
"""A host's addresses, as `addresses_of` gives them."""

# Without a byte for so long, and for one image in all.
SILENCE_SECONDS = 20.0
TOTAL_SECONDS = 120.0
# Of one command: far above what a fine-tune has use for, and less than a hostile list can ask for.
LIMIT_IMAGES = 1_000_000
LIMIT_BYTES = 200 * 10**9
LIMIT_WAITING_SECONDS = 3600.0
HOPS = 5
# With a fifth of all hosts dead, so many in a row happen once in 10^14 rows.
UNANSWERED_IN_A_ROW = 20
_TRIES_A_HOST = 3
_PAUSES_SECONDS = (1.0, 4.0)
_BLOCK_BYTES = 2**16
_AGENT = "windtunnel"
_WEB = ("http", "https")
# What a path and a query may hold unquoted; `%` because most are quoted already.
_UNQUOTED = "%/:=&?~#+!$,;'@()*[]"
_GLOBAL = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class NetworkDown(WorkError):
    """No host answers: the rows that were read meanwhile are not bad."""


class _Unanswered(Exception):
    """Nobody answered, or only that they are busy."""

    for_good = False
    """Whether there is nobody of that name."""


def is_web(name: str) -> bool:
    """Whether an image's name is a URL of the web."""
    return name.partition("://")[0].lower() in _WEB and "://" in name


def addresses_of(host: str, port: int) -> Sequence[str]:
    """What the system's resolver says; numbers in any form (127.1, 0x7f000001) too.

    Raises OSError and UnicodeError.
    """
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, also where it stands for an IPv4 one."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        return found in _GLOBAL and found.is_global and found.teredo is None
    return found.is_global and not found.is_multicast and not found.is_reserved


class WebImages:
    """Fetches for one command; what was fetched is kept in the user's cache by URL."""

    def __init__(
        self,
        *,
        private: bool = False,
        resolve: Resolver = addresses_of,
        pauses: Sequence[float] = _PAUSES_SECONDS,
    ) -> None:
        self._private = private
        self._resolve = resolve
        self._pauses = pauses
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(None if private else {}),
            _Redirects(self._note_answer),
            _Web(self._connect),
        )
        self._failed: Counter[str] = Counter()
        """How often a host that has never answered was asked."""
        self._dead: dict[str, str] = {}
        """Those that are not asked again, and why."""
        self._alive: set[str] = set()
        self._unanswered: list[str] = []
        """Why, since the last answer."""
        self._images = self._bytes = 0
        self._waited = 0.0
        self._held: list[socket.socket] = []

    def fetch(self, url: str) -> bytes:
        """The image behind a URL, from the cache or the web.

        Raises RowProblem where there is none to be had, NetworkDown where no host answers any more,
        WorkError where this command has fetched or waited beyond all measure.
        """
        plain, host = check_url(url)
        found = find_fetched(url)
        if found is not None:
            self._note_answer(host)
            return found
        if host in self._dead:
            raise _not_fetched(url, self._dead[host])
        self._refuse_more()
        start = time.monotonic()
        try:
            content = self._ask(plain, url, host)
        except _Unanswered as error:
            self._waited += time.monotonic() - start
            self._note_unanswered(host, error)
            raise _not_fetched(url, str(error)) from error
        self._note_answer(host)
        self._images += 1
        self._bytes += len(content)
        check_image(content)
        _keep(url, content)
        return content

    def finish(self) -> None:
        """After the last row. Raises NetworkDown where several were asked for and none was there:
        that is no fault of the rows."""
        if self._failed.total() > 1 and not self._alive:
            raise self._network_down()

    def _note_answer(self, host: str) -> None:
        self._alive.add(host)
        self._unanswered.clear()

    def _note_unanswered(self, host: str, error: _Unanswered) -> None:
        self._unanswered.append(str(error))
        if host not in self._alive:
            self._failed[host] += 1
            if error.for_good or self._failed[host] >= _TRIES_A_HOST:
                self._dead[host] = str(error)
        if len(self._unanswered) >= UNANSWERED_IN_A_ROW:
            raise self._network_down()

    def _network_down(self) -> NetworkDown:
        count = len(self._unanswered)
        return NetworkDown(
            "The images on the web cannot be fetched.",
            f"{count} in a row were not answered; the last time: {self._unanswered[-1]}",
            "Run the command again when the network answers, or copy the images here and name the"
            " files; what was fetched stays.",
        )

    def _refuse_more(self) -> None:
        if self._images >= LIMIT_IMAGES or self._bytes >= LIMIT_BYTES:
            why = f"At most {LIMIT_IMAGES:,} images and {LIMIT_BYTES / 1e9:.0f} GB are."
        elif self._waited >= LIMIT_WAITING_SECONDS:
            why = f"Hosts that do not answer took {LIMIT_WAITING_SECONDS / 60:.0f} minutes."
        else:
            return
        raise WorkError(
            "No more images are fetched by this command.",
            why,
            "Run it again to go on: what was fetched stays. Or copy the images here and name the"
            " files.",
        )

    def _ask(self, url: str, named: str, host: str) -> bytes:
        """Ask until there is an answer; a busy server is asked again."""
        for pause in (*self._pauses, None):
            try:
                return self._download(url)
            except urllib.error.HTTPError as error:
                error.close()
                said = f"The server answered {error.code} {error.reason}."
                if error.code != 429 and error.code < 500:
                    self._note_answer(host)
                    raise _not_fetched(named, said) from error
                if pause is None:
                    raise _Unanswered(said) from error
                time.sleep(pause)
            except (http.client.InvalidURL, ValueError) as error:
                raise _bad_url(named, error) from error
            except (OSError, http.client.HTTPException) as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                unanswered = _Unanswered(f"{type(reason).__name__}: {reason}.")
                unanswered.for_good = getattr(reason, "errno", None) == socket.EAI_NONAME
                raise unanswered from error
        raise AssertionError("the last pause is None")

    def _download(self, url: str) -> bytes:
        request = urllib.request.Request(url, headers={"User-Agent": _AGENT})
        cut = threading.Event()
        # A server can send headers a byte at a time, each within the time of silence.
        timer = threading.Timer(TOTAL_SECONDS, self._cut, [cut])
        timer.daemon = True
        timer.start()
        blocks, size = [], 0
        try:
            with self._opener.open(request, timeout=SILENCE_SECONDS) as answer:
                while size <= IMAGE_LIMIT_BYTES and (block := answer.read1(_BLOCK_BYTES)):
                    blocks.append(block)
                    size += len(block)
        finally:
            timer.cancel()
            while self._held:
                self._held.pop().close()
        if cut.is_set():
            raise TimeoutError(f"it took longer than {TOTAL_SECONDS:.0f} seconds")
        return b"".join(blocks)[: IMAGE_LIMIT_BYTES + 1]

    def _cut(self, cut: threading.Event) -> None:
        cut.set()
        for held in list(self._held):
            with contextlib.suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)

    def _connect(
        self, place: tuple[str, int], timeout: float | None, source: Any = None
    ) -> socket.socket:
        """As `socket.create_connection`, to an address that was checked, and to no other."""
        host, port = place
        addresses = self._resolve(host, port)
        allowed = [each for each in addresses if self._private or is_public(each)]
        if not allowed:
            raise RowProblem(
                "The image is not on the public internet.",
                f"{_short(host)} is {_short(', '.join(addresses))}: this computer or a private"
                " network, which a stranger's row must not reach.",
                "Copy the images here and name the files; where the rows are your own, write"
                " allow_private_image_hosts: true.",
            )
        for address in allowed[:-1]:
            with contextlib.suppress(OSError):
                return self._open((address, port), timeout)
        return self._open((allowed[-1], port), timeout)

    def _open(self, place: tuple[str, int], timeout: float | None) -> socket.socket:
        opened = socket.create_connection(place, timeout)
        # TLS takes the socket itself away; the copy is the same connection.
        self._held.append(opened.dup())
        return opened


class _Web(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens http and https by `connect`; TLS is held against the host's name, as ever."""

    def __init__(self, connect: Callable[..., socket.socket]) -> None:
        super().__init__()
        self._connect = connect
        self._trust = ssl.create_default_context()

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(self._make, http.client.HTTPConnection), req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        make = partial(self._make, http.client.HTTPSConnection, context=self._trust)
        return self.do_open(make, req)

    def _make(
        self, kind: type[http.client.HTTPConnection], host: str, **keys: Any
    ) -> http.client.HTTPConnection:
        connection = kind(host, **keys)
        connection._create_connection = self._connect  # type: ignore[attr-defined]
        return connection


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = HOPS

    def __init__(self, note_answer: Callable[[str], None]) -> None:
        self._note_answer = note_answer

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        self._note_answer(req.host)
        return super().redirect_request(req, fp, code, msg, headers, check_url(newurl)[0])


def check_url(url: str) -> tuple[str, str]:
    """(the URL in ASCII, its host and port). Raises RowProblem where it is none of the web."""
    try:
        parts = urlsplit(url)
        if not is_web(url) or not parts.hostname:
            raise ValueError("it names no host of http or https")
        if not url.isprintable() or "@" in parts.netloc:
            raise ValueError("it holds a password or characters that cannot be seen")
        host = parts.hostname.encode("idna").decode("ascii")
        port = "" if parts.port is None else f":{parts.port}"
    except ValueError as error:
        raise _bad_url(url, error) from error
    place = f"[{host}]{port}" if ":" in host else f"{host}{port}"
    tail = (quote(part, safe=_UNQUOTED) for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, place, *tail, "")), place


def _short(name: str) -> str:
    return name if len(name) <= 100 else f"{name[:97]}..."


def _bad_url(url: str, error: Exception) -> RowProblem:
    return RowProblem(
        "The image's URL cannot be followed.",
        f"{_short(url)}: {error}.",
        "Correct the URL, or delete the row.",
    )


def _not_fetched(url: str, why: str) -> RowProblem:
    return RowProblem(
        f"The image {_short(url)} cannot be fetched.",
        why,
        "Correct the URL, or delete the row.",
    )


def read_kept(url: str) -> bytes:
    """The bytes of a URL without asking the web. Raises RowProblem where it was never fetched."""
    check_url(url)
    found = find_fetched(url)
    if found is None:
        raise RowProblem(
            "The image is on the web and was not fetched.",
            f"{_short(url)} is not on this computer, and looking at rows fetches nothing.",
            "Run windtunnel prepare with the config: it fetches every image once.",
        )
    return found


def find_fetched(url: str) -> bytes | None:
    """The bytes of a URL that was fetched before, else None."""
    try:
        return _place(url).read_bytes()
    except OSError:
        return None


def _place(url: str) -> Path:
    from platformdirs import user_cache_path

    name = hashlib.blake2b(url.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return user_cache_path("windtunnel") / "images" / name[:2] / name


def _keep(url: str, content: bytes) -> None:
    place = _place(url)
    try:
        place.parent.mkdir(PRIVATE, parents=True, exist_ok=True)
        write_whole(place, content)
    except OSError as error:
        raise WorkError(
            f"The fetched image cannot be kept in {place.parent}.",
            f"{error.strerror or error}.",
            "Free space there.",
        ) from error
