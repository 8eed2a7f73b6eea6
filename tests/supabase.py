"""A whole Supabase stand-in on one port: storage, functions and the table of jobs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flask import Flask

from tests.supabase_functions import FunctionsState, functions_blueprint
from tests.supabase_storage import Shelf, serve, storage_blueprint


@dataclass(frozen=True)
class Supabase:
    """What it holds, and the environment that leads a worker to it."""

    url: str
    shelf: Shelf
    functions: FunctionsState

    @property
    def environment(self) -> dict[str, str]:
        return {
            "SUPABASE_URL": self.url,
            "SUPABASE_SERVICE_KEY": self.shelf.service_key,
            "JOB_CALLBACK_SECRET": self.functions.callback_secret or "",
        }


@contextmanager
def running_supabase() -> Iterator[Supabase]:
    shelf = Shelf()
    functions = FunctionsState(service_key=shelf.service_key)
    app = Flask("supabase")
    app.register_blueprint(storage_blueprint(shelf))
    app.register_blueprint(functions_blueprint(functions))
    with serve(app) as url:
        yield Supabase(url, shelf, functions)
