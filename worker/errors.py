"""Every error the worker raises on purpose.

`status` and `code` are public contract (docs/http-api.md) and are turned into an HTTP answer in
one place, worker/front/errors.py. An exception that is not a WorkerError is our bug: it is logged
with its traceback and answered with a bare 500.

A message carries numbers and names, never the user's text. One existing client searches error
bodies for the words in TRAP_WORDS and draws wrong conclusions from them, so no message, code or
key of an error may contain one (docs/http-api.md#words-that-never-appear-in-an-error).
"""

from __future__ import annotations

# Searched case-insensitively, anywhere in the raw body, so "information" and "maintenance" hit too.
TRAP_WORDS = ("inf", "nan", "content policy", "inappropriate", "probability tensor")


# Stands for an error's own text where that has one of these words.
NEUTRAL_ERROR = "the request failed; the worker's log has the reason under this id"


class WorkerError(Exception):
    """The request cannot be answered; `status` and `code` say why."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, retry_after_s: float | None = None):
        super().__init__(message)
        self.retry_after_s = retry_after_s  # None: the same request would fail again


# --- the machine's side: start-up and files ---------------------------------------------------


class ConfigError(WorkerError):
    """A profile, the catalog or an environment override is wrong; the process must not start."""

    code = "config_error"


class ModelUnavailable(WorkerError):
    """A model has missing or damaged files; the message has the path and the cure."""

    status = 503
    code = "model_unavailable"


# --- the client's side ------------------------------------------------------------------------


class InvalidRequest(WorkerError):
    """The body is not what the route takes."""

    status = 400
    code = "invalid_request"


class Unauthorized(WorkerError):
    """The key is missing or wrong."""

    status = 401
    code = "unauthorized"


class NotFound(WorkerError):
    """No such route, job or asset."""

    status = 404
    code = "not_found"


class Conflict(WorkerError):
    """The same id or key was used before with another body."""

    status = 409
    code = "conflict"


class TooLarge(WorkerError):
    """The body, or a list in it, is over a limit of the profile."""

    status = 413
    code = "too_large"


class ContextTooLong(TooLarge):
    """The prompt leaves no room to answer; it is refused, never cut."""

    code = "context_overflow"

    def __init__(self, *, prompt_tokens: int, context_tokens: int):
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and the model's context holds "
            f"{context_tokens}, so there is no room to answer; send fewer or shorter messages"
        )


class PromptTooLong(TooLarge):
    """A text encoder takes fewer tokens than the prompt has; it is refused, never cut."""

    code = "prompt_too_long"


class UnsupportedMediaType(WorkerError):
    """The body is not declared as JSON."""

    status = 415
    code = "unsupported_media_type"


class OutOfRange(WorkerError):
    """A value has the right type and a wrong amount; the message has the allowed range."""

    status = 422
    code = "out_of_range"


class Unsupported(WorkerError):
    """The request asks for something this worker does not do; doing less silently is no option."""

    status = 422
    code = "unsupported"


class MessagesRequired(WorkerError):
    """A bare prompt came where only finished messages are run; the text says who makes them."""

    status = 422
    code = "messages_required"


class ReferenceRefused(WorkerError):
    """A picture that a job names, or an address, will not be fetched: asking again cannot help."""

    status = 422
    code = "reference_refused"


class ReferenceForbidden(WorkerError):
    """A picture that a job names lies in the storage in a folder that is not its user's."""

    status = 403
    code = "reference_forbidden"


class ReferenceTooLarge(TooLarge):
    """A picture that a job names has more bytes or pixels than a limit allows."""

    code = "reference_too_large"


class ReferenceUnavailable(WorkerError):
    """A host did not give what it was asked for now; it may later."""

    status = 502
    code = "reference_unavailable"


# --- the moment's side ------------------------------------------------------------------------


class Busy(WorkerError):
    """The queue of this port is full."""

    status = 429
    code = "busy"


class Draining(WorkerError):
    """The daemon is stopping; running work finishes, new work goes elsewhere."""

    status = 503
    code = "draining"


class JournalUnavailable(WorkerError):
    """Jobs cannot be written down or read: the disk is full, read-only or slow, or the journal is
    damaged; the message says which."""

    status = 503
    code = "journal_unavailable"


class DiskFull(WorkerError):
    """Files of a result cannot be written for want of space; the job is tried again."""

    status = 503
    code = "disk_full"


class EngineUnavailable(WorkerError):
    """The engine process is starting, restarting or given up."""

    status = 503
    code = "engine_unavailable"


class EngineLost(EngineUnavailable):
    """The engine process died while it worked on this request."""

    code = "engine_lost"


class OutOfDeviceMemory(WorkerError):
    """The device ran out of memory on this request."""

    status = 503
    code = "out_of_device_memory"


class OutOfHostMemory(WorkerError):
    """The container has not enough memory for what was asked."""

    status = 503
    code = "out_of_host_memory"


class DeadlineExceeded(WorkerError):
    """The request's own deadline passed before the answer was complete."""

    status = 504
    code = "deadline_exceeded"


class Cancelled(WorkerError):
    """The client hung up or cancelled; nobody reads this answer."""

    status = 499
    code = "cancelled"


def has_trap_word(text: str) -> bool:
    """Whether `text` contains a word that an existing client misreads in an error body."""
    lowered = text.lower()
    return any(word in lowered for word in TRAP_WORDS)


class Relayed(WorkerError):
    """An error that another process raised, with its status and code."""

    def __init__(self, message: str, *, status: int, code: str, retry_after_s: float | None):
        super().__init__(message, retry_after_s=retry_after_s)
        self.status = status
        self.code = code
