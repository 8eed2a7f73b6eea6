"""The HTTP client for URLs that somebody else chose: names, certificates, keys and messages."""

from __future__ import annotations

import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

import psutil
import pytest

from tests import hostile
from tests.hostile import FullListener, HostileServer, Network, Talk, answer, closed_port, redirect
from worker.errors import Cancelled, ReferenceRefused, ReferenceUnavailable
from worker.storage.addresses import Addresses
from worker.storage.pinned import Answer, PinnedHttp, connect_s

PUBLIC, SECOND, OTHER = "93.184.216.34", "93.184.216.35", "93.184.216.36"
NAMES = {
    "good.example": [PUBLIC],
    "two.example": [PUBLIC, SECOND],
    "wrong.example": [PUBLIC],
    "other.example": [OTHER],
}
NO_TRUST = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
KEYS = {"Authorization": "Bearer s3cr3t", "apikey": "s3cr3t", "Accept": "image/png"}
LATE_S = 5.0  # a limit of 0.3 s, and a machine that does other work too


@pytest.fixture
def server() -> Iterator[HostileServer]:
    with HostileServer() as server:
        yield server


@pytest.fixture
def other() -> Iterator[HostileServer]:
    with HostileServer() as other:
        yield other


@pytest.fixture
def network(server: HostileServer) -> Network:
    return Network({PUBLIC: server.port, SECOND: server.port})


@pytest.fixture(scope="module")
def full() -> Iterator[FullListener]:
    with FullListener() as full:
        yield full


@pytest.fixture
def http(network: Network) -> PinnedHttp:
    return client(network)


def client(network: Network, verify: ssl.SSLContext = NO_TRUST) -> PinnedHttp:
    return PinnedHttp(Addresses(frozenset(), lambda host, port: NAMES[host]), verify, network)


def get(http: PinnedHttp, url: str, timeout_s: float = 10.0) -> Answer:
    return http.get(url, headers=KEYS, max_bytes=1000, total_timeout_s=timeout_s)


def post(http: PinnedHttp, url: str, content: bytes = b"{}", timeout_s: float = 10.0) -> Answer:
    headers = {"Content-Type": "application/json", "X-Signature": "sha256=1"}
    return http.post(url, headers=headers, content=content, total_timeout_s=timeout_s)


# --- what is asked, and where --------------------------------------------------------------------


def test_a_request_has_the_name_in_it_and_goes_to_the_address(
    http: PinnedHttp, server: HostileServer, network: Network
) -> None:
    server.replies["/a"] = answer(200, b"body", X_One="1")

    got = get(http, "http://good.example:8080/a?b=%20c#d")

    assert got == Answer(200, got.headers, b"body")
    assert (got.headers["x-one"], got.headers["content-length"]) == ("1", "4")
    assert network.dialled == [PUBLIC]
    assert server.asked() == ["/a?b=%20c"]
    assert server.seen[0].headers == {
        "host": "good.example:8080",
        "accept-encoding": "identity",
        "connection": "close",
        "user-agent": "verbatim",
        "authorization": "Bearer s3cr3t",
        "apikey": "s3cr3t",
        "accept": "image/png",
    }


def test_a_caller_cannot_change_what_keeps_a_request_safe(
    http: PinnedHttp, server: HostileServer
) -> None:
    headers = {"HOST": "127.0.0.1", "accept-encoding": "gzip", "Connection": "keep-alive"}
    headers |= {"Content-Length": "1", "Transfer-Encoding": "chunked", "User-Agent": "mine"}
    server.replies["/"] = answer(200)

    http.post("http://good.example/", headers=headers, content=b"four", total_timeout_s=10.0)

    assert server.seen[0].body == b"four"
    assert server.seen[0].headers == {
        "host": "good.example",
        "accept-encoding": "identity",
        "connection": "close",
        "content-length": "4",
        "user-agent": "mine",
    }


def test_every_request_has_a_connection_of_its_own(http: PinnedHttp, server: HostileServer) -> None:
    server.replies["/"] = answer(200)

    for _ in range(3):
        get(http, "http://good.example/")

    assert server.connections == 3


def test_no_proxy_of_the_environment_is_used(
    http: PinnedHttp, server: HostileServer, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")
    server.replies["/"] = answer(200)

    assert get(http, "http://good.example/").status == 200
    assert network.dialled == [PUBLIC]


def test_a_header_that_cannot_be_sent_is_refused_without_its_value(http: PinnedHttp) -> None:
    with pytest.raises(ReferenceRefused) as caught:
        http.post(
            "http://good.example/", headers={"X": "s3\ncr3t"}, content=b"", total_timeout_s=10.0
        )

    assert "cr3t" not in str(caught.value)
    assert caught.value.__suppress_context__


# --- more than one address -----------------------------------------------------------------------


def test_the_second_address_is_tried_when_the_first_refuses(
    http: PinnedHttp, server: HostileServer, network: Network
) -> None:
    network.routes[PUBLIC] = closed_port()
    server.replies["/"] = answer(200, b"here")

    assert get(http, "http://two.example/").body == b"here"
    assert network.dialled == [PUBLIC, SECOND]


def test_an_address_where_nobody_answers_leaves_time_for_the_next(
    http: PinnedHttp, server: HostileServer, network: Network, full: FullListener
) -> None:
    network.routes[PUBLIC] = full.port
    server.replies["/"] = answer(200, b"here")

    assert get(http, "http://two.example/", timeout_s=0.6).body == b"here"

    assert network.dialled == [PUBLIC, SECOND]


@pytest.mark.parametrize(
    ("left_s", "behind", "seconds"),
    [(2.0, 1, 1.0), (3.0, 2, 1.0), (60.0, 1, 5.0), (60.0, 3, 5.0), (60.0, 0, 60.0), (0.0, 2, 0.0)],
)
def test_an_address_is_tried_for_its_share_of_the_time_and_the_last_for_all_of_it(
    left_s: float, behind: int, seconds: float
) -> None:
    assert connect_s(left_s, behind) == seconds


def test_when_no_address_accepts_the_host_is_unavailable(
    http: PinnedHttp, network: Network
) -> None:
    network.routes.clear()

    with pytest.raises(ReferenceUnavailable, match=r"two\.example"):
        get(http, "http://two.example/")

    assert network.dialled == [PUBLIC, SECOND]


def test_a_request_that_was_sent_is_not_sent_to_the_next_address(
    http: PinnedHttp, server: HostileServer, network: Network
) -> None:
    server.replies["/hook"] = hostile.raw(b"")

    with pytest.raises(ReferenceUnavailable, match="broke off"):
        post(http, "http://two.example/hook")

    assert network.dialled == [PUBLIC]
    assert len(server.seen) == 1


# --- keys and redirects --------------------------------------------------------------------------


def test_keys_stay_with_a_redirect_on_the_same_origin(
    http: PinnedHttp, server: HostileServer
) -> None:
    server.replies["/a"] = redirect("/b")
    server.replies["/b"] = redirect("http://GOOD.example:80/c")
    server.replies["/c"] = answer(200)

    get(http, "http://good.example/a")

    assert server.asked() == ["/a", "/b", "/c"]
    assert [one.headers["apikey"] for one in server.seen] == ["s3cr3t"] * 3


@pytest.mark.parametrize("port", ["", ":81"])
def test_keys_never_go_to_another_origin_nor_back_from_there(
    port: str, http: PinnedHttp, server: HostileServer, other: HostileServer, network: Network
) -> None:
    host = "good.example" if port else "other.example"
    network.routes[OTHER] = other.port
    seen_there = server if port else other
    server.replies["/a"] = redirect(f"http://{host}{port}/b")
    seen_there.replies["/b"] = redirect("http://good.example/c")
    server.replies["/c"] = answer(200, b"end")

    assert get(http, "http://good.example/a").body == b"end"

    first, *later = server.seen + other.seen
    assert first.headers["apikey"] == "s3cr3t"
    assert len(later) == 2
    for one in later:
        assert "s3cr3t" not in str(one)
        assert one.headers["accept"] == "image/png"


# --- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 204, 301, 302, 307, 400, 409, 500, 503])
def test_a_post_tells_any_status_and_follows_nothing(
    status: int, http: PinnedHttp, server: HostileServer
) -> None:
    server.replies["/hook"] = answer(status, Location="http://good.example/other")

    got = post(http, "http://good.example/hook", b'{"a":1}')

    assert (got.status, got.is_whole) == (status, True)
    assert server.asked() == ["/hook"]
    assert (server.seen[0].method, server.seen[0].body) == ("POST", b'{"a":1}')
    assert server.seen[0].headers["x-signature"] == "sha256=1"


def test_a_post_to_a_private_address_is_refused_and_not_sent(
    http: PinnedHttp, server: HostileServer, network: Network
) -> None:
    with pytest.raises(ReferenceRefused, match="not a public one"):
        post(http, f"http://127.0.0.1:{server.port}/hook")

    assert network.dialled == []


def test_of_a_posts_answer_64_kib_are_read(http: PinnedHttp, server: HostileServer) -> None:
    server.replies["/exact"] = answer(200, b"y" * (64 << 10))
    server.replies["/hook"] = hostile.flooding(hostile.head(200), b"x" * 1000)

    exact, more = (post(http, f"http://good.example/{name}") for name in ("exact", "hook"))

    assert (len(exact.body), exact.is_whole) == (64 << 10, True)
    assert (more.body, more.is_whole) == (b"x" * (64 << 10), False)


@pytest.mark.parametrize(
    "reply",
    [
        answer(200, b"part", Content_Length="5"),
        hostile.then_silence(hostile.head(200, Content_Length="5") + b"part"),
        hostile.dripping(hostile.head(200, Content_Length="9999") + b"part", b"."),
    ],
    ids=["cut", "silent", "slow"],
)
def test_a_message_whose_status_came_is_delivered_whatever_becomes_of_the_body(
    reply: hostile.Reply, http: PinnedHttp, server: HostileServer
) -> None:
    server.replies["/hook"] = reply

    got = post(http, "http://good.example/hook", timeout_s=0.3)

    assert (got.status, got.is_whole) == (200, False)
    assert got.body.startswith(b"part")


def test_a_compressed_answer_to_a_post_is_kept_as_it_is(
    http: PinnedHttp, server: HostileServer
) -> None:
    server.replies["/hook"] = answer(200, b"\x1f\x8b...", Content_Encoding="gzip")

    assert post(http, "http://good.example/hook").body == b"\x1f\x8b..."


def test_a_receiver_that_does_not_read_does_not_hold_a_message_for_ever(
    http: PinnedHttp, server: HostileServer
) -> None:
    server.reads_body = False
    server.replies["/hook"] = hostile.then_silence()
    begun = time.monotonic()

    with pytest.raises(ReferenceUnavailable, match=r"within 0\.3 s"):
        post(http, "http://good.example/hook", b"x" * (32 << 20), timeout_s=0.3)

    assert time.monotonic() - begun < LATE_S


def test_a_receiver_that_reads_slowly_does_not_get_more_time(
    http: PinnedHttp, server: HostileServer
) -> None:
    def sip(talk: Talk) -> None:
        for _ in talk.beats():
            talk.connection.recv(1 << 16)

    server.reads_body = False
    server.replies["/hook"] = sip
    begun = time.monotonic()

    with pytest.raises(ReferenceUnavailable, match=r"within 0\.3 s"):
        post(http, "http://good.example/hook", b"x" * (32 << 20), timeout_s=0.3)

    assert time.monotonic() - begun < LATE_S


# --- certificates --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority of our own, and a certificate of it for good.example alone."""
    if which("openssl") is None:
        pytest.skip("the openssl command is not installed: certificate checks were NOT tested")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    days = ("-days", "2")
    openssl(*new, "-x509", *days, "-subj", "/CN=Test CA", "-keyout", "ca.key", "-out", "ca.pem",
            "-addext", "keyUsage=critical,keyCertSign")  # fmt: skip
    openssl(*new, "-subj", "/CN=good.example", "-keyout", "leaf.key", "-out", "leaf.csr")
    (folder / "names").write_text("subjectAltName=DNS:good.example\n")
    openssl("x509", "-req", "-in", "leaf.csr", "-CA", "ca.pem", "-CAkey", "ca.key", *days,
            "-set_serial", "1", "-extfile", "names", "-out", "leaf.pem")  # fmt: skip
    return folder


@pytest.fixture
def trust(certificates: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificates / "ca.pem"))


@pytest.fixture
def asked_names() -> list[str]:
    return []


@pytest.fixture
def secure(certificates: Path, asked_names: list[str]) -> Iterator[HostileServer]:
    def note(_socket: object, name: str | None, _context: ssl.SSLContext) -> None:
        asked_names.append(str(name))

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificates / "leaf.pem", certificates / "leaf.key")
    tls.sni_callback = note
    with HostileServer(tls=tls, replies={"/": answer(200, b"secret")}) as secure:
        yield secure


def test_the_certificate_of_the_name_is_taken_through_the_pinned_address(
    secure: HostileServer, trust: ssl.SSLContext, asked_names: list[str]
) -> None:
    network = Network({PUBLIC: secure.port})

    got = get(client(network, trust), "https://good.example/")

    assert got.body == b"secret"
    assert network.dialled == [PUBLIC]
    assert asked_names == ["good.example"]
    assert secure.seen[0].headers["host"] == "good.example"


def test_a_certificate_of_another_name_is_refused_before_anything_is_said(
    secure: HostileServer, trust: ssl.SSLContext, asked_names: list[str]
) -> None:
    http = client(Network({PUBLIC: secure.port}), trust)

    with pytest.raises(ReferenceRefused, match=r"certificate of wrong\.example is not valid"):
        get(http, "https://wrong.example/")
    with pytest.raises(ReferenceRefused, match=rf"certificate of {PUBLIC}"):
        get(http, f"https://{PUBLIC}/")

    assert asked_names[0] == "wrong.example"
    assert secure.seen == []


def test_a_certificate_of_an_unknown_authority_is_refused(secure: HostileServer) -> None:
    http = PinnedHttp(
        Addresses(frozenset(), lambda host, port: NAMES[host]),
        dial=Network({PUBLIC: secure.port}),
    )

    with pytest.raises(ReferenceRefused, match=r"certificate of good\.example"):
        get(http, "https://good.example/")

    assert secure.seen == []


def test_a_server_without_tls_behind_https_is_unavailable(
    server: HostileServer, network: Network, trust: ssl.SSLContext
) -> None:
    with pytest.raises(ReferenceUnavailable, match=r"good\.example"):
        get(client(network, trust), "https://good.example/", timeout_s=0.5)

    assert server.seen == []


def test_a_handshake_that_never_ends_has_the_same_time_limit(trust: ssl.SSLContext) -> None:
    with hostile.Canary() as silent:
        begun = time.monotonic()
        with pytest.raises(ReferenceUnavailable, match=r"within 0\.3 s"):
            get(client(Network({PUBLIC: silent.port}), trust), "https://good.example/", 0.3)

    assert time.monotonic() - begun < LATE_S


def test_a_redirect_from_https_to_http_is_refused(
    secure: HostileServer, other: HostileServer, trust: ssl.SSLContext
) -> None:
    secure.replies["/"] = redirect("http://other.example/")
    network = Network({PUBLIC: secure.port, OTHER: other.port})

    with pytest.raises(ReferenceRefused, match="from https to http"):
        get(client(network, trust), "https://good.example/")

    assert network.dialled == [PUBLIC]
    assert other.seen == []


def test_a_redirect_from_http_to_https_is_followed(
    server: HostileServer, secure: HostileServer, trust: ssl.SSLContext
) -> None:
    server.replies["/"] = redirect("https://good.example/")
    network = Network({OTHER: server.port, PUBLIC: secure.port})

    got = get(client(network, trust), "http://other.example/")

    assert got.body == b"secret"
    assert network.dialled == [OTHER, PUBLIC]


# --- what nobody wants any more ------------------------------------------------------------------

LONG_S = 600.0  # a limit that no test waits for


def abandoned(http: PinnedHttp, url: str, is_stalled: Callable[[], bool]) -> None:
    """Ask for `url`, stop once it is stalled, and check that it ends by that and leaves nothing."""
    stop = threading.Event()

    def ask() -> Answer:
        return http.get(
            url, headers={}, max_bytes=10**9, total_timeout_s=LONG_S, should_stop=stop.is_set
        )

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        ends = time.monotonic() + LATE_S
        while not is_stalled():
            assert not asked.done() and time.monotonic() < ends
            time.sleep(0.005)
        stop.set()
        with pytest.raises(Cancelled):
            asked.result(LATE_S)


def connections_to(port: int) -> int:
    """Sockets of this process whose other end is at `port`, whatever their state."""
    found = psutil.Process().net_connections("tcp")
    return sum(bool(one.raddr) and one.raddr.port == port for one in found)


@pytest.mark.parametrize(
    "reply",
    [
        hostile.then_silence(),
        hostile.then_silence(b"HTTP/1.1 200 OK\r\nX: "),
        hostile.dripping(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        hostile.dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        hostile.then_silence(hostile.head(200, Content_Length="9999") + b"part"),
        hostile.dripping(hostile.head(200, Content_Length="9999"), b"x"),
        hostile.dripping(hostile.head(200, Transfer_Encoding="chunked"), b"1\r\nx\r\n"),
        hostile.flooding(hostile.head(200, Transfer_Encoding="chunked"), b"1\r\nx\r\n" * 1000),
        hostile.dripping(hostile.head(404), b"x"),
    ],
    ids=[
        "no answer",
        "half a head",
        "headers by lines",
        "100 by bytes",
        "half a body",
        "body by bytes",
        "chunks by bytes",
        "an endless body",
        "an error's body",
    ],
)
def test_a_fetch_that_nobody_wants_any_more_ends_whatever_the_server_does(
    reply: hostile.Reply, http: PinnedHttp, server: HostileServer
) -> None:
    server.replies["/slow"] = reply
    server.replies["/"] = redirect("/slow")

    abandoned(http, "http://good.example/", lambda: "/slow" in server.asked())

    assert connections_to(server.port) == 0


def test_a_fetch_that_nobody_wants_any_more_ends_while_it_connects(
    http: PinnedHttp, server: HostileServer, network: Network, full: FullListener
) -> None:
    network.routes[OTHER] = full.port
    server.replies["/"] = redirect("http://other.example/")
    before = connections_to(full.port)

    abandoned(http, "http://good.example/", lambda: connections_to(full.port) > before)

    assert connections_to(full.port) == before
    assert connections_to(server.port) == 0


def test_a_fetch_that_nobody_wants_any_more_tries_no_other_address(
    http: PinnedHttp, server: HostileServer, network: Network, full: FullListener
) -> None:
    network.routes[PUBLIC] = full.port

    abandoned(http, "http://two.example/", lambda: network.dialled == [PUBLIC])

    assert network.dialled == [PUBLIC]
    assert server.connections == 0


def test_a_fetch_that_nobody_wants_any_more_ends_in_the_handshake(trust: ssl.SSLContext) -> None:
    with hostile.Canary() as silent:
        http = client(Network({PUBLIC: silent.port}), trust)

        abandoned(http, "https://good.example/", lambda: connections_to(silent.port) > 0)

        assert connections_to(silent.port) == 0


@pytest.mark.parametrize(
    "reply",
    [
        hostile.then_silence(hostile.head(200, Content_Length="9999") + b"part"),
        hostile.dripping(hostile.head(200, Content_Length="9999"), b"x"),
    ],
    ids=["silent", "slow"],
)
def test_a_fetch_that_nobody_wants_any_more_ends_behind_tls(
    reply: hostile.Reply, secure: HostileServer, trust: ssl.SSLContext
) -> None:
    secure.replies["/"] = reply
    http = client(Network({PUBLIC: secure.port}), trust)

    abandoned(http, "https://good.example/", lambda: secure.asked() == ["/"])

    assert connections_to(secure.port) == 0


def test_a_fetch_that_nobody_wants_any_more_ends_while_a_name_is_looked_up() -> None:
    asked, ends = threading.Event(), threading.Event()

    def hangs(host: str, port: int) -> list[str]:
        asked.set()
        ends.wait(4 * LATE_S)
        return [PUBLIC]

    network = Network()
    http = PinnedHttp(Addresses(frozenset(), hangs), NO_TRUST, network)

    abandoned(http, "http://good.example/", asked.is_set)

    ends.set()
    assert network.dialled == []


def test_a_fetch_that_nobody_wants_does_not_begin(http: PinnedHttp, network: Network) -> None:
    with pytest.raises(Cancelled):
        http.get(
            "http://good.example/",
            headers={},
            max_bytes=1,
            total_timeout_s=LONG_S,
            should_stop=lambda: True,
        )

    assert network.dialled == []
