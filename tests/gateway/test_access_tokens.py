"""Users' tokens: which hold, and which attacks do not."""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from gateway.access import jwks
from gateway.access.jwks import KEEP_S, REFRESH_S, UNKNOWN_S, KeySet, fetch_jwks, parse_keys
from gateway.access.tokens import LEEWAY_S, MAX_TOKEN_CHARS, TokenVerifier, verifier
from gateway.config import GatewaySection, Settings
from gateway.errors import ConfigError, StoreUnavailable, Unauthorized

SECRET = "a-secret-of-forty-characters-for-tests-x"
USER = "6f9619ff-8b86-4011-b42d-00c04fc964ff"
NOW = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
NOW_S = NOW.timestamp()
EC_KEY = ec.generate_private_key(ec.SECP256R1())
RSA_KEY = rsa.generate_private_key(65537, 2048)


def _public(key: Any, key_id: str, **more: Any) -> dict[str, Any]:
    algorithm = jwt.get_algorithm_by_name("ES256" if key is EC_KEY else "RS256")
    return {**json.loads(algorithm.to_jwk(key.public_key())), "kid": key_id, **more}


def _set(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": list(keys)}).encode()


def _claims(**changes: Any) -> dict[str, Any]:
    claims = {"sub": USER, "role": "authenticated", "aud": "authenticated", "exp": NOW_S + 3600}
    merged = {**claims, **changes}
    return {name: value for name, value in merged.items() if value is not ...}


def _signed(key: Any = SECRET, algorithm: str = "HS256", **changes: Any) -> str:
    headers = changes.pop("headers", None)
    return jwt.encode(_claims(**changes), key, algorithm, headers)


def _raw(header: dict[str, Any], claims: dict[str, Any], signature: bytes = b"") -> str:
    def part(value: bytes) -> str:
        return base64.urlsafe_b64encode(value).rstrip(b"=").decode()

    parts = (json.dumps(header).encode(), json.dumps(claims).encode(), signature)
    return ".".join(part(one) for one in parts)


class Provider:
    """An identity provider's JWKS URL, and how often it was asked."""

    def __init__(self, document: bytes) -> None:
        self.document: bytes | Exception = document
        self.asked = 0

    def __call__(self, url: str) -> bytes:
        self.asked += 1
        if isinstance(self.document, Exception):
            raise self.document
        return self.document


@pytest.fixture
def provider() -> Provider:
    return Provider(_set(_public(EC_KEY, "e"), _public(RSA_KEY, "r")))


@pytest.fixture
def both(provider: Provider) -> TokenVerifier:
    return TokenVerifier(SECRET, KeySet("https://id.example/jwks", provider))


def test_a_token_signed_with_the_secret_names_its_user(both: TokenVerifier) -> None:
    claims = both.verify(_signed(), NOW, 0.0)

    assert (claims.role, claims.user_id) == ("authenticated", USER)


@pytest.mark.parametrize(
    ("key", "algorithm", "key_id"), [(EC_KEY, "ES256", "e"), (RSA_KEY, "RS256", "r")]
)
def test_a_token_signed_with_a_key_of_the_set_names_its_user(
    both: TokenVerifier, key: Any, algorithm: str, key_id: str
) -> None:
    token = _signed(key, algorithm, headers={"kid": key_id})

    assert both.verify(token, NOW, 0.0).user_id == USER


def test_an_audience_may_be_a_list(both: TokenVerifier) -> None:
    assert both.verify(_signed(aud=["other", "authenticated"]), NOW, 0.0).user_id == USER


def test_an_upper_case_id_is_the_same_user(both: TokenVerifier) -> None:
    assert both.verify(_signed(sub=USER.upper()), NOW, 0.0).user_id == USER


@pytest.mark.parametrize("role", ["anon", "service_role"])
def test_the_projects_own_keys_name_a_role_and_no_user(both: TokenVerifier, role: str) -> None:
    claims = both.verify(_signed(role=role, aud=..., sub=...), NOW, 0.0)

    assert (claims.role, claims.user_id) == (role, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": NOW_S - LEEWAY_S},
        {"exp": ...},
        {"exp": "soon"},
        {"exp": True},
        {"exp": 1e300},
        {"nbf": NOW_S + LEEWAY_S + 1},
        {"nbf": "x"},
        {"aud": "another"},
        {"aud": ...},
        {"aud": ["a", "b"]},
        {"role": "postgres"},
        {"role": ...},
        {"role": ["authenticated"]},
        {"sub": "not-a-uuid"},
        {"sub": ...},
        {"sub": USER.replace("-", "")},
        {"sub": "{" + USER + "}"},
        {"sub": 7},
    ],
    ids=str,
)
def test_a_signed_token_with_a_wrong_claim_is_refused(
    both: TokenVerifier, changes: dict[str, Any]
) -> None:
    key = changes.get("sub", "")
    token = (
        jwt.encode(_claims(**changes), SECRET, "HS256")
        if isinstance(key, str) or key is ...
        else _raw_signed(_claims(**changes))
    )

    with pytest.raises(Unauthorized):
        both.verify(token, NOW, 0.0)


def _raw_signed(claims: dict[str, Any]) -> str:
    return jwt.PyJWS().encode(json.dumps(claims).encode(), SECRET, "HS256")


def test_small_differences_of_clocks_are_forgiven(both: TokenVerifier) -> None:
    assert both.verify(_signed(exp=NOW_S - LEEWAY_S + 1), NOW, 0.0).user_id == USER
    assert both.verify(_signed(nbf=NOW_S + LEEWAY_S - 1), NOW, 0.0).user_id == USER


def test_an_unsigned_token_is_refused_in_every_spelling(both: TokenVerifier) -> None:
    for name in ("none", "None", "NONE", "nOnE", ""):
        with pytest.raises(Unauthorized):
            both.verify(_raw({"alg": name, "typ": "JWT"}, _claims()), NOW, 0.0)


def test_the_public_key_is_no_secret(provider: Provider) -> None:
    """The RS/HS mix-up: the token says HS256 and is signed with the public key's bytes."""
    pem = RSA_KEY.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    keys_only = TokenVerifier(None, KeySet("https://id.example/jwks", provider))
    with_secret = TokenVerifier(SECRET, KeySet("https://id.example/jwks", provider))
    token = _hs256(pem, {"alg": "HS256", "typ": "JWT", "kid": "r"})

    for one in (keys_only, with_secret):
        with pytest.raises(Unauthorized):
            one.verify(token, NOW, 0.0)


def _hs256(key: bytes, header: dict[str, Any]) -> str:
    import hashlib
    import hmac

    unsigned = _raw(header, _claims()).rpartition(".")[0]
    signature = hmac.new(key, unsigned.encode(), hashlib.sha256).digest()
    return _raw(header, _claims(), signature)


def test_a_key_is_used_with_its_own_algorithm_only(both: TokenVerifier) -> None:
    with pytest.raises(Unauthorized):
        both.verify(_signed(RSA_KEY, "RS256", headers={"kid": "e"}), NOW, 0.0)


@pytest.mark.parametrize("algorithm", ["HS384", "HS512", "RS384", "PS256", "ES384", "EdDSA"])
def test_other_algorithms_are_refused_by_name(both: TokenVerifier, algorithm: str) -> None:
    with pytest.raises(Unauthorized):
        both.verify(_raw({"alg": algorithm, "kid": "r"}, _claims(), b"x" * 64), NOW, 0.0)


@pytest.mark.parametrize(
    "key_id", [None, "", "unknown", "../../etc/passwd", 7, "k" * 201, {}, "' OR 1=1"]
)
def test_a_key_id_that_is_not_in_the_set_is_refused(both: TokenVerifier, key_id: Any) -> None:
    with pytest.raises(Unauthorized):
        both.verify(_raw({"alg": "RS256", "kid": key_id}, _claims(), b"x" * 256), NOW, 0.0)


def test_a_key_that_the_token_brings_is_not_used(both: TokenVerifier) -> None:
    attacker = rsa.generate_private_key(65537, 2048)
    brought = json.loads(jwt.get_algorithm_by_name("RS256").to_jwk(attacker.public_key()))
    headers = {"kid": "evil", "jwk": brought, "jku": "https://evil.example/jwks"}

    with pytest.raises(Unauthorized):
        both.verify(_signed(attacker, "RS256", headers=headers), NOW, 0.0)


def test_extensions_that_must_be_understood_are_refused(both: TokenVerifier) -> None:
    token = _hs256(SECRET.encode(), {"alg": "HS256", "crit": ["exp"]})

    with pytest.raises(Unauthorized):
        both.verify(token, NOW, 0.0)


def test_a_huge_token_is_refused_before_it_is_read(both: TokenVerifier) -> None:
    with pytest.raises(Unauthorized):
        both.verify(_signed(padding="x" * MAX_TOKEN_CHARS), NOW, 0.0)


def test_a_token_with_one_bit_changed_is_refused(both: TokenVerifier) -> None:
    token = _signed()
    head, body, signature = token.split(".")
    flipped = ("A" if signature[0] != "A" else "B") + signature[1:]

    with pytest.raises(Unauthorized):
        both.verify(f"{head}.{body}.{flipped}", NOW, 0.0)


@given(st.text(max_size=200) | st.text(alphabet="abcAB01.-_=", max_size=200))
def test_no_text_makes_the_check_fail_in_another_way(text: str) -> None:
    keys = KeySet("https://id.example/jwks", Provider(_set(_public(EC_KEY, "e"))))

    with pytest.raises(Unauthorized):
        TokenVerifier(SECRET, keys).verify(text, NOW, 0.0)


def test_nested_json_in_a_header_does_not_end_the_process(both: TokenVerifier) -> None:
    deep = base64.urlsafe_b64encode(b"[" * 5000).rstrip(b"=").decode()

    with pytest.raises(Unauthorized):
        both.verify(f"{deep}.e30.AA", NOW, 0.0)


def test_a_short_secret_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="31 bytes"):
        TokenVerifier("x" * 31, None)


# --- the key set ------------------------------------------------------------------------------


def test_the_set_is_read_once_for_many_tokens(provider: Provider) -> None:
    keys = KeySet("https://id.example/jwks", provider)

    for now in (0.0, 1.0, REFRESH_S - 1):
        assert keys.find("e", "ES256", now) is not None

    assert provider.asked == 1


def test_unknown_ids_are_asked_for_once_a_minute_at_most(provider: Provider) -> None:
    keys = KeySet("https://id.example/jwks", provider)
    keys.find("e", "ES256", 0.0)

    for number in range(50):
        assert keys.find(f"guess {number}", "ES256", 1.0 + number) is None
    assert provider.asked == 1
    keys.find("another", "ES256", UNKNOWN_S)

    assert provider.asked == 2


def test_a_new_key_is_found_when_its_first_token_comes(provider: Provider) -> None:
    keys = KeySet("https://id.example/jwks", provider)
    keys.find("e", "ES256", 0.0)
    provider.document = _set(_public(EC_KEY, "new"))

    assert keys.find("new", "ES256", UNKNOWN_S) is not None
    assert keys.find("e", "ES256", UNKNOWN_S + 1) is None


def test_a_withdrawn_key_goes_when_the_set_is_read_again(provider: Provider) -> None:
    keys = KeySet("https://id.example/jwks", provider)
    keys.find("e", "ES256", 0.0)
    provider.document = _set(_public(RSA_KEY, "r"))

    assert keys.find("e", "ES256", REFRESH_S) is None


@pytest.mark.parametrize("fault", [httpx.ConnectError("x"), ValueError("x"), b"{}", b"[]", b"\xff"])
def test_the_last_set_counts_while_the_provider_is_away(
    provider: Provider, fault: bytes | Exception
) -> None:
    keys = KeySet("https://id.example/jwks", provider)
    keys.find("e", "ES256", 0.0)
    provider.document = fault

    assert keys.find("e", "ES256", REFRESH_S) is not None
    with pytest.raises(StoreUnavailable):
        keys.find("e", "ES256", KEEP_S + 1)


def test_without_any_set_a_token_is_not_called_wrong() -> None:
    """401 would make every client sign its user out while the identity provider is away."""
    keys = KeySet("https://id.example/jwks", Provider(b"broken"))

    with pytest.raises(StoreUnavailable):
        keys.find("e", "ES256", 0.0)


@pytest.mark.parametrize(
    "bad",
    [
        {"kty": "oct", "k": "c2VjcmV0", "kid": "o", "alg": "HS256"},
        _public(EC_KEY, "e", use="enc"),
        _public(EC_KEY, "e", alg="ES384"),
        _public(EC_KEY, "e", kid=7),
        _public(EC_KEY, "k" * 201),
        {**json.loads(jwt.get_algorithm_by_name("RS256").to_jwk(RSA_KEY)), "kid": "private"},
        {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "kid": "off"},
        {"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": "tiny"},
        {"kty": "RSA", "kid": "empty"},
        "text",
        None,
    ],
    # Not of the keys themselves, which are others each time.
    ids=[
        "symmetric",
        "for encryption",
        "another curve",
        "a number as id",
        "a long id",
        "private",
        "off the curve",
        "tiny",
        "empty",
        "a text",
        "null",
    ],
)
def test_a_key_that_should_not_be_there_is_left_out(bad: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library warns of a tiny key before we refuse it
        found = parse_keys(_set(bad, _public(RSA_KEY, "good")))

    assert list(found) == [("good", "RS256")]


def test_a_curve_of_another_size_is_left_out() -> None:
    other = ec.generate_private_key(ec.SECP384R1())
    public = json.loads(jwt.get_algorithm_by_name("ES384").to_jwk(other.public_key()))

    found = parse_keys(_set({**public, "kid": "big"}, _public(RSA_KEY, "good")))

    assert list(found) == [("good", "RS256")]


def test_the_first_of_two_keys_with_one_id_counts() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(jwt.get_algorithm_by_name("ES256").to_jwk(other.public_key()))

    found = parse_keys(_set(_public(EC_KEY, "e"), {**public, "kid": "e"}))

    assert found[("e", "ES256")].key.public_numbers() == EC_KEY.public_key().public_numbers()


@pytest.mark.parametrize(
    "document",
    [b"", b"null", b"[]", b'{"keys": {}}', b'{"keys": []}', b"[" * 100_000, _set(*[{}] * 33)],
    ids=lambda one: str(one[:20]),
)
def test_what_is_no_set_is_refused(document: bytes) -> None:
    with pytest.raises(ValueError):
        parse_keys(document)


# --- fetching ---------------------------------------------------------------------------------


def _fetch(handler: Callable[[httpx.Request], httpx.Response], clock: Any = lambda: 0.0) -> bytes:
    return fetch_jwks("https://id.example/jwks", clock, httpx.MockTransport(handler))


def test_the_body_of_a_200_is_fetched() -> None:
    assert _fetch(lambda request: httpx.Response(200, content=b"{}")) == b"{}"


@pytest.mark.parametrize("status", [204, 301, 302, 307, 404, 500])
def test_redirects_and_errors_are_no_set(status: int) -> None:
    asked = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request.url)
        return httpx.Response(status, headers={"Location": "http://169.254.169.254/"})

    with pytest.raises(ValueError):
        _fetch(handler)
    assert len(asked) == 1


def test_a_body_over_the_limit_is_not_read_to_its_end() -> None:
    with pytest.raises(ValueError, match="longer"):
        _fetch(lambda request: httpx.Response(200, content=b"x" * (jwks.MAX_BYTES + 1)))


def test_a_server_that_drips_is_given_up() -> None:
    ticks = iter([0.0, 1.0, jwks.FETCH_S + 0.1])

    with pytest.raises(ValueError, match="within"):
        _fetch(
            lambda request: httpx.Response(200, content=iter([b"a", b"b", b"c"])),
            lambda: next(ticks),
        )


# --- settings ---------------------------------------------------------------------------------


def _settings(tmp_path: Any, **environment: str) -> Settings:
    return Settings(
        section=GatewaySection(),
        state_dir=tmp_path,
        models_dir=tmp_path,
        database_url="sqlite:///x",
        environment=environment,
    )


def test_without_a_secret_or_a_set_there_are_no_user_tokens(tmp_path: Any) -> None:
    assert verifier(_settings(tmp_path), lambda: 0.0) is None


def test_the_gateways_own_secret_goes_before_supabases(tmp_path: Any) -> None:
    settings = _settings(tmp_path, GATEWAY_JWT_SECRET=SECRET, SUPABASE_JWT_SECRET="y" * 40)
    made = verifier(settings, lambda: 0.0)

    assert made is not None
    assert made.verify(_signed(), NOW, 0.0).user_id == USER


def test_a_file_url_is_no_jwks_url(tmp_path: Any) -> None:
    with pytest.raises(ConfigError):
        verifier(_settings(tmp_path, GATEWAY_JWKS_URL="file:///etc/passwd"), lambda: 0.0)
