"""Chat on one GPU at Qwen2.5-7B's full shape, in process: the engine beside transformers' own ways.

    python scripts/bench_gpu.py --json benchmarks/chat-gpu.json      7B, bf16, on a card
    python scripts/bench_gpu.py --size 3 --device cpu                a small shape, as a trial
    python scripts/bench_gpu.py --only G1 G4                         some of the goals

Random weights, made on the device; nothing is downloaded. Measures
    limits     copies of the device, and to it from pinned memory; matrix products; attention
    G1         one sequence after 1,024 tokens, against `generate` and against the time that reading
               the weights and keys takes at the measured bandwidth
    ways       a decoding step of 1 and of 32 sequences in each way that this machine has: passes
               recorded (with compiled code where --compiled is given), over pages, gathered
    G4         time to the first token of a 2,048-token prompt, cold and with its beginning cached
    G2         32 sequences with 64 to 1,024 new tokens, against one padded `generate` of all
    G3         32 sequences with 256 new tokens each, against transformers' continuous batching

By turns (A B, B A, ...), medians; a goal is met where the median ratio is, and the worst is at
least 0.9 of it. What would begin after --budget-s is left out, and said. The JSON is written after
each row, so a run that is cut leaves what it has. Exit codes: 0 measured; 2 usage.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Before torch is loaded (docs/decisions/0005): on a CPU others may want the same cores.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from chat_bench.models import REPOSITORY, SHAPES

sys.path.insert(0, str(REPOSITORY))

from worker.engine.chat.attention import NAME, PagedKV, register
from worker.engine.chat.cache import BlockPool, blocks_for
from worker.engine.chat.forward import Forward
from worker.engine.chat.graphs import PASSES_BEFORE, PassGraphs
from worker.engine.chat.linear import can_pack, pack
from worker.engine.chat.runner import Runner
from worker.engine.chat.sampling import Sampler, draw
from worker.engine.chat.scheduler import Scheduler, TokenSequence
from worker.engine.chat.varlen import can_attend
from worker.protocol.messages import Sampling
from worker.vram.phases import PASS_TOKENS, block_tokens, reads_pages

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
SMALL = {3: (256, 4, 704, 4, 2), **SHAPES}  # as SHAPES
GREEDY = Sampling(max_tokens=4096, temperature=0.0)
MOST_ROWS = 32
WARM_STEPS = PASSES_BEFORE + 3
CONTEXT = 1024  # tokens before what is decoded
COMPILED = "compiled and recorded"
GOALS = ("G1", "ways", "G4", "G2", "G3")
WANTED = {"G1": 2.5, "G2": 4.0, "G3": 3.0, "G4": 5.0}
WANTED_OF_THE_LIMIT = 0.70
# WAN 2.1's attention of 81 frames: heads, tokens, head size.
WAN_ATTENTION = (12, 32_760, 128)


class Engine:
    """Scheduler, runner and sampler over one model, without messages and text."""

    def __init__(self, model: Any, device: torch.device, tokens: int, *, pages: bool, graphs: bool):
        """tokens: of the pool. pages: attended to where they lie; else gathered."""
        config, dtype = model.config, model.dtype
        size = config.hidden_size // config.num_attention_heads
        name = str(dtype).removeprefix("torch.")
        self.device = device
        self.block_tokens = block_tokens(device.type, name, size)
        blocks = blocks_for(tokens, self.block_tokens)
        kv = PagedKV(
            layers=config.num_hidden_layers, heads=config.num_key_value_heads, head_size=size,
            blocks=blocks, dtype=dtype, device=device, block_tokens=self.block_tokens, pages=pages,
        )  # fmt: skip
        self.forward = Forward("bench", model, device)
        recorded = None
        if graphs:
            recorded = PassGraphs(
                self.forward, kv, most_rows=MOST_ROWS, vocabulary=config.vocab_size,
                pages=blocks_for(min(tokens, config.max_position_embeddings), self.block_tokens),
            )  # fmt: skip
        self.runner = Runner(self.forward, kv, recorded)
        self.pool = BlockPool(blocks, self.block_tokens)
        self.scheduler = Scheduler(
            self.pool, max_running=MOST_ROWS, pass_tokens=max(MOST_ROWS, PASS_TOKENS[device.type])
        )
        self._samplers: dict[TokenSequence, Sampler] = {}

    def add(self, ids: list[int], limit: int) -> TokenSequence:
        sequence = TokenSequence(ids, limit, block_tokens=self.block_tokens)
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

    def decode(self, prompts: Sequence[list[int]], limit: int) -> None:
        """Begin these, and go on until all of them decode and their passes are recorded."""
        for ids in prompts:
            self.add(ids, limit)
        while not all(sequence.decoding for sequence in self.scheduler):
            self.step()
        for _ in range(WARM_STEPS):
            self.step()

    def forget(self) -> None:
        """Also of what runs."""
        for sequence in list(self.scheduler):
            self.scheduler.remove(sequence)
        self.pool.drop_cached()


def _model(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Random weights, the same at each call."""
    config = Qwen2Config(
        **shape, max_position_embeddings=32_768, bos_token_id=None, eos_token_id=None, dtype=dtype
    )
    config._attn_implementation = "sdpa"
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


def _with_our_attention(plain: Any) -> Any:
    """The same tensors, not copies."""
    with torch.device("meta"):
        ours = Qwen2ForCausalLM(copy.deepcopy(plain.config))
    ours.load_state_dict(plain.state_dict(), assign=True)
    ours.model.rotary_emb = plain.model.rotary_emb
    ours.tie_weights()
    ours.set_attn_implementation(NAME)
    return ours.eval()


# --- timing ---------------------------------------------------------------------------------------


def _timed(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _median(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Of `rounds`, after one that warms up."""
    work()
    return statistics.median(_timed(work, device) for _ in range(rounds))


def _by_turns(
    ours: Callable[[], float], theirs: Callable[[], float], rounds: int
) -> list[tuple[float, float]]:
    """Seconds of each in each round: A B, B A, A B and so on, after one of each to warm up."""
    ours(), theirs()
    found = []
    for number in range(rounds):
        if number % 2:
            second, first = theirs(), ours()
        else:
            first, second = ours(), theirs()
        found.append((first, second))
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _ids(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(100, 8000) for _ in range(count)]


def _row(
    goal: str, what: str, against: str, rounds: Sequence[tuple[float, float]],
    *, unit: str, amount: float,
) -> dict[str, Any]:  # fmt: skip
    """amount: what a second is divided by or, of "ms", multiplied with."""
    ratios = [theirs / ours for ours, theirs in rounds]
    in_unit = (lambda s: s * amount) if unit == "ms" else (lambda s: amount / s)
    mine, others = ([in_unit(one[side]) for one in rounds] for side in (0, 1))
    ratio = statistics.median(ratios)
    wanted = WANTED.get(goal)
    row = {
        "goal": goal, "what": what, "unit": unit,
        "ours": round(statistics.median(mine), 2), "ours_rounds": [round(one, 2) for one in mine],
        "against": against, "theirs": round(statistics.median(others), 2),
        "theirs_rounds": [round(one, 2) for one in others],
        "ratio": round(ratio, 2), "worst": round(min(ratios), 2),
    }  # fmt: skip
    if wanted is not None:
        row |= {"wanted": wanted, "met": ratio >= wanted and min(ratios) >= 0.9 * wanted}
    return row


# --- what is measured -----------------------------------------------------------------------------


def limits(device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """GB/s of a large copy (read and written) and of one from pinned memory; TFLOP/s of a square
    matrix product and of attention in WAN's shape."""
    card = device.type == "cuda"
    size = (1 << 30) if card else (1 << 27)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if card else 1024
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    found = {
        "copy_gb_per_s": 2 * size / _median(lambda: target.copy_(source), device, rounds) / 1e9,
        "matmul_tflop_per_s": 2 * side**3 / _median(lambda: matrix @ matrix, device, rounds) / 1e12,
    }
    if card:
        pinned = torch.ones(size, dtype=torch.uint8, pin_memory=True)
        copy_s = _median(lambda: target.copy_(pinned, non_blocking=True), device, rounds)
        found["from_pinned_gb_per_s"] = size / copy_s / 1e9
        heads, tokens, head_size = WAN_ATTENTION
        query = torch.randn(1, heads, tokens, head_size, dtype=dtype, device=device)
        seconds = _median(lambda: scaled_dot_product_attention(query, query, query), device, 3)
        found["attention_tflop_per_s"] = 4 * heads * tokens**2 * head_size / seconds / 1e12
    return {name: round(value, 3) for name, value in found.items()}


def difference(engine: Engine, plain: Any) -> float:
    """Of the logits after a prompt and ten more tokens, computed as the engine does, from the
    library's own; of its largest."""
    ids = _ids(random.Random(4), 300)
    engine.forget()
    sequence = engine.add(ids, 2000)
    for _ in range(WARM_STEPS + 10):
        engine.step()
    pieces = engine.scheduler.plan().pieces
    [row] = engine.runner.run(pieces)
    right = plain(torch.tensor([sequence.ids], device=engine.device), logits_to_keep=1).logits
    off = (row.float() - right[0, -1].float()).abs().max() / right.float().abs().max()
    engine.forget()
    return float(off)


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


def decode(
    engine: Engine, plain: Any, limit_gb_per_s: float, rounds: int, steps: int
) -> dict[str, Any]:
    device = engine.device
    ids = _ids(random.Random(1), CONTEXT)
    engine.forget()
    engine.decode([ids], 4096)

    def ours() -> float:
        return _timed(lambda: [engine.step() for _ in range(steps)], device) / steps

    def theirs() -> float:
        few, many = (
            _timed(lambda count=count: _generate(plain, [ids], count, device), device)
            for count in (4, 4 + steps)
        )
        return (many - few) / steps

    found = _by_turns(ours, theirs, rounds)
    engine.forget()
    config = plain.config
    weights = sum(one.numel() for name, one in plain.named_parameters() if "embed" not in name)
    if config.tie_word_embeddings:
        weights += config.vocab_size * config.hidden_size
    keys = 2 * config.num_hidden_layers * config.num_key_value_heads * CONTEXT
    keys *= config.hidden_size // config.num_attention_heads
    limit_s = (weights + keys) * plain.dtype.itemsize / (limit_gb_per_s * 1e9)
    row = _row("G1", "decode, one sequence", "generate", found, unit="tok/s", amount=1.0)
    of_the_limit = limit_s / statistics.median(one for one, _ in found)
    return row | {
        "of_the_limit": round(of_the_limit, 3),
        "met": row["met"] and of_the_limit >= WANTED_OF_THE_LIMIT,
    }


def way(engine: Engine, name: str, rows: int, rounds: int, steps: int) -> dict[str, Any]:
    """A decoding step, and how much of it is the pass: the rest is the host's."""
    device = engine.device
    chance = random.Random(5)
    engine.forget()
    engine.decode([_ids(chance, CONTEXT) for _ in range(rows)], 4096)
    found = []
    for _ in range(rounds):
        step_s = _timed(lambda: [engine.step() for _ in range(steps)], device) / steps
        pieces = engine.scheduler.plan().pieces
        again = partial(engine.runner.run, pieces)
        pass_s = _timed(lambda again=again: [again() for _ in range(steps)], device) / steps
        found.append((step_s, pass_s))
    engine.forget()
    row = _row("", f"a step of {rows}, {name}", "its pass", found, unit="ms", amount=1e3)
    return {"way": name, "rows": rows} | row


def prefix(engine: Engine, tokens: int, rounds: int) -> dict[str, Any]:
    chance = random.Random(3)
    beginning = _ids(chance, tokens)

    def first_token() -> float:
        def work() -> None:
            engine.add(beginning + _ids(chance, 12), 1)
            engine.run()

        return _timed(work, engine.device)

    def cold() -> float:
        engine.forget()
        return first_token()

    for _ in range(WARM_STEPS):  # until both are recorded
        cold(), first_token()
    found = []
    for _ in range(rounds):
        second = cold()
        found.append((first_token(), second))
    what = f"first token, {tokens} tokens in common"
    return _row("G4", what, "nothing cached", found, unit="ms", amount=1e3)


def batch(engine: Engine, plain: Any, count: int, most: int, rounds: int) -> dict[str, Any]:
    device = engine.device
    chance = random.Random(2)
    asks = [(_ids(chance, 128), chance.randint(most // 16, most)) for _ in range(count)]
    longest = max(tokens for _, tokens in asks)
    prompts = [ids for ids, _ in asks]

    def work() -> None:
        for ids, tokens in asks:
            engine.add(ids, tokens)
        engine.run()

    def ours() -> float:
        engine.forget()
        return _timed(work, device)

    def theirs() -> float:
        return _timed(lambda: _generate(plain, prompts, longest, device), device)

    found = _by_turns(ours, theirs, rounds)
    what = f"{count} sequences, {most // 16} to {most} new tokens"
    wanted = sum(tokens for _, tokens in asks)
    return _row("G2", what, "generate, padded batch", found, unit="tok/s", amount=wanted)


def continuous(engine: Engine, plain: Any, count: int, tokens: int, rounds: int) -> dict[str, Any]:
    """transformers' own continuous batching with SDPA, once it has started and warmed up."""
    from transformers import ContinuousBatchingConfig

    device = engine.device
    chance = random.Random(6)
    prompts = [_ids(chance, 128) for _ in range(count)]
    blocks = count * (blocks_for(128 + tokens, 256) + 1)  # else it takes most of the memory

    def ours() -> float:
        def work() -> None:
            for ids in prompts:
                engine.add(ids, tokens)
            engine.run()

        engine.forget()
        return _timed(work, device)

    context = plain.continuous_batching_context_manager(
        generation_config=GenerationConfig(
            max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=-1
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=256, num_blocks=blocks, auto_switch_to_flash=False
        ),
        block=True,
        timeout=5,
    )
    with context as manager:

        def theirs() -> float:
            def work() -> None:
                manager.add_requests(inputs=prompts, max_new_tokens=tokens)
                made = done = 0
                while done < count:
                    result = manager.get_result(timeout=1)
                    if result is not None and result.is_finished():
                        made, done = made + len(result.generated_tokens), done + 1
                    elif result is None and not manager.is_running():
                        raise RuntimeError("it ended before its requests")
                if made != count * tokens:
                    raise RuntimeError(f"it made {made} tokens of {count * tokens}")

            return _timed(work, device)

        found = _by_turns(ours, theirs, rounds)
    what = f"{count} sequences, {tokens} new tokens"
    against = f"transformers {transformers.__version__}, continuous batching, SDPA"
    return _row("G3", what, against, found, unit="tok/s", amount=count * tokens)


# --- the run --------------------------------------------------------------------------------------


class Report:
    """Rows as they come: on the terminal, and in the file."""

    def __init__(self, path: Path | None, record: dict[str, Any]):
        self._console = Console()
        self._path = path
        self._record = record | {"rows": [], "left_out": []}

    def say(self, text: object) -> None:
        self._console.print(text, highlight=False)

    def add(self, row: dict[str, Any]) -> None:
        self._record["rows"].append(row)
        met = {True: ", met", False: ", not met"}.get(row.get("met"), "")  # type: ignore[arg-type]
        self.say(
            f"{row['goal']} {row['what']}: {row['ours']:g} {row['unit']} against {row['theirs']:g} "
            f"({row['against']}), {row['ratio']:.2f}x (worst {row['worst']:.2f}){met}"
        )
        self._write()

    def left_out(self, what: str, why: object) -> None:
        self._record["left_out"].append(f"{what}: {why}")
        self.say(f"{what} is left out: {why}")
        self._write()

    def table(self) -> None:
        table = Table("goal", "what", "ours", "against", "theirs", "ratio", "worst", "of the limit")
        for row in self._record["rows"]:
            limit = f"{row['of_the_limit']:.2f}" if "of_the_limit" in row else ""
            table.add_row(
                row["goal"], row["what"], f"{row['ours']:g} {row['unit']}", row["against"],
                f"{row['theirs']:g}", f"{row['ratio']:.2f}x", f"{row['worst']:.2f}x", limit,
            )  # fmt: skip
        self._console.print(table)

    def _write(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._record, indent=1) + "\n")


def ways_of(model: Any, device: torch.device, compiled: bool) -> dict[str, dict[str, bool]]:
    """What engines this machine can have, the product's own first."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    gathered = {"gathered": {"pages": False, "graphs": False}}
    pages = reads_pages(device.type, str(model.dtype).removeprefix("torch."), size) and can_attend(
        device, model.dtype, config.num_key_value_heads, config.num_attention_heads, size
    )
    if not pages:
        return gathered
    found = {"recorded": {"pages": True, "graphs": True}}
    if compiled:
        found[COMPILED] = {"pages": True, "graphs": True}
    return {**found, "over pages": {"pages": True, "graphs": False}, **gathered}


def measure(
    report: Report,
    plain: Any,
    device: torch.device,
    args: argparse.Namespace,
    found: dict[str, float],
    compiled_code: Path,
) -> None:
    """found: the limits. Rows in the order of GOALS, as far as the budget goes."""
    full = args.size == 7600
    started = time.monotonic()
    ours = _with_our_attention(plain)
    if device.type == "cpu" and can_pack(plain.dtype):
        pack(ours)
    tokens = (64 if full else 24) * 1024
    ways = ways_of(ours, device, args.compiled)
    first = next(iter(ways))
    engine = Engine(ours, device, tokens, **ways[first])
    off = difference(engine, plain)
    report.say(f"logits are off by {off:.2g} of the largest ({first})")
    assert off < 0.05, "these are no logits of the model"
    steps, many = 32 if full else 8, 1024 if full else 48

    def ways_rows() -> None:
        for name, how in ways.items():
            one = engine
            if name != first:
                one = Engine(ours, device, (MOST_ROWS + 16) * 1024 if full else tokens, **how)
            if name == COMPILED:
                one.forward.compile_in_background(compiled_code)
                if not one.forward.wait_until_compiled(180):
                    report.left_out(name, "it was not compiled")
                    continue
            for rows in (1, MOST_ROWS if full else 8):
                report.add(way(one, name, rows, args.rounds, steps))

    rows: dict[str, Callable[[], None]] = {
        "G1": lambda: report.add(decode(engine, plain, found["copy_gb_per_s"], args.rounds, steps)),
        "ways": ways_rows,
        "G4": lambda: report.add(prefix(engine, 2048 if full else 1024, args.rounds)),
        "G2": lambda: report.add(
            batch(engine, plain, MOST_ROWS if full else 8, many, 2 if full else args.rounds)
        ),
        "G3": lambda: report.add(
            continuous(engine, plain, MOST_ROWS if full else 8, 256 if full else 24, 2)
        ),
    }
    for goal in GOALS:
        if goal not in args.only:
            continue
        spent = time.monotonic() - started
        if spent > args.budget_s:
            report.left_out(goal, f"{spent:.0f} s are spent, of {args.budget_s:g}")
            continue
        if goal != "G3":
            rows[goal]()
            continue
        try:
            rows[goal]()
        except Exception as exc:  # a peer, which may not run here
            report.left_out(goal, f"{type(exc).__name__}: {exc}")


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", type=int, choices=(*SMALL, 7600), default=7600,
        help="million parameters (default: 7600, Qwen2.5-7B's shape)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=GOALS, default=GOALS, help="default: all")
    parser.add_argument(
        "--compiled", action="store_true",
        help="also recorded passes of compiled code, which takes a minute to compile",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget-s", type=float, default=330.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no usable NVIDIA card; --device cpu --size 3 runs without one")
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape: dict[str, Any] = FULL
    if args.size != 7600:
        hidden, layers, wide, heads, key_heads = SMALL[args.size]
        shape = {
            "vocab_size": 8192, "hidden_size": hidden, "intermediate_size": wide,
            "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": key_heads, "tie_word_embeddings": True,
        }  # fmt: skip
    register()
    found = limits(device, dtype, args.rounds)
    about = {"device": "cpu"}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        about = {
            "device": card.name, "capability": f"{card.major}.{card.minor}",
            "memory_bytes": card.total_memory, "cuda": torch.version.cuda,
        }  # fmt: skip
    report = Report(
        args.json,
        about
        | {
            "torch": torch.__version__, "transformers": transformers.__version__,
            "size": args.size, "dtype": str(dtype), "limits": found,
        },
    )  # fmt: skip
    report.say(about | found)
    with TemporaryDirectory() as folder:
        plain = _model(shape, device, dtype)
        measure(report, plain, device, args, found, Path(folder) / "compiled")
    report.table()
    if device.type == "cuda":
        report.say(f"most memory taken: {torch.cuda.max_memory_reserved() / 1e9:.1f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
