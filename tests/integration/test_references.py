"""Pictures that a job names: which are refused, what never leaves this machine, what comes through.

The servers and the addresses are tests/hostile.py's, the references tests/hostile_urls.py's.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import socket
import ssl
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests import hostile
from tests.hostile import Canary, HostileServer, Network, answer, closed_port, redirect
from tests.hostile_urls import NAMES, PUBLIC, RELATIVE, URLS
from worker.errors import (
    Cancelled,
    ConfigError,
    ReferenceRefused,
    ReferenceTooLarge,
    ReferenceUnavailable,
    WorkerError,
    has_trap_word,
)
from worker.protocol.messages import Reference
from worker.storage.addresses import Addresses
from worker.storage.pinned import PinnedHttp
from worker.storage.references import PictureLimits, SupabaseObjects, check_picture, fetch_picture

QUICK = PictureLimits(max_bytes=64 << 10, max_pixels=100_000, total_timeout_s=0.3)
PATIENT = PictureLimits(max_bytes=64 << 10, max_pixels=100_000, total_timeout_s=10.0)
LATE_S = 5.0  # a limit of 0.3 s, and a machine that does other work too
# Nothing here trusts anybody; reading certifi's file for every client would take most of the time.
NO_TRUST = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def resolve(host: str, port: int) -> list[str]:
    return NAMES[host]


def drawn(kind: str, size: tuple[int, int] = (40, 30), mode: str = "RGB", **how: object) -> bytes:
    values = random.Random(7).randbytes(size[0] * size[1] * len(mode))
    file = io.BytesIO()
    Image.frombytes(mode, size, values).save(file, kind, **how)
    return file.getvalue()


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green")]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A PNG that is small, and says in its head that it is large."""
    size = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", size), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


PNG, JPEG, WEBP = drawn("PNG"), drawn("JPEG"), drawn("WEBP")


@pytest.fixture(scope="module")
def server() -> Iterator[HostileServer]:
    with HostileServer() as server:
        yield server


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    with Canary() as canary:
        yield canary


@pytest.fixture
def network(server: HostileServer) -> Network:
    """good.example is the server; what else is public is not there."""
    server.seen.clear()
    return Network({PUBLIC: server.port})


Fetch = Callable[..., Reference]


@pytest.fixture
def fetch(network: Network, server: HostileServer, tmp_path: Path) -> Fetch:
    http = PinnedHttp(Addresses(frozenset({server.origin}), resolve), NO_TRUST, network)

    def fetch(source: str, limits: PictureLimits = PATIENT) -> Reference:
        try:
            return fetch_picture(source, "image", tmp_path / "pictures", http, limits, None)
        except WorkerError:
            assert not (tmp_path / "pictures").exists()
            raise

    return fetch


# --- nothing that is refused is reached ----------------------------------------------------------


def test_there_are_hundreds_of_hostile_references_and_each_is_there_once() -> None:
    assert len(URLS) == len(set(URLS)) >= 200
    assert len(REDIRECTS) >= 200


def test_the_canary_hears_an_ordinary_client(canary: Canary) -> None:
    """So that its silence below means something."""
    hosts = ["127.0.0.1", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "localhost", "0.0.0.0"]

    for host in hosts:
        socket.create_connection((host, canary.port), 5).close()

    assert canary.calls() == len(hosts)
    assert canary.calls() == 0


@pytest.mark.parametrize("url", URLS)
def test_a_hostile_reference_is_refused_and_nobody_is_called(
    url: str, fetch: Fetch, network: Network, canary: Canary
) -> None:
    with pytest.raises(ReferenceRefused) as caught:
        fetch(url.replace("@@", str(canary.port)))

    assert network.dialled == []
    assert canary.calls() == 0
    assert not has_trap_word(str(caught.value))


REDIRECTS = [
    url
    for url in URLS
    if url not in RELATIVE and not set(url) & set("\r\n\0")  # which would end the header
]


@pytest.mark.parametrize("url", REDIRECTS)
def test_a_redirect_to_a_hostile_reference_is_refused_and_only_the_redirector_is_called(
    url: str, fetch: Fetch, network: Network, server: HostileServer, canary: Canary
) -> None:
    server.replies["/trusted.png"] = redirect(url.replace("@@", str(canary.port)))

    with pytest.raises(ReferenceRefused) as caught:
        fetch(f"{server.origin}/trusted.png")

    assert network.dialled == ["127.0.0.1"]
    assert server.asked() == ["/trusted.png"]
    assert canary.calls() == 0
    assert not has_trap_word(str(caught.value))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_every_kind_of_redirect_is_checked(
    status: int, fetch: Fetch, server: HostileServer, canary: Canary
) -> None:
    server.replies["/x"] = redirect(f"http://localhost:{canary.port}/", status)

    with pytest.raises(ReferenceRefused, match="not a public one"):
        fetch("http://good.example/x")

    assert canary.calls() == 0


def test_a_name_that_leads_elsewhere_after_the_check_is_still_connected_to_where_it_led(
    server: HostileServer, network: Network, canary: Canary, tmp_path: Path
) -> None:
    answers = [[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]]
    asked: list[str] = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return answers.pop(0)

    http = PinnedHttp(Addresses(frozenset(), rebinding), NO_TRUST, network)
    server.replies["/x.png"] = answer(200, PNG)

    fetch_picture(
        f"http://rebind.example:{canary.port}/x.png", "image", tmp_path, http, PATIENT, None
    )

    assert asked == ["rebind.example"]
    assert network.dialled == [PUBLIC]
    assert canary.calls() == 0
    assert server.seen[0].headers["host"] == f"rebind.example:{canary.port}"


def test_a_name_that_leads_elsewhere_when_it_redirects_to_itself_is_refused(
    server: HostileServer, network: Network, canary: Canary, tmp_path: Path
) -> None:
    answers = [[PUBLIC], ["127.0.0.1"]]
    addresses = Addresses(frozenset(), lambda host, port: answers.pop(0))
    http = PinnedHttp(addresses, NO_TRUST, network)
    server.replies["/x.png"] = redirect("/y.png")

    with pytest.raises(ReferenceRefused, match="not a public one"):
        fetch_picture(
            f"http://rebind.example:{canary.port}/x.png", "image", tmp_path, http, PATIENT, None
        )

    assert answers == []
    assert network.dialled == [PUBLIC]
    assert canary.calls() == 0


@pytest.mark.parametrize("length", [1, 2, 7])
def test_redirects_in_a_circle_end(length: int, fetch: Fetch, server: HostileServer) -> None:
    for index in range(length):
        server.replies[f"/circle{index}"] = redirect(f"/circle{(index + 1) % length}")

    with pytest.raises(ReferenceRefused, match="more than 5 redirects"):
        fetch("http://good.example/circle0")

    assert len(server.seen) == 6


def test_five_redirects_are_followed(fetch: Fetch, server: HostileServer) -> None:
    for index in range(5):
        server.replies[f"/hop{index}"] = redirect(f"hop{index + 1}")
    server.replies["/hop5"] = answer(200, PNG)

    assert fetch("http://good.example/hop0").sha256 == hashlib.sha256(PNG).hexdigest()


# --- what comes through --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "extension"),
    [
        (PNG, "png"),
        (JPEG, "jpg"),
        (WEBP, "webp"),
        (drawn("PNG", mode="RGBA"), "png"),
        (drawn("PNG", mode="L"), "png"),
        (drawn("JPEG", mode="CMYK"), "jpg"),
        (drawn("JPEG", progressive=True), "jpg"),
        (drawn("WEBP", mode="RGBA", lossless=True), "webp"),
        (PNG + b"a note behind the end", "png"),
        (drawn("PNG", size=(500, 200)), "png"),  # exactly as many pixels as the limit
    ],
)
def test_a_good_picture_is_written_byte_for_byte(
    data: bytes, extension: str, fetch: Fetch, server: HostileServer
) -> None:
    limits = PictureLimits(max_bytes=len(data), max_pixels=100_000, total_timeout_s=10.0)
    server.replies["/any.gif"] = answer(200, data, Content_Type="text/html")

    reference = fetch("http://good.example/any.gif?token=1", limits)

    file = Path(reference.file)
    assert (reference.role, file.name) == ("image", f"image.{extension}")
    assert file.read_bytes() == data
    assert reference.sha256 == hashlib.sha256(data).hexdigest()
    assert [one.name for one in file.parent.iterdir()] == [file.name]


def test_a_photo_with_a_preview_inside_is_a_jpeg(fetch: Fetch, server: HostileServer) -> None:
    """Many phones write these; Pillow calls them MPO and sees two frames."""
    file = io.BytesIO()
    photo = Image.open(io.BytesIO(JPEG))
    photo.save(file, "MPO", save_all=True, append_images=[photo.resize((8, 8))])
    server.replies["/photo.jpg"] = answer(200, file.getvalue())

    assert fetch("http://good.example/photo.jpg").file.endswith("image.jpg")


def test_a_picture_in_pieces_of_unknown_length_is_put_together(
    fetch: Fetch, server: HostileServer
) -> None:
    pieces = b"".join(b"1;note=x\r\n" + PNG[i : i + 1] + b"\r\n" for i in range(len(PNG)))
    start = hostile.head(200, Transfer_Encoding="chunked")
    server.replies["/x.png"] = hostile.raw(start + pieces + b"0\r\n\r\n")

    assert fetch("http://good.example/x.png").sha256 == hashlib.sha256(PNG).hexdigest()


def test_a_picture_whose_length_is_where_the_connection_ends_comes_through(
    fetch: Fetch, server: HostileServer
) -> None:
    server.replies["/x.png"] = hostile.raw(b"HTTP/1.0 200 OK\r\n\r\n" + PNG)

    assert fetch("http://good.example/x.png").sha256 == hashlib.sha256(PNG).hexdigest()


def test_the_operators_own_origin_may_be_private(fetch: Fetch, server: HostileServer) -> None:
    server.replies["/signed/x.png"] = answer(200, PNG)

    assert fetch(f"{server.origin}/signed/x.png?token=1").role == "image"


# --- what is too much ----------------------------------------------------------------------------


def test_an_announced_length_over_the_limit_is_refused_before_the_body(
    fetch: Fetch, server: HostileServer
) -> None:
    start = hostile.head(200, Content_Length=str(QUICK.max_bytes + 1))
    server.replies["/x.png"] = hostile.then_silence(start)

    with pytest.raises(ReferenceTooLarge, match="announces 65537 bytes; at most 65536"):
        fetch("http://good.example/x.png")


@pytest.mark.parametrize(
    ("start", "block"),
    [
        (hostile.head(200), b"x" * 65536),
        (hostile.head(200, Transfer_Encoding="chunked"), b"8000\r\n" + b"x" * 0x8000 + b"\r\n"),
        (hostile.head(200, Transfer_Encoding="chunked"), b"10\r\n" + b"x" * 16 + b"\r\n"),
    ],
    ids=["until closed", "chunked", "small chunks"],
)
def test_an_endless_body_is_refused_at_the_limit(
    start: bytes, block: bytes, fetch: Fetch, server: HostileServer
) -> None:
    server.replies["/x.png"] = hostile.flooding(start, block)

    with pytest.raises(ReferenceTooLarge, match="more than 65536 bytes"):
        fetch("http://good.example/x.png")


def test_one_byte_over_the_limit_is_too_many(fetch: Fetch, server: HostileServer) -> None:
    server.replies["/x.png"] = hostile.raw(hostile.head(200) + PNG)

    with pytest.raises(ReferenceTooLarge, match=f"more than {len(PNG) - 1} bytes"):
        fetch("http://good.example/x.png", PictureLimits(len(PNG) - 1, 100_000, 10.0))


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "br", "zstd", "identity, gzip"])
def test_a_compressed_answer_is_refused_not_unpacked(
    encoding: str, fetch: Fetch, server: HostileServer
) -> None:
    bomb = gzip.compress(b"\0" * (8 << 20))
    assert len(bomb) < QUICK.max_bytes
    server.replies["/x.png"] = answer(200, bomb, Content_Encoding=encoding)

    with pytest.raises(ReferenceRefused, match="compresses its answer"):
        fetch("http://good.example/x.png")

    assert server.seen[0].headers["accept-encoding"] == "identity"


def test_compression_that_is_not_announced_is_no_picture(
    fetch: Fetch, server: HostileServer
) -> None:
    server.replies["/x.png"] = answer(200, gzip.compress(PNG))

    with pytest.raises(ReferenceRefused, match="not a PNG, JPEG or WebP"):
        fetch("http://good.example/x.png")


@pytest.mark.parametrize(
    ("width", "height"),
    [(60000, 60000), (2**31 - 1, 2**31 - 1), (100_001, 1), (9000, 10000), (14000, 14000)],
)
def test_a_head_that_claims_many_pixels_is_refused_with_the_numbers(
    width: int, height: int, fetch: Fetch, server: HostileServer
) -> None:
    server.replies["/x.png"] = answer(200, claiming(width, height))

    with pytest.raises(ReferenceTooLarge, match=f"{width} x {height} = {width * height} pixels"):
        fetch("http://good.example/x.png")


@pytest.mark.parametrize("side", [1000, 16000])
def test_a_webp_that_claims_many_pixels_is_too_large(
    side: int, fetch: Fetch, server: HostileServer
) -> None:
    data = bytearray(drawn("WEBP", mode="RGBA"))
    assert data[12:16] == b"VP8X"
    data[24:30] = (side - 1).to_bytes(3, "little") * 2
    server.replies["/x.webp"] = answer(200, bytes(data))

    with pytest.raises((ReferenceTooLarge, ReferenceRefused)):
        fetch("http://good.example/x.webp")


def test_a_large_webp_is_refused_with_the_numbers() -> None:
    with pytest.raises(ReferenceTooLarge, match="40 x 30 = 1200 pixels; at most 1199"):
        check_picture(WEBP, 1199)


# --- what is no picture --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a",
        b"<html><body>not found</body></html>",
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
        b"%PDF-1.7\n",
        b"#!/bin/sh\n",
        animation("GIF"),
        drawn("GIF", mode="L"),
        drawn("BMP"),
        drawn("TIFF"),
        drawn("ICO"),
        b"RIFF\x24\0\0\0WAVEfmt ",
        b" " + PNG,
        b"\0\0\0\x1cftypavif",
    ],
)
def test_the_content_decides_not_the_name_or_the_header(
    data: bytes, fetch: Fetch, server: HostileServer
) -> None:
    server.replies["/x.png"] = answer(200, data, Content_Type="image/png")

    with pytest.raises(ReferenceRefused, match="not a PNG, JPEG or WebP"):
        fetch("http://good.example/x.png")


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_an_animation_is_refused_with_the_reason(
    kind: str, fetch: Fetch, server: HostileServer
) -> None:
    server.replies["/x.png"] = answer(200, animation(kind))

    with pytest.raises(ReferenceRefused, match="animated: it has 2 frames"):
        fetch("http://good.example/x.png")


@pytest.mark.parametrize("data", [PNG, JPEG, WEBP], ids=["png", "jpg", "webp"])
def test_a_picture_cut_off_anywhere_is_refused(data: bytes) -> None:
    for length in range(0, len(data), 7):
        with pytest.raises(ReferenceRefused):
            check_picture(data[:length], 100_000)
    for length in range(len(data) - 20, len(data)):
        with pytest.raises(ReferenceRefused, match="cut off"):
            check_picture(data[:length], 100_000)


@pytest.mark.parametrize(
    "data",
    [PNG, JPEG, WEBP, animation("PNG"), animation("WEBP")],
    ids=["png", "jpg", "webp", "apng", "webp animation"],
)
def test_damage_anywhere_never_ends_in_another_error(data: bytes) -> None:
    chance = random.Random(11)
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            assert check_picture(bytes(damaged), 100_000) in ("png", "jpg", "webp")
        except (ReferenceRefused, ReferenceTooLarge) as exc:
            assert not has_trap_word(str(exc))


def test_every_damaged_byte_of_a_png_is_found() -> None:
    for index in range(0, len(PNG), 11):
        damaged = bytearray(PNG)
        damaged[index] ^= 1
        with pytest.raises((ReferenceRefused, ReferenceTooLarge)):
            check_picture(bytes(damaged), 100_000)


# --- what may get better, and what will not ------------------------------------------------------


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 520])
def test_a_status_that_may_pass_is_worth_another_try(
    status: int, fetch: Fetch, server: HostileServer
) -> None:
    server.replies["/x.png"] = answer(status, PNG)

    with pytest.raises(ReferenceUnavailable, match=rf"^good\.example answers {status}$") as caught:
        fetch("http://good.example/x.png")

    assert caught.value.retry_after_s == 5


@pytest.mark.parametrize("status", [204, 206, 300, 302, 304, 400, 401, 403, 404, 410, 451])
def test_a_status_that_will_not_change_is_refused(
    status: int, fetch: Fetch, server: HostileServer
) -> None:
    body = b"" if status in (204, 304) else PNG
    server.replies["/x.png"] = answer(status, body)

    with pytest.raises(ReferenceRefused, match=rf"good\.example answers {status}") as caught:
        fetch("http://good.example/x.png")

    assert caught.value.retry_after_s is None


def test_the_answer_of_an_error_may_be_endless_and_is_not_waited_for(
    fetch: Fetch, server: HostileServer
) -> None:
    server.replies["/x.png"] = hostile.flooding(hostile.head(404), b"x" * 65536)

    with pytest.raises(ReferenceRefused, match="answers 404"):
        fetch("http://good.example/x.png")


def test_a_place_where_nobody_listens_is_unavailable(fetch: Fetch, network: Network) -> None:
    network.routes[PUBLIC] = closed_port()

    with pytest.raises(ReferenceUnavailable, match=r"good\.example cannot be reached") as caught:
        fetch("http://good.example/x.png")

    assert caught.value.retry_after_s == 5


@pytest.mark.parametrize(
    "reply",
    [
        hostile.raw(b""),
        hostile.raw(b"\x16\x03\x01\x02\x00"),
        hostile.raw(b"220 mail.example ESMTP\r\n"),
        hostile.raw(b"HTTP/1.1 200 OK\r\nContent-Le"),
        hostile.raw(hostile.head(200, Content_Length="-5")),
        hostile.raw(hostile.head(200, Content_Length="5, 6") + b"x" * 6),
        hostile.raw(hostile.head(200, Transfer_Encoding="gzip") + b"x"),
        hostile.raw(hostile.head(200, Transfer_Encoding="chunked") + b"zz\r\n"),
        hostile.raw(hostile.head(200, Transfer_Encoding="chunked") + b"-1\r\n"),
        hostile.flooding(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 4096),
        hostile.flooding(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000),
        answer(200, PNG, Content_Length=str(len(PNG) + 1)),
    ],
    ids=[
        "nothing",
        "another protocol",
        "mail",
        "half a head",
        "negative length",
        "two lengths",
        "unknown coding",
        "bad chunk",
        "negative chunk",
        "endless header",
        "endless headers",
        "longer length than body",
    ],
)
def test_what_is_not_a_whole_answer_of_http_is_unavailable(
    reply: hostile.Reply, fetch: Fetch, server: HostileServer
) -> None:
    server.replies["/x.png"] = reply

    with pytest.raises(ReferenceUnavailable, match=r"good\.example"):
        fetch("http://good.example/x.png")


def test_a_shorter_length_than_the_picture_gives_a_cut_off_picture(
    fetch: Fetch, server: HostileServer
) -> None:
    server.replies["/x.png"] = answer(200, PNG, Content_Length=str(len(PNG) - 1))

    with pytest.raises(ReferenceRefused, match="cut off"):
        fetch("http://good.example/x.png")


@pytest.mark.parametrize(
    "reply",
    [
        hostile.then_silence(),
        hostile.then_silence(b"HTTP/1.1 200 OK\r\n"),
        hostile.then_silence(hostile.head(200, Content_Length="9999")),
        hostile.dripping(b"", b"HTTP/1.1 200 OK\r\n"),
        hostile.dripping(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        hostile.dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        hostile.flooding(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100),
        hostile.dripping(hostile.head(200, Content_Length="9999") + PNG[:100], b"x"),
        hostile.dripping(hostile.head(200, Transfer_Encoding="chunked"), b"1\r\nx\r\n"),
        hostile.dripping(hostile.head(200, Transfer_Encoding="chunked") + b"1;", b"y"),
    ],
    ids=[
        "no answer",
        "half a head",
        "no body",
        "status line by bytes",
        "headers by bytes",
        "100 by bytes",
        "endless 103",
        "body by bytes",
        "chunks by bytes",
        "a chunk's note by bytes",
    ],
)
def test_a_slow_server_does_not_get_more_time_by_sending_a_little(
    reply: hostile.Reply, fetch: Fetch, server: HostileServer
) -> None:
    server.replies["/x.png"] = reply
    begun = time.monotonic()

    with pytest.raises(ReferenceUnavailable, match=r"within 0\.3 s") as caught:
        fetch("http://good.example/x.png", QUICK)

    assert time.monotonic() - begun < LATE_S
    assert caught.value.retry_after_s == 5


def test_redirects_share_one_time_limit(fetch: Fetch, server: HostileServer) -> None:
    def slow(talk: hostile.Talk) -> None:
        talk.stopped.wait(0.2)
        redirect("/slow")(talk)

    server.replies["/slow"] = slow
    begun = time.monotonic()

    with pytest.raises(ReferenceUnavailable, match=r"within 0\.3 s"):
        fetch("http://good.example/slow", QUICK)

    assert time.monotonic() - begun < LATE_S
    assert len(server.seen) == 2


def test_a_picture_that_nobody_wants_any_more_is_not_waited_for(
    network: Network, server: HostileServer, tmp_path: Path
) -> None:
    http = PinnedHttp(Addresses(frozenset({server.origin}), resolve), NO_TRUST, network)
    objects = SupabaseObjects(server.origin, KEY, http)
    limits = PictureLimits(total_timeout_s=600.0)
    silent = hostile.then_silence(hostile.head(200, Content_Length="9999"))
    server.replies["/x.png"] = silent
    server.replies["/storage/v1/object/user-library/u/x.png"] = silent

    for number, source in enumerate(("http://good.example/x.png", "user-library/u/x.png"), 1):
        with pytest.raises(Cancelled):
            fetch_picture(
                source, "image", tmp_path, http, limits, objects,
                lambda number=number: len(server.seen) == number,
            )  # fmt: skip

    assert list(tmp_path.iterdir()) == []


def test_no_error_has_the_url_in_it(fetch: Fetch, server: HostileServer) -> None:
    hosts = ("127.0.0.1", "user:s3cr3t@good.example", "good.example", "s 3", "good.example:0")
    server.replies["/s3cr3t"] = redirect("http://s3cr3t:s3cr3t@s3cr3t.example/s3cr3t")

    for host in hosts:
        with pytest.raises(WorkerError) as caught:
            fetch(f"http://{host}/s3cr3t?token=s3cr3t#s3cr3t")
        assert "s3cr3t" not in str(caught.value)


# --- the storage ---------------------------------------------------------------------------------

KEY = "service.s3cr3t"


@pytest.fixture
def objects(network: Network, server: HostileServer) -> SupabaseObjects:
    http = PinnedHttp(Addresses(frozenset({server.origin}), resolve), NO_TRUST, network)
    return SupabaseObjects(f"{server.origin}/", KEY, http)


def from_storage(source: str, objects: SupabaseObjects, folder: Path) -> Reference:
    http = PinnedHttp(Addresses(frozenset(), resolve), NO_TRUST, Network())
    return fetch_picture(source, "first", folder, http, PATIENT, objects)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("user-library/u-1/x.png", "user-library/u-1/x.png"),
        ("workspace-temp/u-1/job/0.png", "workspace-temp/u-1/job/0.png"),
        ("user-library/u 1/ü?#&.png", "user-library/u%201/%C3%BC%3F%23%26.png"),
        ("user-library/u/100%.png", "user-library/u/100%25.png"),
        ("user-library/u/...", "user-library/u/..."),
        ("user-library/u/a:b@c", "user-library/u/a%3Ab%40c"),
    ],
)
def test_a_path_is_read_from_the_storage_with_the_service_key(
    source: str,
    asked: str,
    objects: SupabaseObjects,
    server: HostileServer,
    tmp_path: Path,
) -> None:
    server.replies[f"/storage/v1/object/{asked}"] = answer(200, PNG)

    reference = from_storage(source, objects, tmp_path)

    assert Path(reference.file) == tmp_path / "first.png"
    assert Path(reference.file).read_bytes() == PNG
    assert server.seen[0].headers["authorization"] == f"Bearer {KEY}"
    assert server.seen[0].headers["apikey"] == KEY


@pytest.mark.parametrize(
    "path",
    [
        "user-library",
        "user-library/",
        "/user-library/u/x.png",
        "other-bucket/u/x.png",
        "user-library2/u/x.png",
        "USER-LIBRARY/u/x.png",
        "../user-library/x.png",
        "user-library/../workspace-temp/x.png",
        "user-library/u/../../x.png",
        "user-library/./x.png",
        "user-library/..",
        "user-library//x.png",
        "user-library/http://127.0.0.1",
        "user-library/u/x.png/",
        "user-library/%2e%2e/x.png",
        "user-library/%2E%2E/x.png",
        "user-library/.%2e/x.png",
        "user-library/u%2fx.png",
        "user-library/u%5Cx.png",
        "user-library\\u\\x.png",
        "user-library/..\\x.png",
        "user-library/u/x.png\0",
        "user-library/u/x.png\r\nX: y",
        "user-library/u/\ud800.png",
        "user-library/u/\u202e.png",
        "user-library/" + "a" * 1100,
        "user-library?x=/u/x.png",
        "x.png",
        "/etc/passwd",
        "~/x.png",
    ],
)
def test_a_path_that_leaves_its_bucket_for_some_reader_is_refused(
    path: str, objects: SupabaseObjects, network: Network, tmp_path: Path
) -> None:
    with pytest.raises(ReferenceRefused) as caught:
        from_storage(path, objects, tmp_path)

    assert network.dialled == []
    assert not has_trap_word(str(caught.value))


def test_a_path_without_a_storage_says_what_to_set(fetch: Fetch) -> None:
    with pytest.raises(ReferenceRefused, match="SUPABASE_URL") as caught:
        fetch("user-library/u/x.png")

    assert "SUPABASE_SERVICE_KEY or SUPABASE_SERVICE_ROLE_KEY" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, ReferenceRefused),
        (403, ReferenceRefused),
        (429, ReferenceUnavailable),
        (503, ReferenceUnavailable),
    ],
)
def test_what_the_storage_refuses_is_told_without_the_key(
    status: int,
    error: type[WorkerError],
    objects: SupabaseObjects,
    server: HostileServer,
    tmp_path: Path,
) -> None:
    server.replies["/storage/v1/object/user-library/u/x.png"] = answer(status, KEY.encode())

    with pytest.raises(error, match=f"answers {status}") as caught:
        from_storage("user-library/u/x.png", objects, tmp_path)

    assert KEY not in str(caught.value)


def test_an_object_over_the_limit_is_too_large(
    objects: SupabaseObjects, server: HostileServer, tmp_path: Path
) -> None:
    server.replies["/storage/v1/object/user-library/u/x.png"] = answer(200, b"x" * 70_000)

    with pytest.raises(ReferenceTooLarge, match="70000 bytes"):
        from_storage("user-library/u/x.png", objects, tmp_path)


def test_the_service_key_is_not_sent_to_where_the_storage_redirects(
    objects: SupabaseObjects, server: HostileServer, network: Network, tmp_path: Path
) -> None:
    server.replies["/storage/v1/object/user-library/u/x.png"] = redirect(
        "http://good.example/elsewhere"
    )
    server.replies["/elsewhere"] = answer(200, PNG)

    from_storage("user-library/u/x.png", objects, tmp_path)

    assert network.dialled == ["127.0.0.1", PUBLIC]
    assert "authorization" not in server.seen[1].headers
    assert KEY not in str(server.seen[1])


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("project.supabase.co", KEY),
        ("ftp://x", KEY),
        ("http://u:p@x", KEY),
        ("https://x", ""),
        ("https://x", "a b"),
        ("https://x", "key\n"),
        ("https://x", "kéy"),
    ],
)
def test_a_storage_that_cannot_be_one_is_an_error_of_the_configuration(url: str, key: str) -> None:
    http = PinnedHttp(Addresses(frozenset(), resolve), NO_TRUST, Network())

    with pytest.raises(ConfigError, match=r"SUPABASE_URL|service key"):
        SupabaseObjects(url, key, http)
