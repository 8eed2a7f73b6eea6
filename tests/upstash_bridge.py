"""An Upstash-compatible REST interface over a Redis server, for tests.

It answers as Upstash documents (https://upstash.com/docs/redis/features/restapi): one command as a
JSON array or as a path, whose POST body becomes the last argument; `/pipeline`; `/multi-exec`;
answers in base64 for who asks for it.
"""

from __future__ import annotations

import base64
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote_to_bytes

import redis
from flask import Flask, Response, jsonify, request
from flask.typing import ResponseReturnValue
from redis.connection import ConnectionPool
from werkzeug.exceptions import HTTPException
from werkzeug.routing import BaseConverter
from werkzeug.serving import make_server

Command = list[bytes]


@contextmanager
def bridge(redis_url: str, token: str) -> Iterator[str]:
    """Yields the base URL of a bridge to the server at `redis_url`, for callers with `token`."""
    pool = ConnectionPool.from_url(redis_url, protocol=2)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, create_app(pool, token), threaded=True)
    thread = threading.Thread(
        target=server.serve_forever, args=(0.02,), name="upstash bridge", daemon=True
    )
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        pool.disconnect()


def create_app(pool: ConnectionPool, token: str) -> Flask:
    app = Flask("upstash_bridge")
    app.url_map.converters["words"] = _Words
    server = _Server(pool)

    @app.before_request
    def refuse_strangers() -> ResponseReturnValue | None:
        given = request.headers.get("Authorization") or f"Bearer {request.args.get('_token', '')}"
        if given != f"Bearer {token}":
            return _error("WRONGPASS invalid or missing auth token", 401)
        return None

    @app.errorhandler(HTTPException)
    def wrong_method(problem: HTTPException) -> ResponseReturnValue:
        return _error(f"ERR {problem.name}", problem.code or 500)

    @app.errorhandler(redis.ConnectionError)
    def server_gone(problem: redis.ConnectionError) -> ResponseReturnValue:
        return _error("ERR the database cannot be reached", 500)

    @app.post("/")
    def one() -> ResponseReturnValue:
        try:
            return jsonify(result=_shown(server.run(_command(request.get_json(force=True)))))
        except (redis.ResponseError, _Unreadable) as problem:
            return _error(_text(problem))

    @app.post("/pipeline")
    def pipeline() -> ResponseReturnValue:
        try:
            return jsonify([server.tried(command) for command in _commands()])
        except _Unreadable as problem:
            return _error(_text(problem))

    @app.post("/multi-exec")
    def transaction() -> ResponseReturnValue:
        try:
            return jsonify([_item(reply) for reply in server.transaction(_commands())])
        except (redis.ResponseError, _Unreadable) as problem:
            return _error(_text(problem))

    @app.route("/<words:_>", methods=["GET", "POST", "PUT"])
    def path(_: str) -> ResponseReturnValue:
        # Split before it is unquoted: an argument may hold a slash.
        raw = request.environ["REQUEST_URI"].partition("?")[0].lstrip("/")
        command = [unquote_to_bytes(word) for word in raw.split("/")]
        if body := request.get_data():
            command.append(body)
        for key, value in request.args.items():
            if key != "_token":
                command += [word.encode() for word in (key, value) if word]
        try:
            return jsonify(result=_shown(server.run(command)))
        except redis.ResponseError as problem:
            return _error(_text(problem))

    return app


class _Words(BaseConverter):
    """A command and its arguments; a script has line ends in it."""

    regex = r"[\s\S]+"
    part_isolating = False


class _Unreadable(Exception):
    """The request's body is no command."""


class _Server:
    """Sends commands as they came and hands back the replies as they come. Any thread."""

    def __init__(self, pool: ConnectionPool):
        self._pool = pool

    def run(self, command: Command) -> Any:
        (reply,) = self._exchange([command])
        if isinstance(reply, redis.ResponseError):
            raise reply
        return reply

    def tried(self, command: Command) -> dict[str, Any]:
        return _item(self._exchange([command])[0])

    def transaction(self, commands: list[Command]) -> list[Any]:
        replies = self._exchange([[b"MULTI"], *commands, [b"EXEC"]])
        if isinstance(replies[-1], redis.ResponseError):  # discarded as a whole
            raise replies[-1]
        done: list[Any] = replies[-1]
        return done

    def _exchange(self, commands: list[Command]) -> list[Any]:
        connection = self._pool.get_connection()
        try:
            replies: list[Any] = []
            for command in commands:
                connection.send_command(*command)  # type: ignore[no-untyped-call]
                try:
                    replies.append(connection.read_response())
                except redis.ResponseError as problem:
                    replies.append(problem)
            return replies
        finally:
            self._pool.release(connection)


def _commands() -> list[Command]:
    given = request.get_json(force=True, silent=True)
    if not isinstance(given, list) or not given:
        raise _Unreadable("ERR failed to parse pipeline request")
    return [_command(one) for one in given]


def _command(given: Any) -> Command:
    if not isinstance(given, list) or not given:
        raise _Unreadable("ERR failed to parse command")
    if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in given):
        raise _Unreadable("ERR a command takes texts and numbers")
    # A JSON parser that is strict about Unicode replaces half a surrogate pair.
    return [str(one).encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
            for one in given]  # fmt: skip


def _item(reply: Any) -> dict[str, Any]:
    if isinstance(reply, redis.ResponseError):
        return {"error": _text(reply)}
    return {"result": _shown(reply)}


def _shown(reply: Any) -> Any:
    if isinstance(reply, list):
        return [_shown(one) for one in reply]
    if not isinstance(reply, bytes):
        return reply
    if request.headers.get("Upstash-Encoding") == "base64" and reply != b"OK":
        return base64.b64encode(reply).decode("ascii")
    return reply.decode("utf-8", "replace")


def _text(problem: Exception) -> str:
    """An error as Redis wrote it; the library cuts off the first words that it knows."""
    return f"{getattr(problem, 'status_code', None) or ''} {problem}".strip()


def _error(text: str, status: int = 400) -> Response:
    answer = jsonify(error=text)
    answer.status_code = status
    return answer
