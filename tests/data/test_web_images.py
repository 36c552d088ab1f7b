"""What the URL of a row may reach, and what a bad one costs: its row, never the command."""

import contextlib
import http.server
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.chat.conversation import RowProblem
from engine.config import DatasetConfig
from engine.data import prepare as preparing
from engine.data import web_images
from engine.data.prepare import prepare
from engine.data.web_images import NetworkDown, WebImages, check_url, find_fetched, is_public
from engine.errors import WorkError
from tests.support.data import about, chat, config_of, write_rows
from tests.support.pictures import png

MOVED = {
    "/away": "file:///etc/hostname",
    "/ftp": "ftp://127.0.0.1/cat.png",
    "/circle": "/circle",
    "/inside": "http://inside.example/cat.png",
    "/metadata": "http://169.254.169.254/latest/meta-data",
    "/mapped": "http://[::ffff:10.0.0.1]/cat.png",
    "/moved": "/cat.png",
}
BODIES = {
    "/cat.png": png(),
    "/chat%C3%B6.png": png(),
    "/page": b"<html>",
    "/large": bytes(21_000_000),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@dataclass
class Site:
    port: int
    asked: Counter[str]
    handler: type[http.server.BaseHTTPRequestHandler]


@pytest.fixture
def site() -> Iterator[Site]:
    """A server, and how often it was asked for what."""
    asked: Counter[str] = Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked[self.path] += 1
            place = MOVED.get(self.path)
            busy = self.path == "/busy" or (self.path == "/soon" and asked["/soon"] < 3)
            body = BODIES["/cat.png"] if self.path == "/soon" else BODIES.get(self.path)
            self.send_response(302 if place else 503 if busy else 404 if body is None else 200)
            if place:
                self.send_header("Location", place)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield Site(server.server_port, asked, Handler)
    server.shutdown()
    server.server_close()


class Names:
    """A resolver: hosts of `known` are at their addresses, nobody else is anywhere."""

    def __init__(self, *known: str, error: int = socket.EAI_NONAME) -> None:
        self.known = dict.fromkeys(known, ("127.0.0.1",)) | {"inside.example": ("10.0.0.1",)}
        self.asked: list[str] = []
        self.error = error

    def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host in self.known:
            return self.known[host]
        if host[0].isdigit() or ":" in host:
            return web_images.addresses_of(host, port)
        raise socket.gaierror(self.error, "Name or service not known")


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Names:
    """One public host, which the test's own server plays: its address alone counts as public."""
    real = is_public
    monkeypatch.setattr(web_images, "is_public", lambda each: each == "127.0.0.1" or real(each))
    return Names("cats.example")


@pytest.fixture
def web(public: Names) -> WebImages:
    return WebImages(resolve=public, pauses=(0, 0))


def problem_of(web: WebImages, url: str) -> RowProblem:
    with pytest.raises(RowProblem) as caught:
        web.fetch(url)
    assert find_fetched(url) is None
    return caught.value


class TestAddresses:
    @pytest.mark.parametrize(
        "address", ["8.8.8.8", "2600::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]
    )
    def test_the_public_internet(self, address: str) -> None:
        assert is_public(address)

    @pytest.mark.parametrize(
        "address",
        [
            *("127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1"),
            *("169.254.169.254", "224.0.0.1", "240.0.0.1", "255.255.255.255", "198.18.0.1"),
            *(
                *("::1", "::", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1"),
                "100::1",
            ),
            *("::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
            *("64:ff9b:1::1", "2002:7f00:1::", "2001:0:7f00:1::"),
        ],
    )
    def test_this_computer_and_private_networks(self, address: str) -> None:
        assert not is_public(address)

    @pytest.mark.parametrize(
        "host",
        [
            *("127.0.0.1", "2130706433", "0x7f000001", "017700000001", "127.1", "[::1]"),
            *("[::ffff:127.0.0.1]", "inside.example", "169.254.169.254", "[64:ff9b::a00:1]"),
        ],
    )
    def test_none_of_their_spellings_is_asked(self, host: str, site) -> None:
        found = problem_of(WebImages(resolve=Names()), f"http://{host}:{site.port}/cat.png")
        assert "not on the public internet" in found.what
        assert "allow_private_image_hosts: true" in found.fix
        assert not site.asked

    @pytest.mark.parametrize("path", ["/inside", "/metadata", "/mapped"])
    def test_a_redirect_is_checked_again(self, web: WebImages, site, path: str) -> None:
        found = problem_of(web, f"http://cats.example:{site.port}{path}")
        assert "not on the public internet" in found.what

    def test_a_name_is_looked_up_once_for_each_connection(self, web, public: Names, site) -> None:
        """With a second look, the address that is reached could be another than was checked."""
        url = f"http://cats.example:{site.port}"
        web.fetch(f"{url}/cat.png")
        assert public.asked == ["cats.example"]
        web.fetch(f"{url}/moved")
        assert public.asked == ["cats.example"] * 3

    def test_tls_is_held_against_the_name(self, public: Names, site, monkeypatch) -> None:
        pem = Path(__file__).parents[1] / "fakes" / "cats.example.pem"
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trust.load_cert_chain(pem)
        with http.server.HTTPServer(("127.0.0.1", 0), site.handler) as server:
            server.socket = trust.wrap_socket(server.socket, server_side=True)
            threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
            public.known["dogs.example"] = ("127.0.0.1",)
            web = WebImages(resolve=public)
            place = f"{server.server_port}/cat.png"
            assert web.fetch(f"https://cats.example:{place}") == png()
            assert "Hostname mismatch" in problem_of(web, f"https://dogs.example:{place}").why
            server.shutdown()

    def test_proxies_are_used_only_where_the_key_allows_it(self, public, site, monkeypatch) -> None:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{site.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        url = "http://elsewhere.example/cat.png"
        assert "not known" in problem_of(WebImages(resolve=public), url).why
        assert not site.asked
        problem_of(WebImages(private=True, resolve=Names("127.0.0.1")), url)
        assert site.asked == Counter([url])


class TestOneRow:
    def test_an_image_is_fetched_once_and_then_known(self, web: WebImages, site: Site) -> None:
        url = f"http://cats.example:{site.port}/cat.png"
        assert web.fetch(url) == web.fetch(url) == find_fetched(url) == png()
        assert site.asked == Counter(["/cat.png"])

    @pytest.mark.parametrize(
        ("path", "sentence"),
        [
            ("/gone", "answered 404"),
            ("/page", "cannot be read"),
            ("/large", "too many bytes"),
            ("/away", "answered 302"),
            ("/ftp", "no host of http or https"),
            ("/circle", "answered 302"),
            ("/busy", "answered 503"),
        ],
    )
    def test_what_is_no_image_is_not_kept(self, web, site, path: str, sentence: str) -> None:
        assert sentence in str(problem_of(web, f"http://cats.example:{site.port}{path}"))

    @pytest.mark.parametrize(
        "url",
        [
            *(
                *("http://[::1/", "http://a:99999/x", "http://a:b/x", "http://", "http:///x"),
                "http://..",
            ),
            *(
                *("http://a\0b/", "http://a b/", "http://a/\r\nHost: b", "http://me:pass@a/"),
                "http://\x1b[m/",
            ),
            *(f"http://{'a' * 300}/", "http://\ud800/", "http://xn--/x", "HTTP://[v1.x]/"),
        ],
    )
    def test_a_bad_url_is_never_an_exception(self, web: WebImages, url: str) -> None:
        problem_of(web, url)

    def test_letters_beyond_ascii_are_asked_for_as_browsers_do(self, web, public, site) -> None:
        assert check_url("http://B\xfccher.example/a b%20c?d=\xe9#f") == (
            "http://xn--bcher-kva.example/a%20b%20c?d=%C3%A9",
            "xn--bcher-kva.example",
        )
        web.fetch(f"http://cats.example:{site.port}/chat\xf6.png")
        assert site.asked == Counter(["/chat%C3%B6.png"])

    def test_a_busy_server_is_asked_again(self, web: WebImages, site: Site) -> None:
        assert web.fetch(f"http://cats.example:{site.port}/soon") == png()

    def test_a_host_that_is_not_there_is_asked_once(self, web, public: Names, site) -> None:
        for number in range(3):
            problem_of(web, f"http://none.example/{number}")
        assert public.asked == ["none.example"]
        web.fetch(f"http://cats.example:{site.port}/cat.png")
        web.finish()

    def test_a_server_that_drips_is_cut_off(self, public: Names, monkeypatch) -> None:
        monkeypatch.setattr(web_images, "TOTAL_SECONDS", 0.2)
        ended = threading.Event()

        def drip(listener: socket.socket) -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
                while not ended.wait(0.02):
                    connection.sendall(b"X: y\r\n")

        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=drip, args=[listener], daemon=True).start()
            url = f"http://cats.example:{listener.getsockname()[1]}/cat.png"
            problem_of(WebImages(resolve=public), url)
            ended.set()

    @pytest.mark.parametrize("limit", ["LIMIT_IMAGES", "LIMIT_BYTES"])
    def test_a_command_fetches_no_more_than_so_many(self, web, site, monkeypatch, limit) -> None:
        monkeypatch.setattr(web_images, limit, 1)
        web.fetch(f"http://cats.example:{site.port}/cat.png")
        with pytest.raises(WorkError, match="No more images are fetched"):
            web.fetch(f"http://cats.example:{site.port}/cat.png?2")

    def test_a_command_waits_no_longer_than_so_long(self, web, site, monkeypatch) -> None:
        monkeypatch.setattr(web_images, "LIMIT_WAITING_SECONDS", 0.0)
        with pytest.raises(WorkError, match="No more images are fetched"):
            web.fetch(f"http://cats.example:{site.port}/cat.png")


class TestCommand:
    @pytest.fixture
    def made(self, tmp_path: Path, seeing, monkeypatch) -> Callable[..., object]:
        """Prepares rows with these images and one without, by that resolver."""

        def run(names: Names, *urls: str) -> object:
            monkeypatch.setattr(
                preparing,
                "WebImages",
                lambda private, **_: WebImages(private=private, resolve=names, pauses=(0, 0)),
            )
            rows = [*map(about, urls), chat("Hello?")]
            dataset = DatasetConfig(path=str(write_rows(tmp_path / "rows.jsonl", *rows)))
            return prepare(config_of(dataset), tmp_path, seeing, tmp_path / "store")

        return run

    def test_each_bad_one_costs_its_row(self, made, public: Names, site: Site) -> None:
        here = f"http://cats.example:{site.port}"
        bad = ("http://[::1/", "http://none.example/a", f"{here}/gone", f"{here}/page")
        made = made(public, *bad, "http://127.1/a", f"{here}/cat.png", f"{here}/busy")
        assert made.meta.rows == 3 - 1
        assert made.meta.bad_rows == 6
        assert [problem.line for problem in made.meta.problems] == [1, 2, 3, 4, 5, 7]

    def test_a_host_that_has_come_back_is_found(self, made, public: Names, site: Site) -> None:
        url = f"http://dogs.example:{site.port}/cat.png"
        assert made(public, url).meta.bad_rows == 1
        assert made(public, url).reused
        public.known["dogs.example"] = ("127.0.0.1",)
        assert made(public, url).meta.bad_rows == 0

    @pytest.mark.parametrize(
        ("hosts", "error"), [(2, socket.EAI_NONAME), (30, socket.EAI_NONAME), (2, socket.EAI_AGAIN)]
    )
    def test_a_network_that_is_down_ends_it_and_leaves_no_row_out(
        self, made, tmp_path: Path, site: Site, public: Names, hosts: int, error: int
    ) -> None:
        urls = [f"http://host{number}.example:{site.port}/cat.png" for number in range(hosts)]
        with pytest.raises(NetworkDown, match="Run the command again when the network answers"):
            made(Names(error=error), *urls)
        assert not list((tmp_path / "store").glob("*.partial"))
        public.known |= dict.fromkeys(
            (f"host{number}.example" for number in range(hosts)), ("127.0.0.1",)
        )
        assert made(public, *urls).meta.bad_rows == 0

    def test_dead_hosts_among_images_that_are_here_already(self, made, public, site) -> None:
        """Nobody answers in the second run, because everything else is kept."""
        urls = [f"http://cats.example:{site.port}/cat.png"]
        made(public, *urls)
        dead = [f"http://dead{number}.example/cat.png" for number in range(3)]
        assert made(public, *urls, *dead).meta.bad_rows == 3
