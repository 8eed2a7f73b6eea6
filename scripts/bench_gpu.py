"""Chat on one GPU at Qwen2.5-7B's full shape, in process: the engine beside transformers' own ways.

    python scripts/bench_gpu.py --json benchmarks/chat-gpu.json      7B, bf16, on a card
    python scripts/bench_gpu.py --size 25 --device cpu               a small shape, as a trial

Random weights, made on the device; nothing is downloaded. Measures
    limits     this device's memory copies and matrix products
    decode     one sequence after 1,024 tokens, against `generate` and the time that reading the
               weights and keys takes at the measured bandwidth
    batch      32 sequences with 64 to 1,024 new tokens, against one padded `generate` of all
    continuous the same, against transformers' continuous batching
    prefix     time to the first token of a 2,048-token prompt, cold and with its beginning cached

Prints a table and writes JSON. Exit codes: 0 measured; 2 usage.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from chat_bench.models import REPOSITORY, SHAPES

sys.path.insert(0, str(REPOSITORY))

from worker.engine.chat.attention import NAME, PagedKV, register
from worker.engine.chat.cache import BLOCK_TOKENS, BlockPool
from worker.engine.chat.forward import Forward
from worker.engine.chat.linear import can_pack, pack
from worker.engine.chat.model import PASS_TOKENS
from worker.engine.chat.runner import Runner
from worker.engine.chat.sampling import Sampler, draw
from worker.engine.chat.scheduler import Scheduler, TokenSequence
from worker.protocol.messages import Sampling

# Qwen2.5-7B: https://huggingface.co/Qwen/Qwen2.5-7B/blob/main/config.json
FULL = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
GREEDY = Sampling(max_tokens=4096, temperature=0.0)


class Engine:
    """Scheduler, runner and sampler over one model, without messages and text."""

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype, blocks: int):
        config = model.config
        kv = PagedKV(
            layers=config.num_hidden_layers,
            heads=config.num_key_value_heads,
            head_size=config.hidden_size // config.num_attention_heads,
            blocks=blocks,
            dtype=dtype,
            device=device,
        )
        self.device = device
        self.runner = Runner(Forward("bench", model), kv)
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(
            self.pool, max_running=64, pass_tokens=max(64, PASS_TOKENS[device.type])
        )
        self._samplers: dict[TokenSequence, Sampler] = {}

    def add(self, ids: list[int], limit: int) -> TokenSequence:
        sequence = TokenSequence(ids, limit)
        self._samplers[sequence] = Sampler(GREEDY, ids)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        pieces = self.scheduler.plan().pieces
        logits = self.runner.run(pieces)
        for piece in pieces:
            self.scheduler.computed(piece)
        sampled = [piece.sequence for piece in pieces if piece.samples]
        if not sampled:
            return
        tokens = draw(torch.stack(logits), [self._samplers[one] for one in sampled])
        for sequence, token in zip(sampled, tokens, strict=True):
            assert isinstance(token, int), token
            sequence.ids.append(token)
            if len(sequence.ids) - sequence.prompt_tokens == sequence.limit:
                self.scheduler.remove(sequence)
                del self._samplers[sequence]

    def run(self) -> None:
        while any(self.scheduler):
            self.step()

    def forget(self) -> None:
        self.pool.drop_cached()


def _model(shape: dict[str, Any], attention: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The same random weights at each call."""
    config = Qwen2Config(
        **shape, max_position_embeddings=32_768, bos_token_id=None, eos_token_id=None, dtype=dtype
    )
    config._attn_implementation = attention
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(config).to(device)
    model.tie_weights()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


def _seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median of `rounds`, after one that warms up."""
    times = []
    for _ in range(rounds + 1):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def limits(device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """GB/s of a large copy (read and written), TFLOP/s of a square matrix product."""
    size = (1 << 30) if device.type == "cuda" else (1 << 27)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _seconds(lambda: target.copy_(source), device, rounds)
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    product_s = _seconds(lambda: matrix @ matrix, device, rounds)
    return {
        "copy_gb_per_s": round(2 * size / copy_s / 1e9, 1),
        "matmul_tflop_per_s": round(2 * side**3 / product_s / 1e12, 3),
    }


def _ids(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(100, 8000) for _ in range(count)]


def _generate(model: Any, prompts: Sequence[list[int]], tokens: int, device: torch.device) -> None:
    """Prompts of one length."""
    batch = torch.tensor(prompts, device=device)
    model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
    )


def decode(engine: Engine, plain: Any, limit_gb_per_s: float, rounds: int) -> dict[str, Any]:
    device = engine.device
    ids = _ids(random.Random(1), 1024)
    engine.add(ids, 2000)
    while not next(iter(engine.scheduler)).decoding:
        engine.step()
    ours_s = _seconds(engine.step, device, 20 * rounds)
    for sequence in list(engine.scheduler):
        engine.scheduler.remove(sequence)
    few, many = (
        _seconds(lambda count=count: _generate(plain, [ids], count, device), device, rounds)
        for count in (4, 36)
    )
    theirs_s = (many - few) / 32
    config = plain.config
    weights = sum(one.numel() for name, one in plain.named_parameters() if "embed" not in name)
    if config.tie_word_embeddings:
        weights += config.vocab_size * config.hidden_size
    keys = 2 * config.num_hidden_layers * config.num_key_value_heads * 1024
    keys *= config.hidden_size // config.num_attention_heads
    limit_s = (weights + keys) * plain.dtype.itemsize / (limit_gb_per_s * 1e9)
    return {
        "what": "decode, one sequence",
        "unit": "tok/s",
        "ours": round(1 / ours_s, 1),
        "against": "generate",
        "theirs": round(1 / theirs_s, 1),
        "ratio": round(theirs_s / ours_s, 2),
        "of_the_limit": round(limit_s / ours_s, 3),
    }


def batch(
    engine: Engine, plain: Any, count: int, most: int, rounds: int
) -> tuple[dict[str, Any], list[tuple[list[int], int]]]:
    device = engine.device
    chance = random.Random(2)
    asks = [(_ids(chance, 128), chance.randint(most // 16, most)) for _ in range(count)]

    def ours() -> None:
        engine.forget()
        for ids, tokens in asks:
            engine.add(ids, tokens)
        engine.run()

    longest = max(tokens for _, tokens in asks)
    wanted = sum(tokens for _, tokens in asks)
    ours_s = _seconds(ours, device, rounds)
    theirs_s = _seconds(
        lambda: _generate(plain, [ids for ids, _ in asks], longest, device), device, rounds
    )
    row = {
        "what": f"{count} sequences, {most // 16} to {most} new tokens",
        "unit": "tok/s",
        "ours": round(wanted / ours_s, 1),
        "against": "generate, padded batch",
        "theirs": round(wanted / theirs_s, 1),
        "ratio": round(theirs_s / ours_s, 2),
    }
    return row, asks


def continuous(
    plain: Any, asks: Sequence[tuple[list[int], int]], ours: float, device: torch.device
) -> dict[str, Any]:
    """transformers' own continuous batching; every answer as long as the longest, so that only the
    tokens that were wanted are counted for it and for us."""
    config = GenerationConfig(
        max_new_tokens=max(tokens for _, tokens in asks), do_sample=False, pad_token_id=0,
        eos_token_id=-1,
    )  # fmt: skip
    made = 0

    def theirs() -> None:
        nonlocal made
        found = plain.generate_batch([ids for ids, _ in asks], generation_config=config)
        made = sum(len(one.generated_tokens) for one in found.values())

    seconds = _seconds(theirs, device, 1)
    return {
        "what": f"{len(asks)} sequences",
        "unit": "tok/s",
        "ours": ours,
        "against": f"transformers {transformers.__version__}, continuous batching",
        "theirs": round(made / seconds, 1),
        "ratio": round(ours / (made / seconds), 2),
    }


def prefix(engine: Engine, tokens: int, rounds: int) -> dict[str, Any]:
    chance = random.Random(3)
    beginning = _ids(chance, tokens)

    def first_token() -> None:
        engine.add(beginning + _ids(chance, 12), 1)
        engine.run()

    def cold() -> None:
        engine.forget()
        first_token()

    cold_s = _seconds(cold, engine.device, rounds)
    warm_s = _seconds(first_token, engine.device, rounds)
    return {
        "what": f"first token, {tokens} tokens in common",
        "unit": "ms",
        "ours": round(1e3 * warm_s, 2),
        "against": "nothing cached",
        "theirs": round(1e3 * cold_s, 2),
        "ratio": round(cold_s / warm_s, 2),
    }


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", type=int, choices=(*SHAPES, 7600), default=7600,
        help="million parameters (default: 7600, Qwen2.5-7B's shape)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no usable NVIDIA card; --device cpu --size 25 runs without one")
    console = Console()
    device, full = torch.device(args.device), args.size == 7600
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if full:
        shape = FULL
    else:
        hidden, layers, wide, heads, key_heads = SHAPES[args.size]
        shape = {
            "vocab_size": 8192, "hidden_size": hidden, "intermediate_size": wide,
            "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": key_heads, "tie_word_embeddings": True,
        }  # fmt: skip
    register()
    found = limits(device, dtype, args.rounds)
    console.print(found)
    plain = _model(shape, "sdpa", device, dtype)
    with torch.device("meta"):
        ours = Qwen2ForCausalLM(copy.deepcopy(plain.config))
    ours.load_state_dict(plain.state_dict(), assign=True)  # the same tensors, not copies
    ours.model.rotary_emb = plain.model.rotary_emb
    ours.tie_weights()
    ours.set_attn_implementation(NAME)
    ours.eval()
    if device.type == "cpu" and can_pack(dtype):
        pack(ours)
    engine = Engine(ours, device, dtype, blocks=(64 if full else 24) * 1024 // BLOCK_TOKENS)
    rows = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        console.print(f"{row['what']}: {row['ours']:g} {row['unit']}", highlight=False)

    add(decode(engine, plain, found["copy_gb_per_s"], args.rounds))
    row, asks = batch(
        engine, plain, 32 if full else 8, 1024 if full else 64, 1 if full else args.rounds
    )
    add(row)
    try:
        add(continuous(plain, asks, row["ours"], device))
    except Exception as exc:  # a peer, which may not run here
        console.print(f"transformers' continuous batching is left out: {exc}", highlight=False)
    add(prefix(engine, 2048 if full else 1024, args.rounds))
    table = Table("what", "ours", "against", "theirs", "ratio", "of the limit")
    for row in rows:
        limit = f"{row['of_the_limit']:.2f}" if "of_the_limit" in row else ""
        table.add_row(
            row["what"], f"{row['ours']:g} {row['unit']}", row["against"], f"{row['theirs']:g}",
            f"{row['ratio']:.2f}x", limit,
        )  # fmt: skip
    console.print(table)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        record = {
            "device": name, "torch": torch.__version__, "size": args.size, "dtype": str(dtype),
            "limits": found, "rows": rows,
        }  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"written: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
