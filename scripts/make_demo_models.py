"""Make the demo models: small networks of the real architectures with random weights.

    python scripts/make_demo_models.py             make what is missing, damaged or outdated
    python scripts/make_demo_models.py --force     make all of them anew
    python scripts/make_demo_models.py --check     look only, change nothing

demo-chat (Qwen2), demo-image (SDXL) and demo-video (Wan) let the daemon run on any machine without
a download. Their answers are noise. Two builds give the same weights, byte for byte.

Exit codes: 0 all models are there and whole; 1 --check found a problem, or a build failed;
2 usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
NAMES = ("demo-chat", "demo-image", "demo-video")
MANIFEST = "manifest.json"
LOCK = ".demo-models.lock"
# What the folders hold. Raise it with every change to demo_models/: folders made by another
# version are made anew.
BUILDER_VERSION = "1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    folder: Path = options.models_dir
    problems = find_problems(folder)
    if options.check:
        for name, what in problems.items():
            print(f"{name}: {what}; run {_command(folder)}")
        if not problems:
            print(_all_good(folder))
        return 1 if problems else 0
    if not problems and not options.force:
        print(_all_good(folder))
        return 0
    try:
        make_models(folder, force=options.force)
    except KeyboardInterrupt:
        print("interrupted; the same command starts again", file=sys.stderr)
        return 130
    except ImportError as error:
        print(f"cannot make the demo models: {error}; run scripts/setup first", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"cannot make the demo models in {folder}: {error}", file=sys.stderr)
        return 1
    return 0


def find_problems(folder: Path) -> dict[str, str]:
    """What is wrong with each demo model in `folder`; empty when all are whole."""
    found = ((name, _problem(folder / name)) for name in NAMES)
    return {name: what for name, what in found if what}


def make_models(folder: Path, *, force: bool = False) -> None:
    """Make what is not whole, or everything; says what it does on standard output.

    Processes that do this at the same time wait for each other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with _locked(folder):
        # Another process may have made them while this one waited.
        wanted = NAMES if force else tuple(find_problems(folder))
        # Nobody else builds now, so these are what killed builds left behind.
        for leftover in [*folder.glob(".demo-*.partial-*"), *folder.glob(".demo-*.old-*")]:
            _remove(leftover)
        if wanted:
            _build(folder, wanted)
    size = sum(file.stat().st_size for name in wanted for file in _files(folder / name))
    seconds = time.monotonic() - started
    print(
        f"made {', '.join(wanted)} in {folder}: {size / 1e6:.1f} MB in {seconds:.0f} s"
        if wanted
        else _all_good(folder)
    )


def _build(folder: Path, names: Sequence[str]) -> None:
    with _shown_steps() as show:
        show("libraries")
        from safetensors import SafetensorError
        from transformers.utils import logging

        # What they have to say is about components that these models do not use.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        from demo_models.networks import BUILDERS

        for name in names:
            partial = folder / f".{name}.partial-{os.getpid()}"
            try:
                for step in BUILDERS[name](partial):
                    show(f"{name}: {step}")
                _write_manifest(partial)
                _publish(partial, folder / name)
            except SafetensorError as error:  # a full disk, for one
                raise OSError(str(error)) from error
            finally:
                _remove(partial)


@contextmanager
def _shown_steps() -> Iterator[Callable[[str], None]]:
    """A function that shows the start of a step: as a bar on a terminal, else as a line."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    if not sys.stdout.isatty():
        yield lambda text: print(text, flush=True)
        return
    columns = (TextColumn("{task.description:28}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:

        def show(text: str) -> None:
            for task in progress.task_ids:
                progress.update(task, total=1, completed=1)
            progress.add_task(text, total=None)

        yield show
        for task in progress.task_ids:
            progress.update(task, total=1, completed=1)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when this process ends, however it ends."""
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another process makes the demo models; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_manifest(folder: Path) -> None:
    files = {
        file.relative_to(folder).as_posix(): {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in _files(folder)
    }
    manifest = {"builder": BUILDER_VERSION, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    # safetensors makes files that only their owner can read; the daemon may be another user.
    mode = (folder / MANIFEST).stat().st_mode
    for name in files:
        (folder / name).chmod(mode)


def _publish(partial: Path, target: Path) -> None:
    """Put a finished folder in its place; a reader sees the old one, none or the new one."""
    if target.exists() or target.is_symlink():
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        target.rename(old)
        partial.rename(target)
        _remove(old)
    else:
        partial.rename(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _problem(folder: Path) -> str | None:
    """The first thing wrong with one model, or None."""
    if not os.path.isdir(folder):  # unlike Path.is_dir, does not raise for a closed parent
        return "is missing"
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        builder, files = manifest["builder"], manifest["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or damaged"
    if builder != BUILDER_VERSION:
        return f"was made by builder version {builder}, this is version {BUILDER_VERSION}"
    for name, (size, digest) in expected.items():
        try:
            content = (folder / name).read_bytes()
        except OSError:
            return f"{name} is missing or cannot be read"
        if len(content) != size:
            return f"{name} is damaged: {len(content)} bytes instead of {size}"
        if hashlib.sha256(content).hexdigest() != digest:
            return f"{name} is damaged: its sha256 is not the recorded one"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _all_good(folder: Path) -> str:
    return f"the demo models in {folder} are there and whole"


def _command(folder: Path) -> str:
    place = "" if folder == REPOSITORY / "models" else f" --models-dir {folder}"
    return f"python scripts/make_demo_models.py{place}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models-dir",
        type=Path,
        default=REPOSITORY / "models",
        metavar="DIR",
        help="where the model folders are (default: the repository's models folder)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--force", action="store_true", help="make all models, whole or not")
    what.add_argument(
        "--check", action="store_true", help="make nothing; a line per problem and exit code 1"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
