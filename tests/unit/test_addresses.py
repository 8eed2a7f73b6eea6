"""Which URLs may be talked to: how they are read, and which addresses are public ones."""

from __future__ import annotations

import ipaddress
import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.errors import ConfigError, ReferenceRefused, ReferenceUnavailable, has_trap_word
from worker.storage.addresses import Addresses, Target, is_public, parse_url, shown_host

NOBODY: frozenset[str] = frozenset()
PUBLIC = "93.184.216.34"


class Names:
    """A resolver that knows some names and remembers what it was asked."""

    def __init__(self, **known: list[str]):
        self.known = {name.replace("_", "."): addresses for name, addresses in known.items()}
        self.asked: list[tuple[str, int]] = []

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append((host, port))
        if host not in self.known:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return self.known[host]


# --- how a URL is read -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://good.example", Target("http", "good.example", 80, "/")),
        ("https://good.example/", Target("https", "good.example", 443, "/")),
        ("HTTPS://Good.Example:8443/A/b", Target("https", "good.example", 8443, "/A/b")),
        ("http://good.example./x", Target("http", "good.example", 80, "/x")),
        ("http://good.example?q=1#part", Target("http", "good.example", 80, "/?q=1")),
        ("http://good.example/a@b:c//../d;e", Target("http", "good.example", 80, "/a@b:c//../d;e")),
        ("http://good.example/%20%zz", Target("http", "good.example", 80, "/%20%zz")),
        ("http://good.example/ü", Target("http", "good.example", 80, "/%C3%BC")),
        ("http://xn--bcher-kva.example/", Target("http", "xn--bcher-kva.example", 80, "/")),
        ("http://some_service:9000/", Target("http", "some_service", 9000, "/")),
        ("http://8.8.8.8/", Target("http", "8.8.8.8", 80, "/")),
        ("http://8.8.8.8.:81/", Target("http", "8.8.8.8", 81, "/")),
        (
            "http://[2606:4700:0::1111]:81/",
            Target("http", "2606:4700::1111", 81, "/"),
        ),
    ],
)
def test_a_url_is_read_as_every_reader_reads_it(url: str, target: Target) -> None:
    assert parse_url(url) == target


@pytest.mark.parametrize("host", ["x.-bad.example", "bad-.example", "a..b", ".a", "a" * 64, "-"])
def test_a_host_that_is_no_name_is_refused(host: str) -> None:
    with pytest.raises(ReferenceRefused, match="not a name"):
        parse_url(f"http://{host}/")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://u:p@good.example/", "user name or password"),
        ("http://good.example@127.0.0.1/", "user name or password"),
        ("file:///etc/passwd", "only http and https"),
        ("good.example/x", "only http and https"),
        ("http://", "no host"),
        ("http:good.example", "no host"),
        ("http://good.example:0/", "1 to 65535"),
        ("http://good.example:x/", "not like host:443"),
        ("http://good.example /", "a space"),
        ("http://bücher.example/", "xn--"),
        ("http://127.1/", "four decimal numbers"),
        ("http://[::g]/", "not like host:443"),
        ("http://[1:2:3]/", "not an IPv6 address"),
    ],
)
def test_a_refusal_says_what_is_wrong(url: str, reason: str) -> None:
    with pytest.raises(ReferenceRefused, match=reason):
        parse_url(url)


def test_a_url_may_be_long_but_not_endless() -> None:
    assert parse_url("http://good.example/" + "a" * 8000).host == "good.example"

    with pytest.raises(ReferenceRefused, match="at most 8192"):
        parse_url("http://good.example/" + "a" * 9000)


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_text_is_read_or_refused(text: str) -> None:
    for url in (text, f"http://{text}", f"http://good.example:{text}", f"http://[{text}]/"):
        try:
            target = parse_url(url)
        except ReferenceRefused:
            continue
        assert target.url.isascii()
        assert parse_url(target.url) == target


def test_an_origin_always_has_its_port_and_a_host_header_only_another_one() -> None:
    usual, other = parse_url("https://a.example/"), parse_url("http://[2606:4700::1]:443/")

    assert (usual.origin, usual.host_header) == ("https://a.example:443", "a.example")
    assert (other.origin, other.host_header) == (
        "http://[2606:4700::1]:443",
        "[2606:4700::1]:443",
    )


def test_what_a_target_looks_like_in_a_log_has_no_secret() -> None:
    assert "s3cr3t" not in repr(parse_url("http://good.example/x?token=s3cr3t"))


# --- which addresses are public ----------------------------------------------------------------


@given(st.ip_addresses())
@settings(max_examples=2000, deadline=None, derandomize=True)
def test_no_address_is_public_that_python_does_not_think_global(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    if is_public(str(address)):
        assert address.is_global
        assert not address.is_multicast
        assert not address.is_reserved or address in ipaddress.ip_network("64:ff9b::/96")


@given(st.ip_addresses(v=4))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_an_address_behind_nat64_is_as_public_as_the_one_it_carries(
    address: ipaddress.IPv4Address,
) -> None:
    carried = ipaddress.IPv6Address(int(ipaddress.IPv6Address("64:ff9b::")) + int(address))

    assert is_public(str(carried)) == is_public(str(address))


@given(st.ip_addresses(v=4))
@settings(max_examples=500, deadline=None, derandomize=True)
def test_no_other_address_that_carries_an_ipv4_address_is_public(
    address: ipaddress.IPv4Address,
) -> None:
    number = int(address)
    carriers = [
        ipaddress.IPv6Address(number),  # v4-compatible
        ipaddress.IPv6Address((0xFFFF << 32) + number),  # v4-mapped
        ipaddress.IPv6Address((0xFFFF << 48) + number),  # v4-translated
        ipaddress.IPv6Address((0x2002 << 112) + (number << 80) + 1),  # 6to4
        ipaddress.IPv6Address((0x20010000 << 96) + (number ^ 0xFFFFFFFF)),  # Teredo
        ipaddress.IPv6Address((0x64FF9B0001 << 80) + number),  # NAT64 of one network
    ]

    assert [str(one) for one in carriers if is_public(str(one))] == []


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1",
        "8.8.8.8",
        "93.184.216.34",
        "100.63.255.255",
        "100.128.0.0",
        "168.63.129.15",
        "172.15.255.255",
        "172.32.0.0",
        "198.17.255.255",
        "198.20.0.0",
        "223.255.255.255",
        "2001:200::1",
        "2606:4700:4700::1111",
        "2a00:1450:4001::200e",
        "3ffe::1",
    ],
)
def test_an_address_beside_the_special_ones_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("text", ["", "x", "1.2.3", "2606:4700::1%eth0", "127.0.0.1 ", "[::1]"])
def test_what_is_no_address_is_not_a_public_one(text: str) -> None:
    assert not is_public(text)


# --- decisions ---------------------------------------------------------------------------------


def test_a_name_is_looked_up_once_and_all_its_addresses_are_kept_in_order() -> None:
    names = Names(good_example=[PUBLIC, "2606:4700::1", "1.1.1.1"])

    target = Addresses(NOBODY, names).check("https://GOOD.example/x?y")

    assert target.addresses == (PUBLIC, "2606:4700::1", "1.1.1.1")
    assert (target.host, target.path_and_query) == ("good.example", "/x?y")
    assert names.asked == [("good.example", 443)]


def test_an_address_in_a_url_is_not_looked_up() -> None:
    names = Names()

    target = Addresses(NOBODY, names).check("http://8.8.8.8/")

    assert target.addresses == ("8.8.8.8",)
    assert names.asked == []


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("bad", ["127.0.0.1", "10.1.2.3", "::1", "fe80::1%eth0", "nonsense"])
def test_one_bad_address_among_good_ones_refuses_the_name(bad: str, position: int) -> None:
    addresses = [PUBLIC, "1.1.1.1"]
    addresses.insert(position, bad)
    checked = Addresses(NOBODY, Names(mixed_example=addresses))

    with pytest.raises(ReferenceRefused, match=r"mixed\.example has an address"):
        checked.check("http://mixed.example/")


@pytest.mark.parametrize(
    "allowed",
    ["http://storage:8000", "HTTP://Storage:8000/", "http://storage.:8000/storage/v1?x#y"],
)
def test_an_allowed_origin_may_have_a_private_address(allowed: str) -> None:
    addresses = Addresses(frozenset({allowed}), Names(storage=["10.0.0.5"]))

    target = addresses.check("http://storage:8000/object")

    assert target.addresses == ("10.0.0.5",)


@pytest.mark.parametrize(
    "url",
    [
        "https://storage:8000/",
        "http://storage:8001/",
        "http://storage/",
        "http://storage.local:8000/",
        "http://xstorage:8000/",
        "http://10.0.0.5:8000/",
    ],
)
def test_only_scheme_host_and_port_together_are_an_allowed_origin(url: str) -> None:
    names = Names(storage=["10.0.0.5"], storage_local=["10.0.0.5"], xstorage=["10.0.0.5"])
    addresses = Addresses(frozenset({"http://storage:8000"}), names)

    with pytest.raises(ReferenceRefused, match="not a public one"):
        addresses.check(url)


def test_an_allowed_origin_without_a_port_has_the_usual_one() -> None:
    addresses = Addresses(frozenset({"https://storage"}), Names(storage=["10.0.0.5"]))

    assert addresses.check("https://storage:443/").addresses == ("10.0.0.5",)


@pytest.mark.parametrize("origin", ["storage:8000", "ftp://storage", "http://u:p@storage", ""])
def test_what_is_not_an_origin_cannot_be_allowed(origin: str) -> None:
    with pytest.raises(ConfigError, match="allowed origin"):
        Addresses(frozenset({origin}))


def test_a_name_that_is_not_there_may_be_there_later() -> None:
    with pytest.raises(ReferenceUnavailable, match=r"name of gone\.example") as caught:
        Addresses(NOBODY, Names()).check("http://gone.example/")

    assert caught.value.retry_after_s == 5


def test_a_name_without_addresses_is_unavailable() -> None:
    with pytest.raises(ReferenceUnavailable, match="no address"):
        Addresses(NOBODY, Names(empty_example=[])).check("http://empty.example/")


def test_a_look_up_that_hangs_is_left_behind() -> None:
    ends, ended = threading.Event(), threading.Event()

    def hangs(host: str, port: int) -> list[str]:
        ends.wait(10)
        ended.set()
        return [PUBLIC]

    with pytest.raises(ReferenceUnavailable, match=r"within 0\.05 s"):
        Addresses(NOBODY, hangs).check("http://slow.example/", 0.05)

    assert not ended.is_set()
    ends.set()
    assert ended.wait(10)


def test_a_fault_of_ours_in_a_look_up_is_not_hidden() -> None:
    def broken(host: str, port: int) -> list[str]:
        raise KeyError(host)

    with pytest.raises(KeyError):
        Addresses(NOBODY, broken).check("http://good.example/")


def test_the_systems_look_up_finds_loopback() -> None:
    with pytest.raises(ReferenceRefused, match="not a public one"):
        Addresses(NOBODY).check("http://localhost/")


@pytest.mark.parametrize("host", ["finance.example", "my-info.example", "NaN.example"])
def test_a_host_with_a_word_that_a_client_misreads_is_not_named(host: str) -> None:
    names = Names(**{host.lower().replace(".", "_"): ["10.0.0.1"]})

    with pytest.raises(ReferenceRefused) as caught:
        Addresses(NOBODY, names).check(f"http://{host}/")

    assert not has_trap_word(str(caught.value))
    assert shown_host(host) == "the host"
