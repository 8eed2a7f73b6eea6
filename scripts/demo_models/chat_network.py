"""demo-chat's network at the start of training: Qwen2, small, and about to copy.

Copying needs one head that looks at the token before, and one in a later layer that looks for
where the current token was before and takes what followed it (Olsson et al., "In-context learning
and induction heads", 2022). Networks find both, but later than this training ends. Here the first
is there at the start and the second leans that way; training sharpens them.
"""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from demo_models.chat_vocabulary import CONTEXT, SPECIALS

HIDDEN, HEADS, KEY_HEADS = 192, 6, 2
# Of a head. Dimensions i and i + HEAD / 2 turn together, by THETA ** (-2 i / HEAD) a token.
HEAD = 48
THETA = 1_000_000.0
EMBEDDING_SPREAD = 0.03
# Pairs of dimensions that turn fast tell neighbours apart, slow ones carry words over distances.
FAST_PAIRS, FIRST_SLOW_PAIR = 12, 10


def new_network(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """Qwen2 as published, small: grouped queries, biases on them, tied embeddings."""
    end_of_text, _, message_end = tokenizer.convert_tokens_to_ids(list(SPECIALS))
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_HEADS,
            head_dim=HEAD,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
            tie_word_embeddings=True,
            initializer_range=EMBEDDING_SPREAD,
            bos_token_id=end_of_text,
            eos_token_id=message_end,
            pad_token_id=end_of_text,
            dtype="float32",
        )
    )
    add_copying_heads(model)
    return model


@torch.no_grad()
def add_copying_heads(model: Qwen2ForCausalLM) -> None:
    """Two heads of layer 0 write what the token before was; two of layer 1 match and repeat."""
    before, repeat = (model.model.layers[index].self_attn for index in (0, 1))
    half = HEAD // 2
    # Query and key are constant but for the turn by their positions: alike at a distance of one.
    angles = THETA ** (-torch.arange(FAST_PAIRS) / half)
    sharpness = 7.0
    slow = [*range(FIRST_SLOW_PAIR, half), *range(half + FIRST_SLOW_PAIR, HEAD)]
    for layer in (before, repeat):
        layer.o_proj.weight *= 0.1  # the other heads are quiet at first
    for group in range(KEY_HEADS):
        head = group * (HEADS // KEY_HEADS)  # the first query head of the group
        query, key = head * HEAD, group * HEAD
        before.k_proj.bias[key : key + FAST_PAIRS] = sharpness
        before.q_proj.bias[query : query + FAST_PAIRS] = sharpness * angles.cos()
        before.q_proj.bias[query + half : query + half + FAST_PAIRS] = -sharpness * angles.sin()
        words, written = _directions(), _directions()
        before.v_proj.weight[key : key + HEAD] = words
        before.o_proj.weight[:, query : query + HEAD] = 0.06 * written.T
        # The word now, and the word before it, in the same directions.
        for where in slow:
            repeat.q_proj.weight[query + where] = 3.0 * words[where]
            repeat.k_proj.weight[key + where] = 3.0 * written[where]
        taken = _directions()
        repeat.v_proj.weight[key : key + HEAD] = taken
        repeat.o_proj.weight[:, query : query + HEAD] = 0.25 * taken.T


def _directions() -> torch.Tensor:
    """HEAD orthonormal rows in HIDDEN dimensions."""
    return torch.linalg.qr(torch.randn(HIDDEN, HEAD))[0].T
