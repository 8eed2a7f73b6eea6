"""Files put into stores that are really there: moto's S3 server in a process of its own, and a
stand-in for Supabase Storage over HTTP. Connections are cut by a proxy between."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import random
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from flask import Flask, Response, request

from tests.cutting_proxy import CuttingProxy, cutting_proxy
from tests.s3_server import ACCESS_KEY, SECRET_KEY, client, running_s3
from tests.supabase_storage import Shelf, serve, storage_blueprint
from worker.errors import Cancelled, ConfigError, has_trap_word
from worker.storage.configured import store_from_environment
from worker.storage.s3_store import S3Store
from worker.storage.stores import (
    MAX_RETRY_AFTER_S,
    StoreRefused,
    StoreUnavailable,
    retry_after_s,
)
from worker.storage.supabase_store import CHUNK_BYTES, SupabaseStore, allowed_s

BUCKET = "workspace-temp"
KEY = "user/job/0.png"
PART = 5 << 20  # the smallest that S3 allows
CHUNK = 100_000  # of the stand-in, which takes any


class Journal:
    """What a caller keeps of an upload, as a row of a database would: as JSON."""

    def __init__(self) -> None:
        self.row = "{}"
        self.saves = 0

    @property
    def saved(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.row)
        return found

    def save(self, saved: dict[str, Any]) -> None:
        self.row = json.dumps(saved)
        self.saves += 1


@dataclass
class Supabase:
    shelf: Shelf
    url: str
    large: int = 3 * CHUNK  # bytes of a file that takes several requests

    def store(self, url: str = "", **changes: Any) -> SupabaseStore:
        sizes = {"resumable_from_bytes": CHUNK, "chunk_bytes": CHUNK} | changes
        return SupabaseStore(url or self.url, self.shelf.service_key, **sizes)

    def content(self, key: str) -> tuple[bytes, str]:
        stored = self.shelf.objects[BUCKET, key]
        return stored.content, stored.mime_type

    def keys(self) -> list[str]:
        return [name for _, name in self.shelf.objects]


@dataclass
class S3:
    url: str
    bucket: str
    client: Any
    large: int = 2 * PART

    def store(self, url: str = "", **changes: Any) -> S3Store:
        sizes = {"part_bytes": PART, "multipart_from_bytes": CHUNK} | changes
        keys = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
        return S3Store(**{"bucket": self.bucket, "endpoint_url": url or self.url} | keys | sizes)

    def content(self, key: str) -> tuple[bytes, str]:
        found = self.client.get_object(Bucket=self.bucket, Key=key)
        with found["Body"] as body:
            return body.read(), found["ContentType"]

    def keys(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.bucket)
        return [one["Key"] for one in found.get("Contents", ())]


@dataclass
class Scripted:
    """A server that answers every request as it is told, and keeps what came."""

    url: str = ""
    answer: Callable[[], Response] = Response
    seen: list[tuple[str, str]] = field(default_factory=list)  # method, path with query
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@pytest.fixture
def supabase() -> Iterator[Supabase]:
    shelf = Shelf()
    app = Flask(__name__)
    app.register_blueprint(storage_blueprint(shelf))
    with serve(app) as url:
        yield Supabase(shelf, url)


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """Its address and a client of it. boto3 takes 0.15 s to make one."""
    with running_s3(tmp_path_factory.mktemp("s3")) as url:
        yield url, client(url)


@pytest.fixture
def s3(s3_server: tuple[str, Any]) -> S3:
    url, looking = s3_server
    bucket = f"bucket-{uuid.uuid4()}"
    looking.create_bucket(Bucket=bucket)
    return S3(url, bucket, looking)


@pytest.fixture(params=["supabase", "s3"])
def place(request: pytest.FixtureRequest) -> Supabase | S3:
    """Each store in turn, with what it stores in."""
    found: Supabase | S3 = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def scripted_server() -> Iterator[Scripted]:
    script = Scripted()
    app = Flask(__name__)

    @app.route("/", defaults={"path": ""}, methods=["GET", "HEAD", "POST", "PUT", "PATCH"])
    @app.route("/<path:path>", methods=["GET", "HEAD", "POST", "PUT", "PATCH"])
    def anything(path: str) -> Response:
        script.seen.append((request.method, request.full_path))
        script.bodies.append(request.get_data())
        script.headers.append(dict(request.headers))
        return script.answer()

    with serve(app) as url:
        script.url = url
        yield script


@pytest.fixture
def scripted(scripted_server: Scripted) -> Scripted:
    scripted_server.answer = Response
    for kept in (scripted_server.seen, scripted_server.bodies, scripted_server.headers):
        kept.clear()
    return scripted_server


def made(tmp_path: Path, size: int, seed: int = 1) -> Path:
    file = tmp_path / f"{size}-{seed}"
    file.write_bytes(random.Random(seed).randbytes(size))
    return file


def put(store: Any, file: Path, journal: Journal | None = None, **more: Any) -> None:
    journal = journal or Journal()
    store.put(KEY, file, "image/png", journal.saved, journal.save, **more)


def stopping_after(times: int) -> Callable[[], bool]:
    """A `should_stop` that is true from the question after so many."""
    left = iter(range(times))
    return lambda: next(left, None) is None


# --- files arrive -----------------------------------------------------------------------------


def test_a_file_arrives_byte_for_byte_with_its_name_and_type(place, tmp_path):
    store = place.store()
    for size in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, PART + 1):
        file = made(tmp_path, size)

        put(store, file)

        assert place.keys() == [KEY]
        assert place.content(KEY) == (file.read_bytes(), "image/png")


def test_a_video_goes_to_supabase_in_chunks_of_the_size_that_it_takes(supabase, tmp_path):
    file = made(tmp_path, 2 * CHUNK_BYTES + 12345)
    store = SupabaseStore(supabase.url, supabase.shelf.service_key)

    store.put("user/job/0.mp4", file, "video/mp4", {}, lambda _saved: None)

    assert supabase.content("user/job/0.mp4") == (file.read_bytes(), "video/mp4")
    methods = [line.split()[0] for line in supabase.shelf.seen]
    assert methods == ["POST", "PATCH", "PATCH", "PATCH"]


def test_a_video_goes_to_s3_in_parts(s3, tmp_path):
    file = made(tmp_path, 2 * PART + 12345)

    put(s3.store(), file)

    assert s3.content(KEY)[0] == file.read_bytes()
    assert s3.client.head_object(Bucket=s3.bucket, Key=KEY)["ETag"].endswith('-3"')


@pytest.mark.parametrize("size", [600, CHUNK + 1])
def test_a_file_put_again_replaces_the_one_before(place, tmp_path, size):
    first, second = made(tmp_path, size), made(tmp_path, size, seed=2)
    put(place.store(), first)

    put(place.store(), second)

    assert place.keys() == [KEY]
    assert place.content(KEY)[0] == second.read_bytes()


@pytest.mark.parametrize("size", [600, CHUNK + 1])
def test_names_with_unusual_characters_are_kept_as_they_are(place, tmp_path, size):
    file, store = made(tmp_path, size), place.store()
    keys = ["a b/c+d/0.png", "ä/%41%2F/0.png", "u/j?x=1&y/0#1.png", "(1)'~"]

    for key in keys:
        store.put(key, file, "image/webp", {}, lambda _saved: None)

    assert sorted(place.keys()) == sorted(keys)
    assert {place.content(key) for key in keys} == {(file.read_bytes(), "image/webp")}


@pytest.mark.parametrize(
    "key",
    ["", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "a\nb", "a\x00b", "a\ud800", "ä" * 513],
)
def test_a_name_that_would_mean_another_place_is_refused_before_anything_is_sent(
    scripted, tmp_path, key
):
    for store in [scripted_store(kind, scripted.url) for kind in ("supabase", "s3")]:
        with pytest.raises(StoreRefused, match="the name of a file to store has") as caught:
            store.put(key, made(tmp_path, 1), "image/png", {}, lambda _saved: None)
        assert not has_trap_word(str(caught.value))
    assert scripted.seen == []


def test_a_prefix_of_the_bucket_stands_before_every_name(s3, tmp_path):
    put(s3.store(prefix="/verbatim/out/"), made(tmp_path, 10))

    assert s3.keys() == [f"verbatim/out/{KEY}"]


def test_one_store_serves_many_threads(place, tmp_path):
    store, files = place.store(), [made(tmp_path, 2 * CHUNK, seed) for seed in range(8)]

    def send(index: int) -> None:
        store.put(f"u/j/{index}.png", files[index], "image/png", {}, lambda _saved: None)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(8)))

    assert [place.content(f"u/j/{index}.png")[0] for index in range(8)] == [
        file.read_bytes() for file in files
    ]


def test_a_proxy_of_the_environment_is_not_used(place, tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)

    put(place.store(), made(tmp_path, 10))

    assert place.keys() == [KEY]


# --- cut connections --------------------------------------------------------------------------


def put_through(place: Supabase | S3, proxy: CuttingProxy, file: Path) -> None:
    """The put that is cut, and the one after it by a new store that knows only what was saved."""
    journal = Journal()
    with pytest.raises(StoreUnavailable):
        put(place.store(proxy.url), file, journal)
    put(place.store(proxy.url), file, journal)


def test_an_upload_cut_at_every_byte_of_its_request_is_there_once_after_the_next_try(
    supabase, tmp_path
):
    file = made(tmp_path, 200)
    with cutting_proxy(supabase.url) as proxy:
        store = supabase.store(proxy.url)
        put(store, file)
        whole = sum(proxy.sent)
        stored_after_cut = set()
        for after in range(whole):
            supabase.shelf.clear()
            proxy.cut(request_after=after)

            with pytest.raises(StoreUnavailable):
                put(store, file)
            stored_after_cut |= set(supabase.shelf.objects)
            put(store, file)

            [(place, stored)] = supabase.shelf.objects.items()
            assert place == (BUCKET, KEY)
            assert (stored.content, stored.writes) == (file.read_bytes(), 1)

    assert whole > 500
    assert stored_after_cut == set()


def test_an_upload_cut_at_every_byte_of_its_answer_may_be_put_again(supabase, tmp_path):
    file = made(tmp_path, 200)
    with cutting_proxy(supabase.url) as proxy:
        store = supabase.store(proxy.url)
        put(store, file)
        whole = sum(proxy.received)
        for after in range(whole):
            supabase.shelf.clear()
            proxy.cut(response_after=after)

            with pytest.raises(StoreUnavailable):
                put(store, file)
            put(store, file)

            [(place, stored)] = supabase.shelf.objects.items()
            assert place == (BUCKET, KEY)
            assert (stored.content, stored.writes) == (file.read_bytes(), 2)

    assert whole > 100


@pytest.mark.parametrize("direction", ["request_after", "response_after"])
def test_an_upload_to_s3_cut_anywhere_is_there_once_after_the_next_try(s3, tmp_path, direction):
    file = made(tmp_path, 200)
    with cutting_proxy(s3.url) as proxy:
        store = s3.store(proxy.url)
        put(store, file)
        whole = sum(proxy.sent if direction == "request_after" else proxy.received)
        for after in [*range(0, whole, 29), whole - 1]:
            s3.client.delete_object(Bucket=s3.bucket, Key=KEY)
            proxy.cut(**{direction: after})

            with pytest.raises(StoreUnavailable):
                put(store, file)
            if direction == "request_after":
                assert s3.keys() == []
            put(store, file)

            assert s3.keys() == [KEY]
            assert s3.content(KEY) == (file.read_bytes(), "image/png")

    assert whole > 200


def test_what_supabase_has_of_a_cut_upload_is_not_sent_again(supabase, tmp_path):
    """Cut in the middle and at both ends of every request, and in steps over all of them."""
    file = made(tmp_path, 5 * CHUNK + 4321)
    size = file.stat().st_size
    with cutting_proxy(supabase.url) as proxy:
        put(supabase.store(proxy.url), file)
        requests = list(proxy.sent)
        starts = [sum(requests[:index]) for index in range(len(requests))]
        cuts = {
            cut
            for start, length in zip(starts, requests, strict=True)
            for cut in (start, start + length // 2, start + length - 1)
        } | set(range(0, sum(requests), 31_013))
        for after in sorted(cuts):
            supabase.shelf.clear()
            proxy.cut(request_after=after)

            put_through(supabase, proxy, file)

            [stored] = supabase.shelf.objects.values()
            assert (stored.content, stored.writes) == (file.read_bytes(), 1)
            assert supabase.shelf.accepted_bytes == size

    assert len(requests) == 7


def test_an_upload_whose_answers_are_cut_goes_on_where_supabase_is(supabase, tmp_path):
    file = made(tmp_path, 3 * CHUNK)
    with cutting_proxy(supabase.url) as proxy:
        put(supabase.store(proxy.url), file)
        answers = list(proxy.received)
        for after in range(0, sum(answers), 41):
            supabase.shelf.clear()
            proxy.cut(response_after=after)

            put_through(supabase, proxy, file)

            [stored] = supabase.shelf.objects.values()
            assert (stored.content, stored.writes) == (file.read_bytes(), 1)
            assert supabase.shelf.accepted_bytes == 3 * CHUNK

    assert len(answers) == 4


def test_parts_that_s3_has_are_not_sent_again(s3, tmp_path):
    file = made(tmp_path, 2 * PART + 4321)
    with cutting_proxy(s3.url) as proxy:
        put(s3.store(proxy.url), file)
        requests = list(proxy.sent)  # begin, three parts, join
        for index in range(len(requests)):
            s3.client.delete_object(Bucket=s3.bucket, Key=KEY)
            proxy.cut(request_after=sum(requests[:index]) + requests[index] // 2)

            put_through(s3, proxy, file)

            assert s3.keys() == [KEY]
            assert s3.content(KEY) == (file.read_bytes(), "image/png")
            # The request that was cut, and what asks for the parts that are there.
            assert sum(proxy.sent) < sum(requests) + requests[index] // 2 + 3000

    assert len(requests) == 5


def test_an_upload_to_s3_whose_answers_are_cut_is_whole_after_the_next_try(s3, tmp_path):
    file = made(tmp_path, PART + 4321)
    with cutting_proxy(s3.url) as proxy:
        put(s3.store(proxy.url), file)
        answers = list(proxy.received)
        for index in range(len(answers)):
            s3.client.delete_object(Bucket=s3.bucket, Key=KEY)
            proxy.cut(response_after=sum(answers[:index]) + answers[index] // 2)

            put_through(s3, proxy, file)

            assert s3.keys() == [KEY]
            assert s3.content(KEY)[0] == file.read_bytes()

    assert len(answers) == 4


# --- going on ---------------------------------------------------------------------------------


def test_an_upload_that_is_stopped_goes_on_later(place, tmp_path):
    file, journal = made(tmp_path, place.large), Journal()
    with pytest.raises(Cancelled):
        put(place.store(), file, journal, should_stop=stopping_after(3))
    assert place.keys() == []
    assert journal.saves == 1

    put(place.store(), file, journal)

    assert place.content(KEY)[0] == file.read_bytes()
    assert journal.saves == 1
    if isinstance(place, Supabase):
        assert place.shelf.accepted_bytes == place.large


def test_nothing_is_sent_when_the_caller_stops_at_once(place, tmp_path):
    for size in (10, CHUNK):
        with pytest.raises(Cancelled):
            put(place.store(), made(tmp_path, size), should_stop=lambda: True)

    assert place.keys() == []


def test_an_upload_that_expired_at_supabase_begins_anew(supabase, tmp_path):
    file, journal = made(tmp_path, 3 * CHUNK), Journal()
    with pytest.raises(Cancelled):
        put(supabase.store(), file, journal, should_stop=stopping_after(4))
    expired = journal.saved
    supabase.shelf.expire_uploads()

    put(supabase.store(), file, journal)

    assert supabase.content(KEY)[0] == file.read_bytes()
    assert journal.saved["upload"] != expired["upload"]


def test_an_upload_that_expires_while_it_is_sent_begins_anew_once(supabase, tmp_path):
    file, journal = made(tmp_path, 3 * CHUNK), Journal()
    patched = "PATCH"

    def expire_after_first_chunk() -> bool:
        if sum(line.startswith(patched) for line in supabase.shelf.seen) == 1:
            supabase.shelf.expire_uploads()
        return False

    put(supabase.store(), file, journal, should_stop=expire_after_first_chunk)

    assert supabase.content(KEY)[0] == file.read_bytes()
    assert journal.saves == 2


def test_an_upload_that_is_lost_again_and_again_is_given_back_to_the_caller(supabase, tmp_path):
    def expire() -> bool:
        supabase.shelf.expire_uploads()
        return False

    journal = Journal()
    with pytest.raises(StoreUnavailable, match=r"lost the upload of 0\.png twice"):
        put(supabase.store(), made(tmp_path, 3 * CHUNK), journal, should_stop=expire)

    assert journal.saves == 2


@pytest.mark.parametrize("before", [None, 100, CHUNK + 5])
def test_an_upload_that_supabase_has_but_did_not_finish_begins_anew(supabase, tmp_path, before):
    """All bytes were taken and no object was made of them; there may be one of an earlier file."""
    file, journal = made(tmp_path, 2 * CHUNK), Journal()
    if before is not None:
        put(supabase.store(), made(tmp_path, before))
    supabase.shelf.finishing_fails = True
    with pytest.raises(StoreUnavailable, match="answered 500"):
        put(supabase.store(), file, journal)
    assert supabase.keys() == ([] if before is None else [KEY])

    put(supabase.store(), file, journal)

    assert supabase.content(KEY)[0] == file.read_bytes()
    assert journal.saves == 2


def test_another_request_that_got_further_is_followed(supabase, tmp_path):
    """An answer was lost and the request before it took effect later: the offset is 409."""
    file, journal = made(tmp_path, 3 * CHUNK), Journal()
    taken = file.read_bytes()[:150_000]

    def other_request() -> bool:
        for upload in supabase.shelf.uploads.values():
            if not upload.content:
                upload.content += taken
        return False

    put(supabase.store(), file, journal, should_stop=other_request)

    assert supabase.content(KEY)[0] == file.read_bytes()
    assert supabase.shelf.accepted_bytes == 3 * CHUNK - len(taken)


def test_a_server_that_takes_nothing_ends_the_try(scripted, tmp_path):
    answers = {"POST": (201, {"Location": "/x/1"}), "PATCH": (204, {"Upload-Offset": "0"})}
    scripted.answer = lambda: Response("", *answers[request.method])
    store = SupabaseStore(scripted.url, "key", resumable_from_bytes=1)

    with pytest.raises(StoreUnavailable, match=r"has 0 bytes of 0\.png"):
        put(store, made(tmp_path, 10))

    assert [method for method, _ in scripted.seen] == ["POST", "PATCH"]


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ({"POST": (201, {})}, StoreRefused),
        ({"POST": (201, {"Location": "/x/1"}), "PATCH": (204, {})}, StoreUnavailable),
        ({"POST": (201, {"Location": "/x/1"}), "PATCH": (423, {})}, StoreUnavailable),
        ({"POST": (201, {"Location": "/x/1"}), "PATCH": (403, {})}, StoreRefused),
    ],
)
def test_answers_of_tus_that_lack_something_are_errors(scripted, tmp_path, answers, error):
    scripted.answer = lambda: Response("", *answers[request.method])
    store = SupabaseStore(scripted.url, "key", resumable_from_bytes=1)

    with pytest.raises(error):
        put(store, made(tmp_path, 10))


def test_the_key_goes_only_to_the_address_that_was_set(scripted, supabase, tmp_path):
    """The address of an upload names another host, and so may a redirect."""
    answers = {
        "POST": (201, {"Location": f"{supabase.url}/storage/v1/upload/resumable/abc"}),
        "PATCH": (204, {"Upload-Offset": "10"}),
    }
    scripted.answer = lambda: Response("", *answers[request.method])
    put(SupabaseStore(scripted.url, "key", resumable_from_bytes=1), made(tmp_path, 10))
    scripted.answer = lambda: Response("", 307, {"Location": f"{supabase.url}/x"})

    with pytest.raises(StoreRefused, match="answered 307"):
        put(SupabaseStore(scripted.url, "key"), made(tmp_path, 10))

    assert scripted.seen[1] == ("PATCH", "/storage/v1/upload/resumable/abc?")
    assert supabase.shelf.seen == []


def test_a_file_that_changed_is_not_mixed_with_what_was_sent_before(place, tmp_path):
    """The job was made again, with other bytes of the same length."""
    first, second = made(tmp_path, place.large), made(tmp_path, place.large, seed=2)
    journal = Journal()
    with pytest.raises(Cancelled):
        put(place.store(), first, journal, should_stop=stopping_after(3))

    put(place.store(), second, journal)

    assert place.content(KEY)[0] == second.read_bytes()


def test_only_the_parts_that_changed_go_to_s3_again(s3, tmp_path):
    file, journal = made(tmp_path, 2 * PART), Journal()
    with pytest.raises(Cancelled):
        put(s3.store(), file, journal, should_stop=stopping_after(3))
    with file.open("r+b") as content:
        content.write(bytes(1000))
    with cutting_proxy(s3.url) as proxy:
        put(s3.store(proxy.url), file, journal)
        sent = sum(proxy.sent)

    assert s3.content(KEY)[0] == file.read_bytes()
    assert PART < sent < 1.1 * PART


@pytest.mark.parametrize(
    "saved",
    [
        {"store": "supabase", "upload": "x"},
        {"store": "s3", "upload_id": "x", "part_bytes": PART},
        {"store": "other"},
        {"upload": None, "upload_id": None},
    ],
)
def test_what_another_upload_saved_is_left_aside(place, tmp_path, saved):
    file = made(tmp_path, CHUNK)

    place.store().put(KEY, file, "image/png", saved, lambda _saved: None)

    assert place.content(KEY)[0] == file.read_bytes()


@pytest.mark.parametrize("known", [True, False])
def test_an_upload_id_that_s3_does_not_know_any_more_begins_anew(s3, tmp_path, known):
    file, journal = made(tmp_path, 2 * PART), Journal()
    with pytest.raises(Cancelled):
        put(s3.store(), file, journal, should_stop=stopping_after(2))
    saved = journal.saved
    if known:
        s3.client.abort_multipart_upload(Bucket=s3.bucket, Key=KEY, UploadId=saved["upload_id"])
    else:
        journal.save(saved | {"upload_id": "never-given"})

    put(s3.store(), file, journal)

    assert s3.content(KEY)[0] == file.read_bytes()
    assert journal.saved["upload_id"] != saved["upload_id"]


def test_an_upload_that_is_removed_while_it_is_sent_is_tried_again(s3, tmp_path):
    file, journal = made(tmp_path, CHUNK), Journal()

    def remove() -> bool:
        if journal.saves == 1:
            upload_id = journal.saved["upload_id"]
            s3.client.abort_multipart_upload(Bucket=s3.bucket, Key=KEY, UploadId=upload_id)
            journal.saves = 9
        return False

    # moto says 500 where S3 says NoSuchUpload, which another test has.
    with pytest.raises(StoreUnavailable):
        put(s3.store(), file, journal, should_stop=remove)
    put(s3.store(), file, journal)

    assert s3.content(KEY)[0] == file.read_bytes()


def test_parts_keep_the_size_with_which_their_upload_began(s3, tmp_path):
    file, journal = made(tmp_path, 3 * PART), Journal()
    with pytest.raises(Cancelled):
        put(s3.store(), file, journal, should_stop=stopping_after(3))
    with cutting_proxy(s3.url) as proxy:
        put(s3.store(proxy.url, part_bytes=PART + 1), file, journal)
        sent = sum(proxy.sent)

    assert s3.content(KEY)[0] == file.read_bytes()
    assert sent < 1.1 * PART


# --- refusals and troubles --------------------------------------------------------------------


def test_the_stand_in_answers_as_supabase_does(supabase):
    address = f"{supabase.url}/storage/v1/object/{BUCKET}/a.png"
    headers = {"Authorization": f"Bearer {supabase.shelf.service_key}"}
    supabase.shelf.limit_bytes = 5

    def post(url: str, **more: Any) -> httpx.Response:
        return httpx.post(url, **{"headers": headers, "content": b"x"} | more, trust_env=False)

    first, again = post(address), post(address)
    nowhere, large = post(address.replace(BUCKET, "nowhere")), post(address, content=b"x" * 6)
    wrong = post(address, headers={"Authorization": "Bearer wrong"})
    tus = {"Upload-Length": "6", "Upload-Metadata": f"bucketName {_64(BUCKET)},objectName eA=="}
    too_large = post(f"{supabase.url}/storage/v1/upload/resumable", headers=headers | tus)

    assert (first.status_code, wrong.status_code, too_large.status_code) == (200, 401, 413)
    assert [answer.status_code for answer in (again, nowhere, large)] == [400, 400, 400]
    meant = [(answer.json()["statusCode"], answer.json()["error"]) for answer in (again, large)]
    assert meant == [("409", "Duplicate"), ("413", "Payload too large")]
    assert nowhere.json()["statusCode"] == "404"


def _64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize("size", [10, CHUNK])
def test_supabase_says_why_it_refuses(supabase, tmp_path, size):
    file, shelf = made(tmp_path, size), supabase.shelf

    with pytest.raises(StoreRefused, match=r"supabase answered 401 for 0\.png \(Invalid auth"):
        put(SupabaseStore(supabase.url, "wrong", resumable_from_bytes=CHUNK), file)
    with pytest.raises(StoreRefused, match=r"answered 404 for 0\.png \(Bucket not found"):
        put(supabase.store(bucket="nowhere"), file)
    shelf.limit_bytes = size - 1
    with pytest.raises(StoreRefused, match=r"answered 413 for 0\.png \("):
        put(supabase.store(), file)

    assert supabase.keys() == []


def test_s3_says_why_it_refuses(s3, tmp_path):
    for size in (10, CHUNK):
        with pytest.raises(StoreRefused, match=r"s3 answered 404 for 0\.png \(NoSuchBucket"):
            put(s3.store(bucket="nowhere"), made(tmp_path, size))
    with pytest.raises(StoreRefused, match="look at the name of the bucket"):
        put(s3.store(bucket="no bucket"), made(tmp_path, 10))


@cache
def scripted_store(kind: str, url: str) -> Any:
    if kind == "s3":
        return S3Store("bucket", url, access_key=ACCESS_KEY, secret_key=SECRET_KEY)
    return SupabaseStore(url, "a-service-key")


@pytest.mark.parametrize("kind", ["supabase", "s3"])
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, StoreRefused),
        (401, StoreRefused),
        (403, StoreRefused),
        (404, StoreRefused),
        (413, StoreRefused),
        (415, StoreRefused),
        (408, StoreUnavailable),
        (409, StoreUnavailable),
        (423, StoreUnavailable),
        (429, StoreUnavailable),
        (500, StoreUnavailable),
        (502, StoreUnavailable),
        (503, StoreUnavailable),
        (544, StoreUnavailable),
    ],
)
def test_a_status_says_who_has_to_act(scripted, tmp_path, kind, status, error):
    scripted.answer = lambda: Response("<html>no</html>", status, {"Retry-After": "7"})

    with pytest.raises(error, match=f"{kind} answered {status} ") as caught:
        put(scripted_store(kind, scripted.url), made(tmp_path, 10))

    assert len(scripted.seen) == 1  # the caller has the backoff
    assert caught.value.retry_after_s == (7.0 if error is StoreUnavailable else None)
    assert not has_trap_word(str(caught.value))


@pytest.mark.parametrize(
    ("meant", "error"), [("404", StoreRefused), ("544", StoreUnavailable), ("x", StoreRefused)]
)
def test_the_status_in_the_body_of_a_400_is_the_one_that_counts(scripted, tmp_path, meant, error):
    body = json.dumps({"statusCode": meant, "error": "DatabaseTimeout", "message": "timed out"})
    scripted.answer = lambda: Response(body, 400)

    with pytest.raises(error, match=r"DatabaseTimeout: timed out"):
        put(scripted_store("supabase", scripted.url), made(tmp_path, 10))


def s3_error(code: str, message: str = "Because.") -> str:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (403, "InvalidAccessKeyId", StoreRefused),
        (403, "SignatureDoesNotMatch", StoreRefused),
        (403, "AccessDenied", StoreRefused),
        (400, "EntityTooLarge", StoreRefused),
        (400, "RequestTimeout", StoreUnavailable),
        (400, "BadDigest", StoreUnavailable),
        (404, "NoSuchUpload", StoreUnavailable),
        (503, "SlowDown", StoreUnavailable),
    ],
)
def test_codes_of_s3_say_who_has_to_act(scripted, tmp_path, status, code, error):
    scripted.answer = lambda: Response(s3_error(code), status, mimetype="application/xml")

    with pytest.raises(error, match=f"{code}: Because"):
        put(scripted_store("s3", scripted.url), made(tmp_path, 10))

    assert len(scripted.seen) == 1


def test_an_error_inside_a_200_of_s3_is_no_success(scripted, tmp_path):
    """Joining parts begins its answer before it is done, and may end it with an error."""

    def answer() -> Response:
        if request.method == "PUT":
            etag = hashlib.md5(request.get_data()).hexdigest()
            return Response("", 200, {"ETag": f'"{etag}"'})
        if "uploads" in request.args:
            begun = "<InitiateMultipartUploadResult><UploadId>1</UploadId>"
            return Response(begun + "</InitiateMultipartUploadResult>", 200)
        return Response(s3_error("InternalError"), 200)

    scripted.answer = answer
    store = S3Store("bucket", scripted.url, None, "", "id", "secret", PART, PART)

    with pytest.raises(StoreUnavailable, match="InternalError"):
        put(store, made(tmp_path, PART + 1))

    # Each part is guarded by its MD5.
    assert [method for method, _ in scripted.seen] == ["POST", "PUT", "PUT", "POST"]
    for index in (1, 2):
        assert scripted.headers[index]["Content-Md5"] == _md5(scripted.bodies[index])


def test_a_small_file_for_s3_is_guarded_by_its_md5(scripted, tmp_path):
    scripted.answer = lambda: Response("", 200, {"ETag": '"x"'})

    put(scripted_store("s3", scripted.url), made(tmp_path, 1000))

    [headers], [body] = scripted.headers, scripted.bodies
    assert headers["Content-Md5"] == _md5(body)
    assert body == made(tmp_path, 1000).read_bytes()


def test_without_an_address_s3_is_the_one_of_aws(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")

    store = S3Store("bucket", region="eu-west-1", access_key="id", secret_key="secret")

    assert store._client.meta.endpoint_url == "https://s3.eu-west-1.amazonaws.com"


def _md5(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content).digest()).decode()


@pytest.mark.parametrize("kind", ["supabase", "s3"])
def test_a_store_that_is_not_there_is_unavailable(tmp_path, kind):
    with cutting_proxy("http://127.0.0.1:9") as proxy:
        gone = proxy.url

    with pytest.raises(StoreUnavailable, match=r"gave no answer for 0\.png") as caught:
        put(scripted_store(kind, gone), made(tmp_path, 10))

    assert not has_trap_word(str(caught.value))


def test_an_upload_that_takes_too_long_is_given_back_to_the_caller(supabase, tmp_path):
    ticks = iter([0.0, 1.0, 60.5, 61.6])
    store = supabase.store(resumable_from_bytes=10**6, clock=lambda: next(ticks))
    file = made(tmp_path, 200_000)

    with pytest.raises(StoreUnavailable, match=r"took 131072 of 200000 bytes of 0\.png"):
        put(store, file)

    assert supabase.keys() == []


def test_time_is_allowed_by_type_and_size():
    assert allowed_s(0, "image/png") == 60.0
    assert allowed_s(0, "video/mp4") == 180.0
    assert allowed_s(6 << 20, "video/mp4") == 228.0


def test_a_file_that_becomes_shorter_is_an_error_of_the_file(place, tmp_path):
    file = made(tmp_path, place.large)
    asked: list[int] = []

    def shorten() -> bool:
        asked.append(1)
        with file.open("r+b") as content:
            content.truncate(10)
        return False

    with pytest.raises(OSError, match="became shorter"):
        put(place.store(), file, should_stop=shorten)

    assert place.keys() == []
    assert asked


@pytest.mark.parametrize("kind", ["supabase", "s3"])
def test_a_file_that_is_not_there_is_an_error_of_the_file(tmp_path, kind):
    with pytest.raises(FileNotFoundError):
        put(scripted_store(kind, "http://127.0.0.1:9"), tmp_path / "nothing")


def test_retry_after_is_read_as_seconds_or_as_a_date():
    now = 1_800_000_000.0

    assert retry_after_s("12", now) == 12.0
    assert retry_after_s(formatdate(now + 90, usegmt=True), now) == 90.0
    assert retry_after_s(formatdate(now - 90, usegmt=True), now) == 0.0
    assert retry_after_s("9" * 400, now) == MAX_RETRY_AFTER_S
    assert [retry_after_s(bad, now) for bad in (None, "", "soon", "-1", "nan", "²")] == [None] * 6


# --- secrets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["supabase", "s3"])
@pytest.mark.parametrize("status", [400, 401, 503])
def test_no_secret_is_in_a_message_or_in_the_log(scripted, tmp_path, caplog, kind, status):
    """The server repeats all that it was sent, in its body and its headers."""
    caplog.set_level(logging.INFO)
    secrets = {"supabase": ["a-service-key"], "s3": [SECRET_KEY, ACCESS_KEY]}[kind]

    def echo() -> Response:
        told = " ".join(secrets) + f" {dict(request.headers)}"
        body = s3_error("X", told.replace("<", "")) if kind == "s3" else told
        return Response(body, status)

    scripted.answer = echo
    with pytest.raises((StoreRefused, StoreUnavailable)) as caught:
        put(scripted_store(kind, scripted.url), made(tmp_path, 10))
    try:
        raise caught.value
    except Exception:
        logging.getLogger("caller").exception("an upload failed")

    assert "***" in str(caught.value)
    for secret in secrets:
        assert secret not in str(caught.value)
        assert secret not in caplog.text
        assert secret not in repr(caught.value)


@pytest.mark.parametrize("size", [10, CHUNK])
def test_what_libraries_log_of_an_upload_has_no_secret(place, tmp_path, caplog, size):
    caplog.set_level(logging.DEBUG)

    put(place.store(), made(tmp_path, size))

    assert caplog.records
    for secret in ("a-service-key-for-tests", SECRET_KEY):
        assert secret not in caplog.text


def test_a_message_repeats_little_of_an_answer(scripted, tmp_path):
    scripted.answer = lambda: Response("\x1b[31m\x00" + "é\n\t" * 5000, 403)

    with pytest.raises(StoreRefused) as caught:
        put(scripted_store("supabase", scripted.url), made(tmp_path, 10))

    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("word", ["under Maintenance: more INFormation", "banana"])
@pytest.mark.parametrize("kind", ["supabase", "s3"])
def test_words_that_clients_misread_are_not_repeated(scripted, tmp_path, kind, word):
    body = s3_error("X", word) if kind == "s3" else word
    scripted.answer = lambda: Response(body, 403)

    with pytest.raises(StoreRefused) as caught:
        scripted_store(kind, scripted.url).put(
            "user/job/banana.png", made(tmp_path, 10), "image/png", {}, lambda _saved: None
        )

    assert not has_trap_word(str(caught.value))
    assert f"{kind} answered 403 for a file" in str(caught.value)


# --- settings ---------------------------------------------------------------------------------

S3_ENV = {
    "S3_BUCKET": "bucket",
    "S3_ENDPOINT_URL": "http://127.0.0.1:9",
    "S3_ACCESS_KEY_ID": "an-id",
    "S3_SECRET_ACCESS_KEY": "a-secret",
}
SUPABASE_ENV = {"SUPABASE_URL": "https://x.example", "SUPABASE_SERVICE_KEY": "a-service-key"}


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({}, None),
        ({"HOME": "/root", "SUPABASE_URL": " ", "S3_BUCKET": "", "STORE": ""}, None),
        (S3_ENV, "s3"),
        (without(S3_ENV, "S3_ENDPOINT_URL"), "s3"),
        (SUPABASE_ENV, "supabase"),
        ({"SUPABASE_URL": "http://x/", "SUPABASE_SERVICE_ROLE_KEY": "k"}, "supabase"),
        (S3_ENV | SUPABASE_ENV | {"STORE": "s3"}, "s3"),
        (S3_ENV | SUPABASE_ENV | {"STORE": " supabase\n"}, "supabase"),
        (SUPABASE_ENV | {"S3_BUCKET": "half", "STORE": "supabase"}, "supabase"),
    ],
)
def test_the_environment_names_the_store(env, name):
    store = store_from_environment(env)

    assert (store and store.name) == name


@pytest.mark.parametrize(
    ("env", "named"),
    [
        (without(S3_ENV, "S3_BUCKET"), "S3_BUCKET"),
        (without(S3_ENV, "S3_ACCESS_KEY_ID"), "S3_ACCESS_KEY_ID"),
        (without(S3_ENV, "S3_SECRET_ACCESS_KEY"), "S3_SECRET_ACCESS_KEY"),
        ({"SUPABASE_URL": "https://x"}, "SUPABASE_SERVICE_KEY or SUPABASE_SERVICE_ROLE_KEY"),
        ({"SUPABASE_SERVICE_ROLE_KEY": "k"}, "SUPABASE_URL"),
        ({"STORE": "s3"}, "S3_BUCKET, S3_ACCESS_KEY_ID, S3_SECRET_ACCESS_KEY"),
        (S3_ENV | {"STORE": "supabase"}, "SUPABASE_URL"),
        (S3_ENV | SUPABASE_ENV, "set STORE to s3 or supabase"),
        (S3_ENV | {"STORE": "gcs"}, "STORE must be s3 or supabase"),
        (SUPABASE_ENV | {"SUPABASE_URL": "x.example"}, "address of Supabase"),
        (SUPABASE_ENV | {"SUPABASE_URL": "https://u:a-service-key@x"}, "address of Supabase"),
        (SUPABASE_ENV | {"SUPABASE_URL": "http://[a-service-key"}, "address of Supabase"),
        (SUPABASE_ENV | {"SUPABASE_SERVICE_KEY": "a-service-key\nx"}, "service key of Supabase"),
        (SUPABASE_ENV | {"SUPABASE_BUCKET": "a/b"}, "bucket of Supabase"),
        (S3_ENV | {"S3_ENDPOINT_URL": "s3.example"}, "address of S3"),
        (S3_ENV | {"S3_SECRET_ACCESS_KEY": "a-secret\x00"}, "secret key of S3"),
        (S3_ENV | {"S3_BUCKET": "a/b"}, "S3 bucket"),
        (S3_ENV | {"S3_REGION": "not a region!"}, "no S3 client can be made"),
    ],
)
def test_half_of_a_configuration_is_refused_with_what_is_missing(env, named):
    with pytest.raises(ConfigError, match=named) as caught:
        store_from_environment(env)

    assert not any(secret in str(caught.value) for secret in ("a-secret", "a-service-key", "an-id"))
    assert not has_trap_word(str(caught.value))


def test_the_bucket_of_supabase_and_the_folder_of_s3_come_from_the_environment(
    supabase, s3, tmp_path
):
    supabase.shelf.buckets.add("other")
    values = {"SUPABASE_URL": f" {supabase.url}/ ", "SUPABASE_BUCKET": "other"}
    key = {"SUPABASE_SERVICE_ROLE_KEY": f"{supabase.shelf.service_key}\n"}
    folder = {"S3_BUCKET": s3.bucket, "S3_ENDPOINT_URL": s3.url, "S3_PREFIX": "a/b/"}

    put(store_from_environment(values | key), made(tmp_path, 10))
    put(store_from_environment(S3_ENV | folder), made(tmp_path, 10))

    assert list(supabase.shelf.objects) == [("other", KEY)]
    assert s3.keys() == [f"a/b/{KEY}"]


@pytest.mark.parametrize(
    "changes",
    [
        {"part_bytes": PART - 1},
        {"multipart_from_bytes": 0},
        {"access_key": "id"},
        {"secret_key": "secret"},
        {"bucket": ""},
    ],
)
def test_settings_of_s3_that_cannot_be_right_are_refused(changes):
    with pytest.raises(ConfigError):
        S3Store(**{"bucket": "bucket"} | changes)


@pytest.mark.parametrize("changes", [{"chunk_bytes": 0}, {"resumable_from_bytes": 0}])
def test_settings_of_supabase_that_cannot_be_right_are_refused(changes):
    with pytest.raises(ConfigError):
        SupabaseStore("http://x", "k", **changes)
