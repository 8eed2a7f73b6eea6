"""Start one engine process: `python -m worker.engine chat|media --profile PATH`.

Started and watched by orchestrator.py; of no use alone.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys

import setproctitle

from worker import log as worker_log
from worker.catalog import chat_catalog, media_catalog, preload_ids
from worker.config import Settings, load_settings
from worker.engine.host import Engine, EngineHost, Outbox
from worker.engine.leases import Leases
from worker.errors import ConfigError
from worker.lifeline import die_with_any_thread, die_with_parent
from worker.protocol.transport import socket_path
from worker.vram.sizes import Peaks

NICE = 5
# Seconds after which a thread that loads or compiles a model gives Python's lock to one that waits
# for it. A pass takes the lock again after each of its hundreds of operations; with Python's own
# 5 ms a pass beside a load took a hundred times as long.
SWITCH_S = 0.0001

log = logging.getLogger(__name__)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("chat", "media"))
    parser.add_argument("--profile", required=True)
    args = parser.parse_args()
    name = f"engine {args.kind}"
    setproctitle.setproctitle(f"verbatim {name}")
    worker_log.set_up(name)
    die_with_parent()
    die_with_any_thread()
    # Where both compute on the CPU, what answers at once goes before what takes its time.
    os.nice(NICE)
    sys.setswitchinterval(SWITCH_S)
    try:
        settings = load_settings(args.profile, os.environ)
        host = EngineHost(socket_path(settings.state_dir, name), name)
        signal.signal(signal.SIGTERM, lambda *_: host.stop())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the orchestrator decides when to stop
        devices: list[str] = []
        leases = Leases(host.to_broker)

        def build(outbox: Outbox) -> Engine:
            engine = _build(args.kind, settings, outbox, leases, devices)
            # What the imports made stays. Looking through it for garbage, as unloading a model
            # does, holds Python's lock for 0.2 s, in which no other model computes.
            gc.freeze()
            return engine

        host.run(build, lambda: devices[0])
    except ConfigError as exc:
        log.critical("%s", exc)
        return 3  # as gunicorn does for an app that cannot start: trying again cannot help
    return 0


def _build(
    kind: str, settings: Settings, outbox: Outbox, leases: Leases, devices: list[str]
) -> Engine:
    # Imported here, with the socket already open: torch and diffusers take seconds.
    import diffusers
    import transformers

    from worker.engine.device import open_device
    from worker.engine.peaks import measure

    # Weights are converted on the one thread that loads, which computes alone (worker/engine/
    # residents.py), and not on four more with helpers each.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    # Progress bars and advice for people at a terminal; this output is a log file.
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    device = open_device(settings.daemon.device, settings.daemon.threads)
    devices.append(device.type)
    peaks = Peaks(settings.state_dir, lambda questions: [measure(one) for one in questions])
    if kind == "chat":
        from worker.engine.chat.engine import ChatEngine

        catalog = chat_catalog(settings)
        return ChatEngine(
            catalog,
            preload_ids(catalog, settings.chat.preload),
            device,
            settings.state_dir,
            outbox,
            leases,
            peaks,
            kv_bytes=settings.chat.kv_bytes,
            max_running=settings.chat.max_running,
            compiles=settings.chat.compile,
            pinned=settings.chat.pinned_system_prompts,
            pinned_deterministic=settings.chat.deterministic,
        )
    from worker.engine.media.engine import MediaEngine

    catalog = media_catalog(settings)
    return MediaEngine(
        catalog,
        preload_ids(catalog, settings.media.preload),
        settings.media.max_resident,
        device,
        settings.state_dir,
        outbox,
        leases,
        peaks,
        long_prompts=settings.media.long_prompts,
    )


if __name__ == "__main__":
    sys.exit(main())
