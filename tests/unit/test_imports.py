"""The architecture as a table: which package may import which, and which libraries."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# What each part may import of ours, lowest level first. A row of a single module (a composition
# root) is its own part and not of its package. A change here is a change of the architecture.
ALLOWED = {
    "worker": set(),
    "worker.errors": set(),
    "worker.log": set(),
    "worker.lifeline": set(),
    "worker.versions": set(),
    "worker.receipt": set(),
    "worker.jsonvalues": {"worker.errors"},
    "worker.grammar": {"worker.errors"},
    "worker.config": {"worker.errors"},
    "worker.catalog": {"worker.config", "worker.errors"},
    "worker.modelfiles": {"worker.catalog", "worker.errors"},
    "worker.protocol": {"worker.errors"},
    "worker.vram": set(),
    "worker.vram.ways": {"worker.protocol"},
    "worker.vram.lending": {"worker.protocol", "worker.vram", "worker.vram.ways"},
    "worker.vram.broker": {"worker.protocol", "worker.vram", "worker.vram.lending"},
    "worker.vram.dryrun": {"worker.protocol", "worker.vram.broker"},
    "worker.vram.adapters": {
        "worker.catalog",
        "worker.errors",
        "worker.modelfiles",
        "worker.protocol",
        "worker.vram",
    },
    "worker.vram.texts": {"worker.errors", "worker.protocol", "worker.vram"},
    "worker.vram.tokenizers": {
        "worker.catalog",
        "worker.errors",
        "worker.versions",
        "worker.vram.texts",
    },
    "worker.vram.jobplan": {
        "worker.catalog",
        "worker.errors",
        "worker.protocol",
        "worker.vram",
        "worker.vram.adapters",
        "worker.vram.planner",
        "worker.vram.texts",
        "worker.vram.tokenizers",
    },
    "worker.vram.planner": {
        "worker.catalog",
        "worker.protocol",
        "worker.vram",
        "worker.vram.adapters",
        "worker.vram.sizes",
        "worker.vram.ways",
    },
    "worker.vram.sizes": {
        "worker.catalog",
        "worker.config",
        "worker.errors",
        "worker.versions",
        "worker.vram",
    },
    "worker.queues": {"worker.errors"},
    "worker.storage": {"worker.errors", "worker.protocol"},
    "worker.jobs": {
        "worker.catalog",
        "worker.config",
        "worker.errors",
        "worker.jsonvalues",
        "worker.lifeline",
        "worker.log",
        "worker.protocol",
        "worker.queues",
        "worker.storage",
        "worker.vram.ways",
    },
    "worker.engine": {
        "worker.catalog",
        "worker.errors",
        "worker.log",
        "worker.modelfiles",
        "worker.protocol",
        "worker.vram",
        "worker.vram.broker",
    },
    "worker.engine.chat": {
        "worker.catalog",
        "worker.engine",
        "worker.errors",
        "worker.grammar",
        "worker.log",
        "worker.modelfiles",
        "worker.protocol",
        "worker.receipt",
        "worker.vram",
        "worker.vram.planner",
        "worker.vram.sizes",
        "worker.vram.ways",
    },
    "worker.engine.media": {
        "worker.catalog",
        "worker",
        "worker.engine",
        "worker.errors",
        "worker.log",
        "worker.modelfiles",
        "worker.protocol",
        "worker.receipt",
        "worker.versions",
        "worker.vram",
        "worker.vram.adapters",
        "worker.vram.planner",
        "worker.vram.sizes",
        "worker.vram.texts",
        "worker.vram.ways",
    },
    "worker.engine.peaks": {
        "worker.engine",
        "worker.engine.chat",
        "worker.engine.media",
        "worker.vram",
    },
    "worker.engine.__main__": {
        "worker.catalog",
        "worker.config",
        "worker.engine",
        "worker.engine.chat",
        "worker.engine.media",
        "worker.engine.peaks",
        "worker.errors",
        "worker.lifeline",
        "worker.log",
        "worker.protocol",
        "worker.vram.sizes",
    },
    "worker.front": {
        "worker",
        "worker.catalog",
        "worker.config",
        "worker.errors",
        "worker.jobs",
        "worker.jsonvalues",
        "worker.log",
        "worker.protocol",
        "worker.receipt",
        "worker.vram.jobplan",
        "worker.vram.planner",
        "worker.vram.tokenizers",
        "worker.vram.ways",
    },
    "worker.front.wsgi": {
        "worker.catalog",
        "worker.config",
        "worker.front",
        "worker.jobs",
        "worker.protocol",
        "worker.vram",
        "worker.vram.planner",
        "worker.vram.sizes",
        "worker.vram.tokenizers",
    },
    "worker.front.threads": set(),
    "worker.front.__main__": {
        "worker.config",
        "worker.front.wsgi",
        "worker.lifeline",
        "worker.log",
    },
    "worker.supervisor": {
        "worker.config",
        "worker.errors",
        "worker.lifeline",
        "worker.log",
        "worker.protocol",
        "worker.vram",
        "worker.vram.broker",
        "worker.vram.dryrun",
    },
    "worker.supervisor.check": {
        "worker.catalog",
        "worker.config",
        "worker.errors",
        "worker.modelfiles",
        "worker.supervisor",
        "worker.vram",
        "worker.vram.adapters",
    },
    "worker.supervisor.planning": {
        "worker.catalog",
        "worker.config",
        "worker.errors",
        "worker.jobs",
        "worker.protocol",
        "worker.supervisor",
        "worker.supervisor.check",
        "worker.vram",
        "worker.vram.broker",
        "worker.vram.dryrun",
        "worker.vram.jobplan",
        "worker.vram.planner",
        "worker.vram.sizes",
        "worker.vram.tokenizers",
    },
    "orchestrator": {
        "worker.config",
        "worker.errors",
        "worker.log",
        "worker.supervisor",
        "worker.supervisor.check",
        "worker.supervisor.planning",
        "worker.vram",
        "worker.vram.ways",
    },
    # --- the gateway: a program of its own, which imports nothing of the worker
    "gateway": set(),
    "gateway.__main__": {
        "gateway.cli",
        "gateway.config",
        "gateway.errors",
        "gateway.lifeline",
        "gateway.log",
        "gateway.server",
        "gateway.store",
        "gateway.tokens",
        "gateway.wsgi",
    },
    "gateway.access": {"gateway.config", "gateway.errors", "gateway.store", "gateway.values"},
    "gateway.cache": {"gateway.errors", "gateway.store", "gateway.values"},
    "gateway.cli": {
        "gateway.access",
        "gateway.content",
        "gateway.errors",
        "gateway.logs",
        "gateway.prompts",
        "gateway.store",
        "gateway.values",
    },
    "gateway.config": {"gateway.errors"},
    "gateway.content": {"gateway.errors", "gateway.values"},
    "gateway.errors": set(),
    "gateway.flows": {
        "gateway.access",
        "gateway.cache",
        "gateway.content",
        "gateway.errors",
        "gateway.models",
        "gateway.prompts",
        "gateway.store",
        "gateway.tokens",
        "gateway.values",
    },
    "gateway.front": {
        "gateway.access",
        "gateway.cache",
        "gateway.config",
        "gateway.errors",
        "gateway.flows",
        "gateway.jobs",
        "gateway.log",
        "gateway.logs",
        "gateway.models",
        "gateway.prompts",
        "gateway.store",
        "gateway.values",
        "gateway.workers",
    },
    "gateway.jobs": {
        "gateway.access",
        "gateway.config",
        "gateway.errors",
        "gateway.flows",
        "gateway.prompts",
        "gateway.store",
        "gateway.values",
    },
    "gateway.lifeline": set(),
    "gateway.log": set(),
    "gateway.logs": {
        "gateway.config",
        "gateway.errors",
        "gateway.prompts",
        "gateway.store",
        "gateway.values",
    },
    "gateway.migrations": set(),
    "gateway.models": {"gateway.errors", "gateway.network", "gateway.store", "gateway.values"},
    "gateway.network": set(),
    "gateway.prompts": {"gateway.content", "gateway.errors", "gateway.tokens", "gateway.values"},
    "gateway.server": {"gateway.config", "gateway.lifeline", "gateway.wsgi"},
    "gateway.store": {"gateway", "gateway.errors", "gateway.values"},
    "gateway.tokens": {"gateway.errors", "gateway.values"},
    "gateway.values": set(),
    "gateway.workers": {
        "gateway.config",
        "gateway.errors",
        "gateway.network",
        "gateway.prompts",
        "gateway.store",
        "gateway.tokens",
        "gateway.values",
    },
    "gateway.wsgi": {
        "gateway.access",
        "gateway.cache",
        "gateway.config",
        "gateway.content",
        "gateway.errors",
        "gateway.flows",
        "gateway.front",
        "gateway.jobs",
        "gateway.logs",
        "gateway.models",
        "gateway.prompts",
        "gateway.store",
        "gateway.tokens",
        "gateway.workers",
    },
    # --- end of the gateway
    "configs.gunicorn.conf": {
        "worker.config",
        "worker.front",
        "worker.front.wsgi",
        "worker.lifeline",
    },
}

# Where each library may be imported: in these parts and nowhere else.
ENGINE = {part for part in ALLOWED if part.split(".")[:2] == ["worker", "engine"]}
LIBRARIES = {
    "torch": ENGINE,
    "transformers": ENGINE,
    "diffusers": ENGINE - {"worker.engine.chat"},
    "llguidance": {"worker.grammar", "worker.engine.chat"},
    "tokenizers": {"worker.engine.chat", "worker.engine.media", "worker.vram.tokenizers"},
    "av": {"worker.engine.media"},
    "numpy": {"worker.engine.media"},
    "PIL": {"worker.engine.media", "worker.storage"},
    "compel": {"worker.engine.media"},
    "redis": {"worker.queues"},
    "httpx": {"worker.queues", "worker.storage", "worker.jobs"},
    "httpcore": {"worker.storage"},
    "boto3": {"worker.storage"},
    "botocore": {"worker.storage"},
    "flask": {"worker.front", "worker.front.wsgi"},
    "werkzeug": {"worker.front"},
    "prometheus_client": {"worker.front"},
    "gunicorn": {"worker.front.__main__", "worker.front.threads", "configs.gunicorn.conf"},
    "msgspec": {
        "worker.protocol",
        "worker.engine",
        "worker.engine.media",
        "worker.supervisor",
        "worker.front",
        "worker.jobs",
    }
    | {"worker.engine.peaks", "worker.vram.sizes", "worker.vram.planner", "worker.vram.dryrun"},
    "safetensors": {"worker.engine.media"},
    "zmq": {"worker.jobs", "worker.protocol", "worker.engine", "worker.front", "worker.front.wsgi"}
    | {"worker.supervisor"},
    "psutil": {"worker.jobs", "worker.vram", "worker.engine", "worker.front", "worker.supervisor"},
    "pynvml": {"worker.vram"},
    "pydantic": {"worker.config"},
    "rich": {
        "worker.supervisor",
        "worker.supervisor.check",
        "worker.supervisor.planning",
        "orchestrator",
    },
    "setproctitle": {"worker.engine.__main__", "worker.jobs"},
}

GATEWAY_LIBRARIES = {
    "sqlalchemy": {
        "gateway.access",
        "gateway.cache",
        "gateway.front",
        "gateway.jobs",
        "gateway.logs",
        "gateway.cli",
        "gateway.migrations",
        "gateway.models",
        "gateway.store",
        "gateway.workers",
    },
    "alembic": {"gateway.migrations", "gateway.store"},
    "psycopg": {"gateway.cache"},
    "jinja2": {"gateway.prompts"},
    "tokenizers": {"gateway.tokens", "gateway.workers"},
    "jwt": {"gateway.access"},
    "cryptography": {"gateway.access"},
    "redis": {"gateway.jobs"},
    "httpx": {"gateway.access", "gateway.jobs", "gateway.workers"},
    "httpcore": {"gateway.models", "gateway.workers"},
    "flask": {"gateway.front", "gateway.server", "gateway.wsgi"},
    "flask_openapi3": {"gateway.front"},
    "werkzeug": {"gateway.front"},
    "gunicorn": {"gateway.server"},
    "prometheus_client": {"gateway.front", "gateway.logs", "gateway.wsgi"},
    "pydantic": {"gateway.config", "gateway.front"},
    "pydantic_core": {"gateway.front"},
    "rich": {"gateway.cli"},
    "_typeshed": {"gateway.prompts", "gateway.values"},  # for the type checker alone
}

OURS = {"worker", "gateway"}
HEAVY = {"torch", "transformers", "diffusers", "flask", "gunicorn"}


def _name(path: Path) -> str:
    """Dotted name of a source file: "worker.jobs.table", "worker.jobs" for its __init__."""
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {
    _name(path): path
    for path in (
        *sorted((REPOSITORY / "worker").rglob("*.py")),
        # Migrations are run by Alembic, file by file, and are no modules of ours.
        *(
            path
            for path in sorted((REPOSITORY / "gateway").rglob("*.py"))
            if path.parent.name not in ("migrations", "versions") or path.name == "__init__.py"
        ),
        REPOSITORY / "orchestrator.py",
        REPOSITORY / "configs" / "gunicorn.conf.py",
    )
}


def _part(module: str) -> str:
    """The row of the table that a module belongs to: the longest one that begins its name."""
    names = module.split(".")
    for length in range(len(names), 0, -1):
        if ".".join(names[:length]) in ALLOWED and (length > 1 or len(names) == 1):
            return ".".join(names[:length])
    return f"{module} (which has no row in the table)"


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text("utf-8"))


@cache
def _imports(module: str) -> frozenset[str]:
    """Every module that the source of `module` imports, inside functions too."""
    return frozenset(_walk_imports(module))


def _walk_imports(module: str) -> Iterator[str]:
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import; write the whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in SOURCES else str(node.module)


def _imported_parts(part: str) -> set[str]:
    return {
        _part(imported)
        for module in SOURCES
        if _part(module) == part
        for imported in _imports(module)
        if imported.split(".")[0] in OURS
    } - {part}


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_what_the_table_allows(part: str) -> None:
    imported = _imported_parts(part)

    assert imported <= ALLOWED[part]


@pytest.mark.parametrize("part", ALLOWED)
def test_the_table_allows_nothing_that_is_not_used(part: str) -> None:
    imported = _imported_parts(part)

    assert ALLOWED[part] <= imported


def test_every_module_has_a_row_in_the_table() -> None:
    rows = {_part(module) for module in SOURCES}

    assert rows == set(ALLOWED)


def test_the_table_has_no_circle() -> None:
    open_rows = dict(ALLOWED)

    while free := {part for part, needed in open_rows.items() if not needed & set(open_rows)}:
        open_rows = {part: open_rows[part] for part in open_rows.keys() - free}

    assert not open_rows


def test_engines_and_fronts_never_import_each_other() -> None:
    def area(part: str) -> str:
        return ".".join(part.split(".")[:2])

    crossings = {
        (part, allowed)
        for part in ALLOWED
        for allowed in _imported_parts(part)
        if {area(part), area(allowed)} == {"worker.engine", "worker.front"}
    }

    assert crossings == set()


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_uses_only_the_libraries_that_its_part_may(module: str) -> None:
    used = {imported.split(".")[0] for imported in _imports(module)}
    others = used - set(sys.stdlib_module_names) - OURS

    assert {library for library in others if _part(module) not in _users(library)} == set()


def _users(library: str) -> set[str]:
    return LIBRARIES.get(library, set()) | GATEWAY_LIBRARIES.get(library, set())


def test_worker_and_gateway_never_import_each_other() -> None:
    crossings = {
        (part, allowed)
        for part in ALLOWED
        for allowed in _imported_parts(part)
        if {part.split(".")[0], allowed.split(".")[0]} == OURS
    }

    assert crossings == set()


def test_nothing_is_imported_by_a_name_that_is_put_together_at_run_time() -> None:
    dynamic = {
        module
        for module in SOURCES
        for node in ast.walk(_tree(module))
        if (isinstance(node, ast.Name) and node.id in ("__import__", "importlib"))
        or (isinstance(node, ast.Attribute) and node.attr == "import_module")
    }

    assert dynamic == set()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("orchestrator", HEAVY),
        ("worker.supervisor.daemon", HEAVY),
        # The engine's socket must be open before torch is imported, which takes seconds.
        ("worker.engine.__main__", HEAVY),
        ("worker.front.wsgi", HEAVY - {"flask"}),
    ],
)
def test_importing_a_root_loads_none_of_the_heavy_libraries(module: str, absent: set[str]) -> None:
    loaded = _in_a_new_process(f"import sys, json, {module}\nprint(json.dumps([*sys.modules]))")

    assert absent & set(loaded) == set()


def test_importing_prints_nothing_and_reads_no_file_but_source() -> None:
    light = [
        module
        for module in SOURCES
        if module.split(".")[0] in OURS
        and not _needs_torch(module)
        and not module.endswith("__main__")
    ]
    code = f"""
import importlib, json, sys
opened = []
def look(event, arguments):
    path = str(arguments[0]) if event == "open" else ""
    # Libraries may look at what is installed, and .venv lies in the repository.
    if path.startswith({str(REPOSITORY)!r}) and not path.startswith(sys.prefix):
        opened.append(path)
sys.addaudithook(look)
for name in {light!r}:
    importlib.import_module(name)
print(json.dumps([one for one in opened if not one.endswith((".py", ".pyc"))]))
"""

    read = _in_a_new_process(code)  # fails on anything that is printed besides

    assert read == []


def _needs_torch(module: str, seen: frozenset[str] = frozenset()) -> bool:
    """Whether importing a module loads torch: it says so at its top, or one it imports does."""
    names: set[str] = set()
    for node in _tree(module).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    if {name.split(".")[0] for name in names} & {"torch", "transformers", "diffusers"}:
        return True
    return any(
        _needs_torch(name, seen | {module})
        for name in names
        if name in SOURCES and name not in seen
    )


@pytest.mark.parametrize("module", [name for name in SOURCES if name.split(".")[0] in OURS])
def test_a_modules_top_level_only_defines(module: str) -> None:
    body = _tree(module).body

    acting = [node.lineno for node in body if not _only_defines(node)]

    assert acting == []


def _only_defines(node: ast.stmt) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.ClassDef():
            return True
        case ast.Expr(value=ast.Constant()):  # a docstring
            return True
        case ast.If(test=ast.Compare(left=ast.Name(id="__name__")) | ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.Assign() | ast.AnnAssign():
            called = {
                ast.unparse(call.func).split(".")[-1]
                for call in ast.walk(node)
                if isinstance(call, ast.Call)
            }
            return not called & {"open", "print", "read_text", "read_bytes", "getenv", "mkdir"}
        case _:
            return False


def test_no_module_is_named_after_nothing() -> None:
    nameless = {"utils", "util", "helpers", "helper", "common", "misc", "shared", "lib"}

    bad = [module for module in SOURCES if nameless & set(module.lower().split("."))]

    assert bad == []


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        module
        for module, path in SOURCES.items()
        if module.split(".")[0] in OURS
        and path.stat().st_size > 0
        and ast.get_docstring(_tree(module)) is None
    ]

    assert silent == []


def _in_a_new_process(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    printed: list[str] = json.loads(done.stdout)
    return printed
