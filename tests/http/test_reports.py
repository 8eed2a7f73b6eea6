"""What the ports say of themselves: health, capabilities, memory, metrics."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import BASE, CHAT_MODELS, IMAGE, INSTRUCT, MEDIA_MODELS, VIDEO
from tests.fakes import ChatPort, MediaPort, fails, says, stays_silent
from tests.http.answers import ASK, free_of_traps, refused, retry_after
from worker import __version__
from worker.front import chat as chat_module
from worker.front import memory as memory_module
from worker.front.app import places
from worker.protocol.messages import EngineNotice, LoadModel, ModelChanged, ModelState, UnloadModel


@pytest.fixture(params=["chat", "media"])
def port(request: pytest.FixtureRequest) -> ChatPort:
    """Each of the two ports."""
    port: ChatPort = request.getfixturevalue(request.param)
    return port


def engine_of(port: ChatPort) -> Any:
    """The link to the engine that the port reports about."""
    return port.media if isinstance(port, MediaPort) else port.link


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    match value:
        case dict():
            for key, one in value.items():
                yield key
                yield from strings(one)
        case list():
            for one in value:
                yield from strings(one)
        case str():
            yield value


# --- /health -------------------------------------------------------------------------------------


def test_health_of_the_chat_port_has_the_keys_of_the_contract(chat: ChatPort) -> None:
    answer = chat.client.get("/health")

    body = answer.get_json()
    assert answer.status_code == 200
    assert body["status"] == "healthy"
    assert body["model_loaded"] is True
    assert body["uptime"] >= 0
    assert body["worker_type"] == "pure_inference_engine"
    assert body["no_hardcoded_prompts"] is True
    assert body["version"] == __version__
    assert body["stats"] == {
        "requests_served": 3,
        "model_loads": 1,
        "model_unloads": 0,
        "startup_time": body["stats"]["startup_time"],
        "sfw_requests": 0,
        "base_model_uses": 0,
        "instruct_model_uses": 0,
    }
    assert body["timestamp"] >= body["stats"]["startup_time"] > 1.7e9


def test_health_of_the_media_port_has_the_keys_of_the_contract(media: MediaPort) -> None:
    body = media.client.get("/health").get_json()

    assert body["status"] == "healthy"
    assert body["model_loaded"] is True
    assert body["sdxl_model_loaded"] is True
    assert body["wan_model_loaded"] is False
    assert body["worker_ready"] is True
    assert body["device"] == "cpu"
    assert body["timestamp"] > 1.7e9
    assert body["stats"]["jobs_queued"] == 0


def test_health_names_every_route_in_an_array(port: ChatPort) -> None:
    body = port.client.get("/health").get_json()

    assert isinstance(body["endpoints"], list)
    assert "/generate" in body["endpoints"]
    assert "/health" in body["endpoints"]
    assert len(set(body["endpoints"])) == len(body["endpoints"])
    assert not any("<" in endpoint for endpoint in body["endpoints"])


def test_health_says_that_nothing_is_added_to_prompts(port: ChatPort) -> None:
    capabilities = port.client.get("/health").get_json()["capabilities"]

    assert capabilities["pure_inference"] is True
    assert capabilities["hardcoded_prompts"] is False
    assert capabilities["prompt_modification"] is False


def test_the_media_port_names_its_routes_with_their_parameters(media: MediaPort) -> None:
    endpoints = media.client.get("/health").get_json()["endpoints"]

    assert "/jobs/{job_id}/assets/{index}" in endpoints


@pytest.mark.parametrize("status", ["starting", "loading"])
def test_an_engine_that_is_getting_ready_is_no_reason_to_drop_the_worker(
    port: ChatPort, status: str
) -> None:
    engine_of(port).reports(status=status)

    answer = port.client.get("/health")

    assert answer.status_code == 200
    assert answer.get_json()["status"] == status
    assert answer.get_json()["endpoints"]


def test_an_engine_that_was_not_seen_yet_is_starting(port: ChatPort) -> None:
    engine_of(port).goes_away()

    answer = port.client.get("/health")

    body = answer.get_json()
    assert answer.status_code == 200
    assert body["status"] == "starting"
    assert body["model_loaded"] is False
    assert body["device"] is None
    assert body["stats"]["requests_served"] == 0


def broken(model: ModelState, problem: str) -> ModelState:
    return msgspec.structs.replace(model, status="broken", problem=problem)


def test_one_broken_model_of_two_is_degraded_and_says_which(chat: ChatPort) -> None:
    problem = "models/tiny-chat has no config.json"
    chat.link.reports(models=(CHAT_MODELS[0], broken(CHAT_MODELS[1], problem)))

    answer = chat.client.get("/health")

    assert answer.status_code == 200
    assert answer.get_json()["status"] == "degraded"
    assert answer.get_json()["problems"] == [problem]


def test_nothing_but_broken_models_is_unavailable(chat: ChatPort) -> None:
    chat.link.reports(models=tuple(broken(model, "no file x") for model in CHAT_MODELS))

    answer = chat.client.get("/health")

    body = answer.get_json()
    assert answer.status_code == 503
    assert body["status"] == "unavailable"
    assert body["success"] is False
    assert body["error_code"] == "health_unavailable"
    assert "no file x" in body["error"]
    assert body["request_id"] == answer.headers["X-Request-Id"]


@pytest.mark.parametrize(("next_try_s", "after"), [(30.0, 30), (0.2, 1), (None, None)])
def test_an_engine_that_is_down_is_unavailable_with_when_it_is_tried_again(
    port: ChatPort, next_try_s: float | None, after: int | None
) -> None:
    link = engine_of(port)
    link.goes_away(EngineNotice(name=link.view.name, cause="signal 11", next_try_s=next_try_s))

    answer = port.client.get("/health")

    body = answer.get_json()
    assert answer.status_code == 503
    assert body["status"] == "unavailable"
    assert "signal 11" in body["error"]
    assert body["next_try_s"] == next_try_s
    assert ("Retry-After" in answer.headers) == (after is not None)
    assert after is None or retry_after(answer) == after


def test_a_draining_port_says_so_and_when_it_is_gone(port: ChatPort) -> None:
    port.drainer.begin(20.0)

    answer = port.client.get("/health")

    assert answer.status_code == 503
    assert answer.get_json()["status"] == "draining"
    assert answer.get_json()["success"] is False
    assert 19 <= retry_after(answer) <= 20


@pytest.mark.parametrize("words", ["logits are inf", "NaN", "in /opt/finance/model"])
def test_an_unhealthy_answer_never_holds_a_word_that_a_client_misreads(
    port: ChatPort, words: str
) -> None:
    link = engine_of(port)
    link.goes_away(EngineNotice(name=link.view.name, cause=words, next_try_s=3))

    answer = port.client.get("/health")

    assert answer.status_code == 503
    assert free_of_traps(answer.data)
    assert answer.get_json()["status"] == "unavailable"


def test_an_engine_that_does_not_answer_holds_up_no_report(port: ChatPort) -> None:
    engine_of(port).plays(stays_silent, stays_silent)
    slots = [port.admission.enter() for _ in range(places(port.settings))]

    statuses = [
        port.client.get(path).status_code
        for path in ("/health", "/worker/info", "/memory/status", "/metrics")
    ]

    for slot in slots:
        slot.leave(served=False)
    assert statuses == [200] * 4
    assert engine_of(port).sent == []


# --- /worker/info and /status --------------------------------------------------------------------


def test_info_of_the_chat_port_has_the_keys_of_the_contract(chat: ChatPort) -> None:
    body = chat.client.get("/worker/info").get_json()

    assert body["worker_type"] == "pure_inference_engine"
    assert body["model"] == "Tiny Instruct"
    assert body["capabilities"] == {
        "chat": True,
        "enhancement": True,
        "generation": True,
        "hardcoded_prompts": False,
        "prompt_modification": False,
        "pure_inference": True,
    }
    assert body["models_loaded"] == {
        "instruct_loaded": True,
        "base_loaded": False,
        "active_model_type": "instruct",
    }
    assert body["model_loaded"] is True
    assert body["stats"]["requests_served"] == 3
    assert "/chat" in body["endpoints"]
    assert body["message_format"]["required"] == ["messages"]


def test_info_names_only_parameters_that_are_honoured(chat: ChatPort) -> None:
    known = chat.client.get("/worker/info").get_json()["message_format"]
    body = known["example"] | dict.fromkeys(known["optional"])

    answer = chat.client.post("/chat", json=known["example"])
    ignored = chat.client.post("/chat", json=body).get_json()["receipt"]["ignored"]

    assert answer.status_code == 200
    assert set(known["optional"]) >= {"max_tokens", "temperature", "top_p", "sfw_mode", "model"}
    assert ignored == []


def test_info_lists_models_with_their_state_and_details(chat: ChatPort) -> None:
    instruct, base = chat.client.get("/worker/info").get_json()["models"]

    assert instruct["id"] == INSTRUCT
    assert instruct["status"] == "loaded"
    assert instruct["aliases"] == ["qwen_instruct", "Qwen/Qwen2.5-7B-Instruct"]
    assert instruct["weight_bytes"] == 1000
    assert instruct["context_tokens"] == 4096
    assert base["id"] == BASE
    assert base["status"] == "unloaded"


def test_info_still_lists_models_while_the_engine_is_away(port: ChatPort) -> None:
    engine_of(port).goes_away()

    body = port.client.get("/worker/info").get_json()

    assert [model["status"] for model in body["models"]] == ["unknown", "unknown"]
    assert body["model_loaded"] is False


def test_info_of_the_media_port_has_job_types_and_models(media: MediaPort) -> None:
    body = media.client.get("/worker/info").get_json()

    assert body["capabilities"]["image"] is True
    assert body["capabilities"]["video"] is True
    assert [model["id"] for model in body["models"]] == [IMAGE, VIDEO]
    assert {"sdxl_image_fast", "sdxl_image_high", "video_fast", "video_high"} <= set(
        body["job_types"]
    )


def test_info_and_health_hold_no_path_of_this_machine(port: ChatPort) -> None:
    info = port.client.get("/worker/info").get_json()
    health = port.client.get("/health").get_json()

    own = set(info["endpoints"])
    found = [text for text in strings([info, health]) if text.startswith("/")]
    assert set(found) <= own
    assert str(port.settings.state_dir.parent) not in json.dumps([info, health])


def test_status_and_index_of_the_media_port_have_the_keys_of_the_contract(
    media: MediaPort,
) -> None:
    status = media.client.get("/status").get_json()
    index = media.client.get("/").get_json()

    assert status["batch_support"] == [1, 3, 6]
    assert status["quality_tiers"] == ["fast", "high"]
    assert status["thumbnail_generation"] is True
    assert status["models"] == [IMAGE]
    assert status["status"] == "healthy"
    assert index["status"] == "online"
    assert "/generate" in index["endpoints"]


# --- /debug --------------------------------------------------------------------------------------


def test_debug_model_says_what_is_loaded_and_where(chat: ChatPort) -> None:
    body = chat.client.get("/debug/model").get_json()

    assert body["instruct_loaded"] is True
    assert body["base_loaded"] is False
    assert body["active_model_type"] == "instruct"
    assert body["devices"] == {"instruct": "cpu", "base": None}
    assert body["stats"]["model_loads"] == 1


def test_debug_env_shows_names_and_never_values(
    media: MediaPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEBRA_SERVICE_KEY", "value-5d41402a")
    monkeypatch.setenv("ZEBRA_EMPTY", "")

    answer = media.client.get("/debug/env")

    assert {"ZEBRA_SERVICE_KEY", "ZEBRA_EMPTY", "PATH"} <= set(answer.get_json()["names"])
    assert "value-5d41402a" not in answer.text
    assert set(answer.get_json()) == {"names"}


# --- /memory -------------------------------------------------------------------------------------


def test_memory_status_of_the_chat_port_has_the_keys_of_the_contract(chat: ChatPort) -> None:
    body = chat.client.get("/memory/status").get_json()

    assert body["total_vram"] == 8.0
    assert body["allocated_vram"] == 2.0
    assert body["available_vram"] == 6.0
    assert body["process_rss"] == 1.0
    assert body["model_loaded"] is True
    assert body["instruct_loaded"] is True
    assert body["base_loaded"] is False
    assert body["models"][INSTRUCT] == {
        "status": "loaded",
        "device": "cpu",
        "weight_bytes": 1000,
    }


def test_memory_status_of_the_media_port_has_the_keys_that_all_workers_share(
    media: MediaPort,
) -> None:
    body = media.client.get("/memory/status").get_json()

    assert body["total_vram"] == 8.0
    assert body["model_loaded"] is True
    assert set(body["models"]) == {IMAGE, VIDEO}


def test_memory_status_is_there_while_the_engine_is_away(port: ChatPort) -> None:
    engine_of(port).goes_away()

    answer = port.client.get("/memory/status")

    assert answer.status_code == 200
    assert answer.get_json()["model_loaded"] is False
    assert answer.get_json()["total_vram"] == 0


CHANGES: dict[str, Any] = {"load": LoadModel, "unload": UnloadModel}


def changed(port: ChatPort, verb: str) -> list[str]:
    """Models that the engine was asked to load or unload."""
    return [message.model for message in engine_of(port).of(CHANGES[verb])]


@pytest.mark.parametrize("verb", ["load", "unload"])
@pytest.mark.parametrize(
    ("which", "models"),
    [
        ("instruct", [INSTRUCT]),
        ("base", [BASE]),
        ("all", [INSTRUCT, BASE]),
        ("qwen_base", [BASE]),
        ("QWEN_BASE", [BASE]),
        (INSTRUCT, [INSTRUCT]),
    ],
)
@pytest.mark.parametrize("where", ["query", "body"])
def test_models_are_loaded_and_unloaded_by_hand(
    chat: ChatPort, verb: str, which: str, models: list[str], where: str
) -> None:
    if where == "query":
        answer = chat.client.post(f"/memory/{verb}", query_string={"which": which})
    else:
        answer = chat.client.post(f"/memory/{verb}", json={"which": which, "force": True})

    body = answer.get_json()
    assert answer.status_code == 200
    assert body["success"] is True
    assert body["model_loaded"] is (verb == "load")
    assert all(model in body["message"] for model in models)
    assert changed(chat, verb) == models


@pytest.mark.parametrize("body", [None, {}, {"which": None}, {"force": False}])
def test_loading_without_a_name_means_instruct_and_unloading_means_all(
    chat: ChatPort, body: Any
) -> None:
    for verb in ("load", "unload"):
        chat.client.post(f"/memory/{verb}", json=body) if body is not None else chat.client.post(
            f"/memory/{verb}"
        )

    assert changed(chat, "load") == [INSTRUCT]
    assert changed(chat, "unload") == [INSTRUCT, BASE]


def test_loading_on_the_media_port_without_a_name_means_all(media: MediaPort) -> None:
    media.client.post("/memory/load")
    media.client.post("/memory/unload", query_string={"which": "wan"})

    assert changed(media, "load") == [IMAGE, VIDEO]
    assert changed(media, "unload") == [VIDEO]
    assert media.link.sent == []


@pytest.mark.parametrize("which", ["gpt-4", "", "tiny-image", "none"])
@pytest.mark.parametrize("verb", ["load", "unload"])
def test_a_model_that_is_not_served_is_neither_loaded_nor_unloaded(
    chat: ChatPort, verb: str, which: str
) -> None:
    by_query = chat.client.post(f"/memory/{verb}", query_string={"which": which})
    by_body = chat.client.post(f"/memory/{verb}", json={"which": which})

    refused(by_query, 422, "unsupported")
    refused(by_body, 422, "unsupported")
    assert chat.link.sent == []


@pytest.mark.parametrize(
    "raw",
    [b'{"which": 5}', b'{"which": ["base"]}', b"{", b'["base"]', b'"base"', b"5"],
)
@pytest.mark.parametrize("verb", ["load", "unload"])
def test_a_body_that_names_no_model_properly_is_refused(
    chat: ChatPort, verb: str, raw: bytes
) -> None:
    """Unloading everything because `["base"]` was not understood would be a costly guess."""
    answer = chat.client.post(f"/memory/{verb}", data=raw, content_type="application/json")

    refused(answer, 400, "invalid_request")
    assert chat.link.sent == []


def test_a_body_without_a_declared_size_names_the_model_too(chat: ChatPort) -> None:
    chat.client.post(
        "/memory/unload",
        content_type="application/json",
        environ_overrides={
            "wsgi.input": io.BytesIO(b'{"which": "base"}'),
            "wsgi.input_terminated": True,  # as gunicorn says for a chunked body
            "HTTP_TRANSFER_ENCODING": "chunked",
            "CONTENT_LENGTH": "",
        },
    )

    assert changed(chat, "unload") == [BASE]


def test_a_model_that_is_loaded_already_is_said_to_be(chat: ChatPort) -> None:
    def already(message: LoadModel) -> list[Any]:
        return [
            ModelChanged(
                request_id=message.request_id, model=message.model, changed=False, seconds=0.0
            )
        ]

    chat.link.plays(already)

    answer = chat.client.post("/memory/load")

    assert answer.get_json()["message"] == f"{INSTRUCT} was loaded already"


def test_a_model_that_cannot_be_loaded_is_an_error(chat: ChatPort) -> None:
    chat.link.plays(fails("model_unavailable", 503, "models/tiny-chat is missing"))

    answer = chat.client.post("/memory/load")

    assert "tiny-chat" in refused(answer, 503, "model_unavailable")


@pytest.mark.parametrize("verb", ["load", "unload"])
def test_a_change_of_models_that_takes_too_long_is_an_error(
    chat: ChatPort, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "CHANGE_TIMEOUT_S", 0.01)
    monkeypatch.setattr(chat_module, "ENGINE_GRACE_S", 0.0)
    chat.link.plays(stays_silent)

    answer = chat.client.post(f"/memory/{verb}")

    refused(answer, 504, "deadline_exceeded")
    # Nobody waits for it any more: it is not to wait for device memory either.
    [asked] = chat.link.sent
    chat.link.wait_cancelled(asked.request_id)


@pytest.mark.parametrize("verb", ["load", "unload"])
def test_models_stay_as_they_are_while_the_worker_stops_or_the_engine_is_away(
    chat: ChatPort, verb: str
) -> None:
    chat.link.goes_away()
    away = chat.client.post(f"/memory/{verb}")
    chat.link.comes_back()
    chat.drainer.begin(5.0)
    draining = chat.client.post(f"/memory/{verb}")

    refused(away, 503, "engine_unavailable")
    refused(draining, 503, "draining")
    assert chat.link.sent == []


# --- /metrics ------------------------------------------------------------------------------------


def metrics(port: ChatPort) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Samples by name and labels, read as Prometheus does."""
    answer = port.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.content_type.startswith("text/plain; version=")
    samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            samples.setdefault(sample.name, {})[labels] = sample.value
    return samples


def answers(port: ChatPort, route: str, method: str, status: int) -> float:
    labels = (("method", method), ("route", route), ("status", str(status)))
    return metrics(port)["verbatim_http_requests_total"].get(labels, 0.0)


def test_metrics_count_answers_by_route_method_and_status(chat: ChatPort) -> None:
    for _ in range(3):
        chat.client.post("/chat", json=ASK)
    chat.client.post("/chat", json={})
    chat.client.get("/nothing")
    chat.client.get("/chat")

    assert answers(chat, "/chat", "POST", 200) == 3
    assert answers(chat, "/chat", "POST", 400) == 1
    assert answers(chat, "(none)", "GET", 404) == 1
    seconds = metrics(chat)["verbatim_http_seconds_count"]
    assert seconds[(("route", "/chat"),)] >= 4


def test_metrics_count_routes_and_not_addresses(media: MediaPort) -> None:
    for number in range(5):
        media.client.get(f"/jobs/j{number}")

    assert answers(media, "/jobs/<job_id>", "GET", 404) == 5


def test_invented_methods_do_not_grow_the_metrics(chat: ChatPort) -> None:
    """Anybody may send them, also without a key; each would be a series that stays for ever."""
    chat.client.open("/chat", method="BREW")
    before = len(metrics(chat)["verbatim_http_requests_total"])

    for number in range(20):
        chat.client.open("/chat", method=f"BREW{number}")
    after = len(metrics(chat)["verbatim_http_requests_total"])

    assert after - before <= 1  # the scrape itself may be new


def test_metrics_say_how_the_engine_is(chat: ChatPort) -> None:
    chat.link.reports(waiting=4, active=1, gauges={"kv_blocks_used": 7})

    found = metrics(chat)

    assert found["verbatim_engine_up"] == {(): 1.0}
    assert found["verbatim_engine_waiting"] == {(): 4.0}
    assert found["verbatim_engine_active"] == {(): 1.0}
    assert found["verbatim_device_free_bytes"] == {(): float(6 << 30)}
    assert found["verbatim_model_loaded"] == {
        (("model", INSTRUCT),): 1.0,
        (("model", BASE),): 0.0,
    }
    assert found["verbatim_engine_total"][(("what", "requests_served"),)] == 3.0
    assert found["verbatim_engine_now"][(("what", "kv_blocks_used"),)] == 7.0


def test_metrics_have_the_times_of_generations(chat: ChatPort) -> None:
    before = metrics(chat)
    chat.link.plays(says("one two", pieces=["one", " two"]))
    chat.client.post("/chat", json=ASK)

    after = metrics(chat)

    # What the stand-in engine says: 0.125 s in the queue, 0.25 s of prefill, 1.5 s for the rest.
    assert before["verbatim_ttft_seconds_count"] == {(): 0.0}
    assert after["verbatim_queue_seconds_sum"] == {(): 0.125}
    assert after["verbatim_ttft_seconds_sum"] == {(): 0.375}
    assert after["verbatim_inter_token_seconds_count"] == {(): 1.0}


def test_metrics_are_there_while_the_engine_is_away(port: ChatPort) -> None:
    engine_of(port).goes_away()

    found = metrics(port)

    assert found["verbatim_engine_up"] == {(): 0.0}
    assert "verbatim_engine_waiting" not in found


def test_metrics_show_taken_places_and_jobs(media: MediaPort) -> None:
    media.media.goes_away()
    media.accept()
    slot = media.admission.enter()

    found = metrics(media)

    slot.leave(served=False)
    assert found["verbatim_requests_in_flight"] == {(): 1.0}
    assert found["verbatim_jobs"][(("status", "queued"),)] == 1.0
    assert found["verbatim_jobs"][(("status", "completed"),)] == 0.0


def test_models_of_both_engines_are_reported_by_their_own_ports(
    chat: ChatPort, make_media: Callable[..., MediaPort]
) -> None:
    media = make_media()

    chat_models = chat.client.get("/memory/status").get_json()["models"]
    media_models = media.client.get("/memory/status").get_json()["models"]

    assert set(chat_models) == {model.id for model in CHAT_MODELS}
    assert set(media_models) == {model.id for model in MEDIA_MODELS}


def test_the_version_is_a_version(chat: ChatPort) -> None:
    version = chat.client.get("/worker/info").get_json()["version"]

    assert re.fullmatch(r"\d+\.\d+(\.\d+)?\S*", version)
