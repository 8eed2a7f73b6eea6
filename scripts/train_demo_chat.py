"""Train demo-chat: a Qwen2 network of two million parameters that enhances prompts.

    python scripts/train_demo_chat.py                 train, or go on, and write models/demo-chat
    python scripts/train_demo_chat.py --continue      train the published weights further
    python scripts/train_demo_chat.py --share 0.01 --models-dir /tmp/try    a quick try

Data are made by a grammar (demo_models/conversation.py) while training runs; nothing is read or
downloaded. An interrupted run goes on where it stopped; the same seed, steps and threads give the
same weights on the same machine. It took 35 minutes of one core, and --continue 28.

Exit codes: 0 the model is written; 2 usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2ForCausalLM, Qwen2Tokenizer

from demo_models.chat_network import new_network
from demo_models.chat_training import Trainer
from demo_models.chat_vocabulary import SPECIALS, chat_tokenizer
from demo_models.publishing import publish
from demo_models.quiet import quiet_libraries
from demo_models.training import count_parameters, run_stage

REPOSITORY = Path(__file__).resolve().parents[1]
# Updates of the stages: random tokens to copy, then conversations; more of these with --continue.
COPYING_STEPS, CHAT_STEPS, FURTHER_STEPS = 200, 2600, 2000
NAME = "demo-chat"
WORK = {False: "demo-chat", True: "demo-chat-further"}  # by --continue


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    quiet_libraries()
    try:
        folder, work_dir = options.models_dir / NAME, options.work_dir
        work_dir = work_dir or REPOSITORY / "state" / "training" / WORK[options.go_on]
        train(folder, work_dir, options.share, options.seed, go_on=options.go_on)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def train(folder: Path, work_folder: Path, share: float, seed: int, *, go_on: bool) -> None:
    """Train to the end and write the model.

    share: of all updates, for a quick try. go_on: start from the weights in `folder`.
    """
    stages: dict[str, tuple[int, Callable[..., Mapping[str, float]]]]
    if go_on:
        # With their own tokenizer: that of today's grammar may have other tokens.
        tokenizer = Qwen2Tokenizer.from_pretrained(folder)
        for how_it_was_loaded in ("is_local", "local_files_only"):  # else its file would say so
            tokenizer.init_kwargs.pop(how_it_was_loaded, None)
        model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        trainer = Trainer(model, tokenizer, seed)
        stages = {"further": (FURTHER_STEPS, trainer.further_step)}
    else:
        tokenizer = chat_tokenizer()
        model = new_network(tokenizer, seed)
        trainer = Trainer(model, tokenizer, seed)
        stages = {
            "copying": (COPYING_STEPS, lambda index, steps: trainer.copying_step(index)),
            "chat": (CHAT_STEPS, trainer.chat_step),
        }
    print(f"{NAME}: {count_parameters([model]):,} parameters, {len(tokenizer)} tokens", flush=True)
    for name, (full, step) in stages.items():
        steps = max(1, round(full * share))
        run_stage(name, steps, partial(step, steps=steps), trainer.parts(), work_folder, seed)
    publish(folder, lambda target: write(trainer.average.average, tokenizer, target))


def write(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """The model folder, with bfloat16 weights."""
    end_of_text, _, message_end = tokenizer.convert_tokens_to_ids(list(SPECIALS))
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text,
        eos_token_id=[message_end, end_of_text],
        pad_token_id=end_of_text,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models-dir",
        type=Path,
        default=REPOSITORY / "models",
        metavar="DIR",
        help=f"where the folder {NAME} is written (default: the repository's models folder)",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="holds the state of unfinished training (default: state/training/demo-chat,"
        " with --continue state/training/demo-chat-further)",
    )
    parser.add_argument(
        "--continue",
        dest="go_on",
        action="store_true",
        help="start from the weights and the tokenizer in models/demo-chat",
    )
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the updates; less is a quick try (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads of torch (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
