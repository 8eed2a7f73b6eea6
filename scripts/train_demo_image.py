"""Train demo-image: a Stable Diffusion XL of 4 M parameters that paints coloured shapes.

    python scripts/train_demo_image.py                 all stages, then models/demo-image
    python scripts/train_demo_image.py --until vae     stop after a stage
    python scripts/train_demo_image.py --continue      train the published denoiser further

Stages: vae (pictures to latents and back), text (both text encoders learn to read), latents (the
training set, drawn and encoded once), unet (the denoiser). Each is saved every minute in the work
folder and goes on where it stopped; the same seed draws the same numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES = ("vae", "text", "latents", "unet", "publish")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    import torch

    from demo_models import image_training
    from demo_models.quiet import quiet_libraries

    torch.set_num_threads(options.threads)
    quiet_libraries()
    name = "demo-image-further" if options.go_on else "demo-image"
    work_dir = options.work_dir or REPOSITORY / "state" / "training" / name
    target = options.models_dir / "demo-image"
    job = image_training.Job(work_dir, target, options.seed, go_on=options.go_on)
    stages = {
        "vae": job.train_vae,
        "text": job.train_text,
        "latents": job.make_latents,
        "unet": job.train_unet,
        "publish": job.publish,
    }
    try:
        for name in STAGES[: STAGES.index(options.until) + 1]:
            stages[name]()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last save", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="where checkpoints and the training set are kept (default: state/training/demo-image,"
        " with --continue state/training/demo-image-further)",
    )
    parser.add_argument(
        "--models-dir",
        type=Path,
        default=REPOSITORY / "models",
        metavar="DIR",
        help="demo-image in it is replaced at the end (default: models)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of everything random (default 1)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument(
        "--continue",
        dest="go_on",
        action="store_true",
        help="start from the weights in models/demo-image; only the denoiser learns",
    )
    parser.add_argument(
        "--until", choices=STAGES, default="publish", help="the last stage to run (default: all)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
