"""Every error the gateway raises on purpose.

`status` and `code` are public contract (docs/gateway.md) and are turned into an HTTP answer in one
place, gateway/front/errors.py. An exception that is not a GatewayError is our bug: it is logged
with its traceback and answered with a bare 500.

A message carries numbers and names and the next step, never a prompt's text or a secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# A client of the original searches the raw body of errors for these, without regard to case, and
# draws wrong conclusions; "information" and "maintenance" hit too.
TRAP_WORDS = ("inf", "nan", "content policy", "inappropriate", "probability tensor")


def has_trap_word(text: str) -> bool:
    lowered = text.lower()
    return any(word in lowered for word in TRAP_WORDS)


class GatewayError(Exception):
    """The request cannot be answered; `status` and `code` say why."""

    status = 500
    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        fields: Mapping[str, Any] | None = None,
    ):
        """retry_after_s: None means that the same request would fail again.
        fields: further keys of the answer, such as the nearest templates."""
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.fields = dict(fields or {})


# --- the machine's side -----------------------------------------------------------------------


class ConfigError(GatewayError):
    """The settings, the environment or a shipped file is wrong; the process must not start."""

    code = "config_error"


class StoreUnavailable(GatewayError):
    """The database does not answer, or its disk is full or read-only."""

    status = 503
    code = "store_unavailable"


class RevisionNotReached(GatewayError):
    """The caller asked to see a revision that this process has not loaded in time."""

    status = 503
    code = "revision_not_reached"


class QueueUnavailable(GatewayError):
    """Redis, or the worker that takes jobs over HTTP, does not take the job."""

    status = 503
    code = "queue_unavailable"


# --- the caller's side ------------------------------------------------------------------------


class InvalidRequest(GatewayError):
    """The body is not what the route takes."""

    status = 400
    code = "invalid_request"


class Unauthorized(GatewayError):
    """No key or token came, or a wrong one."""

    status = 401
    code = "unauthorized"


class Forbidden(GatewayError):
    """Who asks is known and may not do this."""

    status = 403
    code = "forbidden"


class NotFound(GatewayError):
    """No such route or row, or one that belongs to someone else."""

    status = 404
    code = "not_found"


class TemplateNotFound(GatewayError):
    """No active template for this target, job, use and mode; `fields` has the nearest."""

    status = 404
    code = "template_not_found"


class Conflict(GatewayError):
    """The row has changed since the caller read it, or a unique value is taken."""

    status = 409
    code = "conflict"


class TooLarge(GatewayError):
    """Longer or more than the limits allow; the message has both numbers."""

    status = 413
    code = "too_large"


class Invalid(GatewayError):
    """Readable, but a value is out of its range; the message has the range."""

    status = 422
    code = "invalid_value"


class PromptRefused(GatewayError):
    """Sexual content with minors or real people; no setting switches this off."""

    status = 422
    code = "prompt_refused"


class TemplateFault(GatewayError):
    """A template or rule cannot be rendered: a missing variable, a forbidden construct, or slow."""

    status = 422
    code = "template_fault"


class ModelNotAllowed(GatewayError):
    """The chosen model is unknown, inactive or not for this task, and nothing may replace it."""

    status = 422
    code = "model_not_allowed"


# --- the other side: workers and providers ----------------------------------------------------


class WorkerUnavailable(GatewayError):
    """No worker of the kind is known, or none answers."""

    status = 503
    code = "worker_unavailable"


class WorkerBusy(GatewayError):
    """Every worker of the kind is at its limit."""

    status = 503
    code = "worker_busy"


class WorkerTimeout(GatewayError):
    """A worker did not answer in the time that was left."""

    status = 504
    code = "worker_timeout"


class WorkerFault(GatewayError):
    """A worker answered with something that is no answer of its contract."""

    status = 502
    code = "worker_fault"


class AttestationFailed(GatewayError):
    """A worker's receipt does not match what was sent to it."""

    status = 502
    code = "attestation_failed"


class ProviderFault(GatewayError):
    """A model provider failed; `fields` says how."""

    status = 502
    code = "provider_fault"
