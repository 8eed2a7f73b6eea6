"""The function routes about workers: registering, finding and looking at them."""

from __future__ import annotations

from typing import Any, Literal

from flask.typing import ResponseReturnValue
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, ConfigDict

from gateway.access.caller import Scope
from gateway.front.access import needs
from gateway.workers.service import WorkersService

_TAG = Tag(name="workers")


class _Body(BaseModel):
    """Read by gateway/workers, key by key: existing workers send some under two names."""

    model_config = ConfigDict(extra="allow")


class RegisterBody(_Body):
    worker_url: str | None = None


class ActiveBody(_Body):
    worker_type: Literal["chat", "sdxl", "wan"] | None = None


def function_blueprint(workers: WorkersService) -> APIBlueprint:
    api = APIBlueprint("workers", __name__, abp_tags=[_TAG])

    @api.post("/register-chat-worker", summary="Where a chat worker is")
    @needs(Scope.WORKER, Scope.ADMIN)
    def register(body: RegisterBody) -> ResponseReturnValue:
        return workers.registration.register_chat(_said(body))

    @api.post("/update-worker-url", summary="Where an image and video worker is")
    @needs(Scope.WORKER, Scope.ADMIN)
    def update(body: RegisterBody) -> ResponseReturnValue:
        return workers.registration.update_media(_said(body))

    @api.post("/get-active-worker-url", summary="The URL of a worker that answers")
    @needs(Scope.CALL, Scope.WORKER, Scope.VIEWER)
    def active(body: ActiveBody) -> ResponseReturnValue:
        return workers.active.active_url(_said(body))

    @api.post("/health-check-workers", summary="Look at every worker now")
    @needs(Scope.WORKER, Scope.VIEWER)
    def check() -> ResponseReturnValue:
        return workers.active.check_all()

    return api


def _said(body: BaseModel) -> dict[str, Any]:
    return body.model_dump(exclude_unset=True)
