"""Which addresses are public, for providers and workers alike, and look-ups that end in time."""

from __future__ import annotations

import ipaddress
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import Invalid
from gateway.models import faults
from gateway.models.addresses import find
from gateway.models.faults import ProviderError
from gateway.network.addresses import is_public, look_up, system_addresses
from gateway.workers.urls import AddressPolicy

PUBLIC = (
    "1.1.1.1",
    "8.8.8.8",
    "104.18.7.1",
    "100.63.255.255",
    "100.128.0.0",
    "168.63.129.15",
    "172.15.255.255",
    "172.32.0.0",
    "192.0.1.1",
    "192.88.98.1",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "2001:200::1",
    "2003::1",
    "2606:4700::1111",
    "2a00:1450:4001::200e",
    "3ffe::1",
    "64:ff9b::8.8.8.8",  # NAT64 of a public one
)
NOT_PUBLIC = (
    "0.0.0.0",
    "10.1.2.3",
    "127.0.0.1",
    "127.255.255.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",  # metadata of most clouds
    "168.63.129.16",  # host agent on Azure
    "100.64.0.1",  # carrier-grade NAT
    "100.100.100.200",  # the same range; metadata of Alibaba Cloud
    "100.127.255.255",
    "192.0.0.8",  # protocol assignments
    "192.0.0.192",
    "192.0.2.1",  # documentation
    "198.51.100.1",
    "203.0.113.1",
    "192.88.99.1",  # 6to4 relays
    "198.18.0.1",  # benchmarks
    "224.0.0.1",  # multicast
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",  # v4-compatible
    "::ffff:127.0.0.1",  # v4-mapped
    "::ffff:169.254.169.254",
    "::ffff:8.8.8.8",
    "64:ff9b::127.0.0.1",  # NAT64
    "64:ff9b::10.0.0.1",
    "64:ff9b::169.254.169.254",
    "64:ff9b::192.0.0.8",
    "64:ff9b::168.63.129.16",
    "64:ff9b:1::8.8.8.8",  # NAT64 of one network
    "100::1",  # discarded
    "2001::1",  # Teredo
    "2001:db8::1",  # documentation
    "3fff::1",
    "2002:7f00:1::",  # 6to4 of 127.0.0.1
    "2002:808:808::1",
    "4000::1",  # not assigned
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",  # metadata of AWS
    "fe80::1",
    "fe80::1%eth0",
    "2606:4700::1111%eth0",
    "fec0::1",  # site-local
    "ff02::1",  # multicast
    "ff0e::1",
    "name",
    "",
    "1.2.3",
    "0177.0.0.1",
    "[::1]",
    "127.0.0.1 ",
)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_one_for_providers_and_for_workers(address: str) -> None:
    assert is_public(address)
    assert AddressPolicy().check("host.example", 443, [address]) == (address,)
    assert found_by_providers(address) == (address,)


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_any_other_address_is_refused_for_providers_and_for_workers(address: str) -> None:
    assert not is_public(address)
    with pytest.raises(Invalid, match="not a public one"):
        AddressPolicy().check("host.example", 443, ["8.8.8.8", address])
    with pytest.raises(ProviderError, match="not a public one") as told:
        found_by_providers("8.8.8.8", address)
    assert told.value.reason == faults.ADDRESS


@given(st.ip_addresses())
@settings(max_examples=500, deadline=None)
def test_no_address_is_public_that_python_does_not_think_global(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    if is_public(str(address)):
        assert address.is_global
        assert not address.is_multicast
        assert not address.is_reserved or address in ipaddress.ip_network("64:ff9b::/96")


@given(st.ip_addresses(v=4))
@settings(max_examples=200, deadline=None)
def test_of_the_addresses_that_carry_another_only_nat64_is_as_public_as_that(
    address: ipaddress.IPv4Address,
) -> None:
    number = int(address)
    nat64 = ipaddress.IPv6Address((0x64FF9B << 96) + number)
    carriers = [
        ipaddress.IPv6Address(number),  # v4-compatible
        ipaddress.IPv6Address((0xFFFF << 32) + number),  # v4-mapped
        ipaddress.IPv6Address((0xFFFF << 48) + number),  # v4-translated
        ipaddress.IPv6Address((0x2002 << 112) + (number << 80) + 1),  # 6to4
        ipaddress.IPv6Address((0x20010000 << 96) + (number ^ 0xFFFFFFFF)),  # Teredo
    ]

    assert is_public(str(nat64)) == is_public(str(address))
    assert [str(one) for one in carriers if is_public(str(one))] == []


def found_by_providers(*addresses: str) -> tuple[str, ...]:
    return find(
        "host.example",
        443,
        private_allowed=False,
        within_s=60.0,
        resolve=lambda _host, _port: addresses,
    )


# --- look-ups ----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["8.8.8.8", "127.0.0.1", "::1", "2606:4700::1111"])
def test_an_address_is_not_looked_up(host: str) -> None:
    def resolve(_host: str, _port: int) -> list[str]:
        raise AssertionError("it was looked up")

    assert look_up(host, 443, 60.0, resolve) == (host,)


def test_a_name_gives_all_its_addresses_in_their_order() -> None:
    asked: list[tuple[str, int]] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return ["8.8.8.8", "::1", "1.1.1.1"]

    assert look_up("host.example", 444, 60.0, resolve) == ("8.8.8.8", "::1", "1.1.1.1")
    assert asked == [("host.example", 444)]


@pytest.mark.parametrize("within_s", [-1.0, 0.0, 0.05])
def test_a_look_up_that_hangs_is_left_behind(within_s: float) -> None:
    release = threading.Event()

    def resolve(_host: str, _port: int) -> list[str]:
        release.wait()
        return []

    with pytest.raises(TimeoutError):
        look_up("host.example", 443, within_s, resolve)
    release.set()


@pytest.mark.parametrize("fault", [OSError("no such name"), ZeroDivisionError(), SystemExit()])
def test_what_a_look_up_raises_is_raised_at_once(fault: BaseException) -> None:
    def resolve(_host: str, _port: int) -> list[str]:
        raise fault

    with pytest.raises(type(fault)):
        look_up("host.example", 443, 60.0, resolve)


@pytest.mark.parametrize("host", ["a..example", "a" * 64 + ".example"])
def test_a_name_that_no_system_can_look_up_is_one_that_cannot_be_found(host: str) -> None:
    with pytest.raises(ProviderError) as told:
        find(host, 443, private_allowed=False, within_s=60.0, resolve=system_addresses)

    assert told.value.reason == faults.UNREACHABLE


def test_the_system_finds_loopback() -> None:
    assert set(system_addresses("localhost", 80)) & {"127.0.0.1", "::1"}
