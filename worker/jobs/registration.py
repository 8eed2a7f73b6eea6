"""Tells the service under which public addresses the two ports are, and that they still are.

The service has one function per port to store an address, and one that looks at both and stores
whether they are healthy. It has none to take an address back, and the document that holds them is
shared, so this worker never writes to it. What can be done when it drains is to have the ports
looked at while they refuse: callers that heed health then go elsewhere.
"""

from __future__ import annotations

import json
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from worker.errors import ConfigError
from worker.jobs.announce import (
    CHAT,
    MEDIA,
    CheckHealth,
    Probe,
    Register,
    State,
    checked,
    drained,
    due,
    not_checked,
    not_registered,
    probed,
    registered,
    with_urls,
)
from worker.jobs.callbacks import time_text
from worker.storage.pinned import Answer
from worker.storage.service import Service, service_from_environment
from worker.storage.stores import check_address

log = logging.getLogger(__name__)

POD_ID = "RUNPOD_POD_ID"
URL_VARIABLES = {CHAT: "VERBATIM_PUBLIC_CHAT_URL", MEDIA: "VERBATIM_PUBLIC_MEDIA_URL"}

FUNCTIONS = "/functions/v1/"
REGISTER = {CHAT: "register-chat-worker", MEDIA: "update-worker-url"}
CHECK = "health-check-workers"
# What the functions call the two ports where they say how they are.
HEALTH_NAMES = {CHAT: "chatWorker", MEDIA: "wanWorker"}

TICK_S = 0.5
CALL_TIMEOUT_S = 15.0  # a function looks at a port for 5 s, one of them at two
PROBE_TIMEOUT_S = 2.0


class _NotDone(Exception):
    """A function did not do what it is for; the text says how it showed."""


class Registration:
    """Keeps the registration of this worker's ports. Its own thread owns the state; `drain` and
    `wait_signed_off` may be called from any."""

    def __init__(
        self,
        service: Service,
        urls: Callable[[], Mapping[str, str]],
        ports: Mapping[str, int],
        detection: str = POD_ID,
        probe: Callable[[int], bool] | None = None,
        wall_clock: Callable[[], float] = time.time,
        random01: Callable[[], float] = random.random,
    ):
        """service: this object's own, closed with it. urls: public address by role, asked for at
        every round. ports: local port by role.

        detection: how the addresses were found, for the service's record. probe: whether a local
        port's /health answers 200.
        """
        self._service = service
        self._urls = urls
        self._ports = ports
        self._detection = detection
        # No kept connection: one that was closed meanwhile would look like a port that is away.
        self._client = httpx.Client(
            timeout=PROBE_TIMEOUT_S,
            trust_env=False,
            verify=False,  # plain http; no certificates are loaded for it
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        self._probe = probe or self._answers
        self._wall_clock = wall_clock
        self._random01 = random01
        self._said: dict[str, str] = {}  # what was logged last, by what it is about
        self._drain = threading.Event()
        self._signed_off = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="registration", daemon=True)
        self.state = State(())

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """The ports are about to refuse new work: register nothing more, and sign off."""
        self._drain.set()

    def wait_signed_off(self, timeout_s: float) -> bool:
        """Whether the service has seen, within `timeout_s`, that the ports refuse."""
        return self._signed_off.wait(timeout_s)

    def close(self) -> None:
        """Stop; a call that is under way may outlive this by CALL_TIMEOUT_S."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(CALL_TIMEOUT_S)
        self._client.close()
        self._service.close()

    def _run(self) -> None:
        while not self._stopping.wait(TICK_S):
            try:
                self.tick(time.monotonic())
            except Exception:
                log.exception("a round of the registration failed")

    def tick(self, now: float) -> None:
        """Do what is due. Takes up to three times CALL_TIMEOUT_S where functions hang."""
        self.state = with_urls(self.state, self._urls())
        if self._drain.is_set() and not self.state.draining:
            self.state = drained(self.state, now)
        for action in due(self.state, now):
            match action:
                case Probe():
                    answers = self._probe(self._ports[action.role])
                    self.state = probed(self.state, action.role, answers, now)
                case Register():
                    self._register(action.role, now)
                case CheckHealth():
                    self._check(now)
        if self.state.signed_off:
            self._signed_off.set()

    def _register(self, role: str, now: float) -> None:
        url = self.state.port(role).url
        try:
            said = self._call(REGISTER[role], self._body(role, url))
            stored = said.get("workerUrl", said.get("worker_url", url))
            if stored != url:
                raise _NotDone("it says that it has stored another address")
        except _NotDone as exc:
            self._say(REGISTER[role], f"the {role} port is not registered: {exc}", logging.WARNING)
            self.state = not_registered(self.state, role, now, self._random01())
            return
        self._say(REGISTER[role], f"the {role} port is registered as {url}")
        self.state = registered(self.state, role, now)

    def _check(self, now: float) -> None:
        try:
            said = self._call(CHECK, {})
        except _NotDone as exc:
            self._say(CHECK, f"the service did not look at the ports: {exc}", logging.WARNING)
            self.state = not_checked(self.state, now, self._random01())
            return
        for port in self.state.ports:
            seen = _health(said, port.role)
            if seen is False and port.answers:
                text = f"the service does not reach the {port.role} port at {port.url}"
                self._say(f"{CHECK} {port.role}", text, logging.WARNING)
            elif seen:
                self._say(f"{CHECK} {port.role}", f"the service reaches the {port.role} port")
        self._say(CHECK, "the service has looked at the ports")
        self.state = checked(self.state, now)

    def _body(self, role: str, url: str) -> dict[str, Any]:
        body: dict[str, Any] = {"worker_url": url, "auto_registered": True}
        if role == CHAT:
            body |= {
                "registration_method": "pure_inference_chat_worker",
                "worker_type": "pure_inference_engine",
                "capabilities": {
                    "hardcoded_prompts": False,
                    "prompt_modification": False,
                    "pure_inference": True,
                },
            }
        else:
            body |= {
                "registration_method": "wan_worker_self_registration",
                "detection_method": self._detection,
            }
        return body | {"timestamp": time_text(self._wall_clock())}

    def _call(self, function: str, body: dict[str, Any]) -> dict[str, Any]:
        """What a function says. Raises _NotDone unless it says that it has succeeded."""
        try:
            answer = self._service.call(
                "POST",
                FUNCTIONS + function,
                headers={"Content-Type": "application/json"},
                content=json.dumps(body).encode(),
                timeout_s=CALL_TIMEOUT_S,
            )
        except httpx.TransportError as exc:
            raise _NotDone(f"{function} gave no answer ({type(exc).__name__})") from exc
        said = _json_object(answer)
        if not 200 <= answer.status < 300 or said is None or said.get("success") is not True:
            raise _NotDone(f"{function} answered {answer.status} without success")
        return said

    def _answers(self, port: int) -> bool:
        try:
            return self._client.get(f"http://127.0.0.1:{port}/health").status_code == 200
        except httpx.TransportError:
            return False

    def _say(self, about: str, text: str, level: int = logging.INFO) -> None:
        """Log what is new."""
        if self._said.get(about) != text:
            self._said[about] = text
            log.log(level, "%s", text)


def _json_object(answer: Answer) -> dict[str, Any] | None:
    if not answer.is_whole:
        return None
    try:
        said = json.loads(answer.body)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _health(said: dict[str, Any], role: str) -> bool | None:
    """Whether a check found the port healthy; None when it does not say so in the known form."""
    match said:
        case {"healthResults": dict(results)}:
            match results.get(HEALTH_NAMES[role]):
                case {"isHealthy": bool(healthy)}:
                    return healthy
    return None


# --- settings ----------------------------------------------------------------------------------


def public_urls(env: Mapping[str, str], chat_port: int, media_port: int) -> dict[str, str]:
    """The public address of each port that has one: as URL_VARIABLES say, else by the pod's id.

    Never by the host's name, which on most machines is no pod's id.
    Raises ConfigError for what cannot be an address.
    """
    pod_id = env.get(POD_ID, "").strip()
    if pod_id and not re.fullmatch(r"[A-Za-z0-9-]{1,63}", pod_id):
        raise ConfigError(f"{POD_ID} must be letters, digits and dashes")
    urls = {}
    for role, port in ((CHAT, chat_port), (MEDIA, media_port)):
        given = env.get(URL_VARIABLES[role], "").strip()
        if given:
            urls[role] = check_address(URL_VARIABLES[role], given)
        elif pod_id:
            urls[role] = f"https://{pod_id}-{port}.proxy.runpod.net"
    return urls


def registration_from_environment(
    env: Mapping[str, str], chat_port: int, media_port: int
) -> Registration | None:
    """None unless a service (worker/storage/service.py) and a public address are configured.

    Raises ConfigError for half a setting.
    """
    urls = public_urls(env, chat_port, media_port)
    service = service_from_environment(env)
    if service is None:
        return None
    if not urls:
        service.close()
        return None
    given = env.get(URL_VARIABLES[MEDIA], "").strip()
    return Registration(
        service,
        lambda: public_urls(env, chat_port, media_port),
        {CHAT: chat_port, MEDIA: media_port},
        detection=URL_VARIABLES[MEDIA] if given else POD_ID,
    )
