"""Which queues the environment asks for, and what this worker is called on them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from worker.errors import ConfigError, has_trap_word
from worker.queues.configured import NAME_FILE, queues_from_environment, worker_name
from worker.queues.queue import WORKER_NAME
from worker.queues.redis_queue import RedisQueue
from worker.queues.upstash_queue import UpstashQueue

REDIS = {"REDIS_URL": "redis://:secret@localhost:6379/0"}
UPSTASH = {
    "UPSTASH_REDIS_REST_URL": "https://host.example",
    "UPSTASH_REDIS_REST_TOKEN": "secret",
}
LISTS = ("sdxl_queue", "wan_queue")


@pytest.mark.parametrize(
    ("env", "kind"),
    [
        (REDIS, RedisQueue),
        (UPSTASH, UpstashQueue),
        (REDIS | {"UPSTASH_REDIS_REST_URL": "", "UPSTASH_REDIS_REST_TOKEN": " "}, RedisQueue),
        (UPSTASH | {"REDIS_URL": ""}, UpstashQueue),
        (REDIS | UPSTASH | {"VERBATIM_QUEUE": "redis"}, RedisQueue),
        (REDIS | UPSTASH | {"VERBATIM_QUEUE": " upstash\n"}, UpstashQueue),
        (REDIS | {"UPSTASH_REDIS_REST_URL": "x", "VERBATIM_QUEUE": "redis"}, RedisQueue),
        ({"REDIS_URL": "rediss://host"}, RedisQueue),
        ({"REDIS_URL": "unix:///run/redis.sock\n"}, RedisQueue),
    ],
)
def test_each_list_is_a_queue_on_the_server_of_the_environment(
    env: dict[str, str], kind: type
) -> None:
    queues = queues_from_environment(env, LISTS, "pod-1")

    assert [type(queue) for queue in queues] == [kind, kind]
    assert [queue.name for queue in queues] == list(LISTS)
    for queue in queues:
        queue.close()


@pytest.mark.parametrize("env", [{}, {"REDIS_URL": ""}, {"VERBATIM_QUEUE": ""}, {"HOME": "/"}])
def test_an_environment_without_a_server_means_no_queues(env: dict[str, str]) -> None:
    assert queues_from_environment(env, LISTS, "pod-1") == []


def test_a_server_without_lists_means_no_queues() -> None:
    assert queues_from_environment(REDIS, (), "pod-1") == []


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"UPSTASH_REDIS_REST_URL": "https://h"}, "needs UPSTASH_REDIS_REST_TOKEN to be set"),
        ({"UPSTASH_REDIS_REST_TOKEN": "secret"}, "needs UPSTASH_REDIS_REST_URL to be set"),
        ({"VERBATIM_QUEUE": "redis"}, "needs REDIS_URL to be set"),
        (UPSTASH | {"VERBATIM_QUEUE": "redis"}, "needs REDIS_URL to be set"),
        (
            REDIS | {"VERBATIM_QUEUE": "upstash"},
            "needs UPSTASH_REDIS_REST_URL and UPSTASH_REDIS_REST_TOKEN to be set",
        ),
        (REDIS | UPSTASH, "set VERBATIM_QUEUE to redis or upstash"),
        (REDIS | {"UPSTASH_REDIS_REST_TOKEN": "secret"}, "set VERBATIM_QUEUE to redis or upstash"),
        (REDIS | {"VERBATIM_QUEUE": "secret"}, "VERBATIM_QUEUE must be redis or upstash"),
        ({"REDIS_URL": "https://:secret@host"}, "REDIS_URL must begin with"),
        (UPSTASH | {"UPSTASH_REDIS_REST_URL": "secret"}, "UPSTASH_REDIS_REST_URL must be"),
    ],
)
def test_settings_that_name_no_one_server_are_refused(env: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        queues_from_environment(env, LISTS, "pod-1")

    message = str(caught.value)
    assert said in message
    assert "secret" not in message
    assert not has_trap_word(message)


def test_a_list_named_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="named twice"):
        queues_from_environment(REDIS, ("wan_queue", "wan_queue"), "pod-1")


# --- the worker's name -------------------------------------------------------------------------


def test_a_name_tells_its_pod_and_stays_with_the_folder(tmp_path: Path) -> None:
    name = worker_name({"RUNPOD_POD_ID": "abc123"}, tmp_path / "state")

    assert name.startswith("abc123-")
    assert worker_name({"RUNPOD_POD_ID": "another"}, tmp_path / "state") == name
    assert worker_name({"RUNPOD_POD_ID": "abc123"}, tmp_path / "other") != name


@pytest.mark.parametrize("pod_id", [None, "", " ", "a b", "a:b", "x" * 65, "ü"])
def test_without_a_pods_id_the_name_is_made_up_and_kept(tmp_path: Path, pod_id: str | None) -> None:
    env = {} if pod_id is None else {"RUNPOD_POD_ID": pod_id}
    state_dir = tmp_path / "state"

    first = worker_name(env, state_dir)
    second = worker_name(env, state_dir)

    assert first == second
    assert WORKER_NAME.fullmatch(first)
    assert [path.name for path in state_dir.iterdir()] == [NAME_FILE]


def test_two_state_directories_have_two_names(tmp_path: Path) -> None:
    assert worker_name({}, tmp_path / "a") != worker_name({}, tmp_path / "b")


def test_processes_that_start_at_once_agree_on_the_name(tmp_path: Path) -> None:
    names: list[str] = []
    gate = threading.Barrier(8)

    def start() -> None:
        gate.wait()
        names.append(worker_name({}, tmp_path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(names) == 8
    assert len(set(names)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [NAME_FILE]


@pytest.mark.parametrize("content", [b"", b"\n", b"a b\n", b"\xff", b"one\ntwo\n", b"x" * 100])
def test_a_file_that_holds_no_name_is_refused_with_the_cure(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME_FILE).write_bytes(content)

    with pytest.raises(ConfigError, match="remove it for a new one"):
        worker_name({}, tmp_path)

    assert (tmp_path / NAME_FILE).read_bytes() == content


def test_a_directory_that_cannot_be_written_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")

    with pytest.raises(ConfigError, match=r"state/worker-name: "):
        worker_name({}, tmp_path / "state")
