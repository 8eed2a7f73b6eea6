"""Train demo-video: WAN's text encoder, autoencoder, transformer and VACE layers, small.

    python scripts/train_demo_video.py                 all stages that are not done, then the files
    python scripts/train_demo_video.py --continue      train the published denoiser further
    python scripts/train_demo_video.py --threads 1     leave the other core alone

Every stage is seeded and saved once a minute: the same command goes on where it was stopped. A
finished stage is read back.

Exit codes: 0 the model folder is written; 2 usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    from demo_models.quiet import quiet_libraries

    quiet_libraries()
    import torch

    torch.set_num_threads(options.threads)
    try:
        target = options.models_dir / "demo-video"
        name = "demo-video-further" if options.go_on else "demo-video"
        work = options.work_dir or REPOSITORY / "state" / "training" / name
        (train_further if options.go_on else train)(work, target, options.seed)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def train(work: Path, target: Path, seed: int) -> None:
    """All stages, and the model folder at the end."""
    import torch

    from demo_models import video_autoencoder, video_data, video_denoiser, video_text
    from demo_models.publishing import publish
    from demo_models.vocabulary import t5_tokenizer

    torch.manual_seed(seed)
    vae = video_autoencoder.train_autoencoder(video_autoencoder.new_autoencoder(), work, seed)

    torch.manual_seed(seed + 1)
    tokenizer = t5_tokenizer()
    encoder = video_text.new_text_encoder(tokenizer)
    video_text.train_text_encoder(encoder, tokenizer, work, seed)
    read = video_text.TextReader(encoder, tokenizer)

    torch.manual_seed(seed + 2)
    denoiser = video_denoiser.new_denoiser()
    for kind in ("image", "clip"):
        lessons = video_data.lessons(kind, vae, work, seed)
        best = video_denoiser.train_denoiser(denoiser, kind, lessons, read, work, seed)
        denoiser.load_state_dict(best.state_dict())  # clips go on from the average over pictures
    transformer = video_denoiser.without_short_texts(denoiser)
    publish(target, lambda folder: write(folder, tokenizer, encoder, vae, transformer))


def train_further(work: Path, target: Path, seed: int) -> None:
    """More clips for the denoiser in `target`, whose other parts stay as they are."""
    import torch
    from diffusers import AutoencoderKLWan
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, UMT5EncoderModel

    from demo_models import video_data, video_denoiser, video_text
    from demo_models.publishing import publish

    vae = AutoencoderKLWan.from_pretrained(target / "vae", torch_dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(target / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(target / "text_encoder", dtype=torch.float32)
    read = video_text.TextReader(encoder, tokenizer)
    denoiser = video_denoiser.new_denoiser()
    weights = target / "transformer" / "diffusion_pytorch_model.safetensors"
    denoiser.load_state_dict(load_file(weights))  # bfloat16, copied into float32
    lessons = video_data.lessons("clip", vae, work, seed)
    best = video_denoiser.train_denoiser(denoiser, "clip", lessons, read, work, seed, further=True)
    transformer = video_denoiser.without_short_texts(best).to(torch.bfloat16)

    def write_again(folder: Path) -> None:
        shutil.copytree(target, folder, dirs_exist_ok=True)
        transformer.save_pretrained(folder / "transformer", safe_serialization=True)

    publish(target, write_again)


def write(folder: Path, tokenizer: Any, encoder: Any, vae: Any, transformer: Any) -> None:
    """One diffusers folder in bfloat16."""
    import torch
    from diffusers import UniPCMultistepScheduler, WanVACEPipeline

    for network in (encoder, vae, transformer):
        network.to(torch.bfloat16)
    WanVACEPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        transformer=transformer,
    ).save_pretrained(folder, safe_serialization=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        help="where the stages are saved (default: state/training/demo-video,"
        " with --continue state/training/demo-video-further)",
    )
    parser.add_argument(
        "--models-dir",
        type=Path,
        default=REPOSITORY / "models",
        help="where demo-video is written (default: models)",
    )
    parser.add_argument(
        "--continue",
        dest="go_on",
        action="store_true",
        help="start from the weights in models/demo-video; only the denoiser learns",
    )
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: 2)")
    parser.add_argument("--seed", type=int, default=11, help="of all random numbers (default: 11)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
