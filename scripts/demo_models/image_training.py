"""How demo-image learns, stage by stage."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from demo_models.drawing import PALETTE, colour_shares, draw
from demo_models.layout import CLASSES, Overheard, layout, layout_loss
from demo_models.muon import Muon
from demo_models.publishing import publish
from demo_models.reading import PooledReader, Reader, train_reader
from demo_models.scenes import (
    Description,
    Scene,
    caption,
    opened,
    place,
    random_description,
    training_description,
    with_details,
)
from demo_models.training import Average, learning_rate, run_stage, set_learning_rate
from demo_models.vocabulary import clip_tokenizer
from demo_models.whitening import whiten

WIDTH = HEIGHT = 128  # pixels; the native size
VAE_STEPS = 1500
VAE_CROP = 48  # pixels: the convolutions learn as much from parts of pictures
VAE_BATCH = 16
VAE_RATE = 2e-3
VAE_NOISE = 0.4  # of latents of unit size, at most
TEXT_WIDTHS = (64, 96)  # of the two text encoders
TEXT_STEPS = 500
# (width, height) -> number of training scenes, encoded once
SCENES = {(128, 128): 8000, (192, 128): 1400, (128, 192): 1400}
UNET_STEPS, FURTHER_STEPS = 2400, 1400  # of new weights, of published ones
UNET_BATCH = 32
UNET_RATE = 1.5e-3
LAYOUT_WEIGHT = 0.1
# Noise of the published models, made to end in noise alone: a small picture's mean colour would
# otherwise be seen through it, and plain backgrounds would come out grey.
NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def new_vae() -> AutoencoderKL:
    """SDXL's autoencoder (8 pixels to a latent, 4 channels) with 0.6 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 48),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=WIDTH,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def new_text_encoders() -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """SDXL's two text encoders; the second also gives one pooled vector."""
    tokenizer = clip_tokenizer(pad_token="!")
    first, second = (
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=4,
            num_attention_heads=4,
            hidden_act=activation,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for width, activation in zip(TEXT_WIDTHS, ("quick_gelu", "gelu"), strict=True)
    )
    return CLIPTextModel(first), CLIPTextModelWithProjection(second)


def new_unet() -> UNet2DConditionModel:
    """SDXL's denoiser with 2.7 M parameters and two levels; attention on the lower one."""
    return UNet2DConditionModel(
        sample_size=WIDTH // 8,
        block_out_channels=(64, 96),
        norm_num_groups=16,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1],
        attention_head_dim=[2, 3],  # numbers of heads, in spite of the name
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        # The pooled text of the second encoder, and six numbers about size and crop.
        projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + 6 * 32,
    )


class TextSide:
    """Both tokenizers and text encoders, used as SDXL's pipeline uses them."""

    def __init__(self) -> None:
        # The first encoder of the published model pads with the end token, the second with "!".
        self.tokenizers: tuple[CLIPTokenizer, CLIPTokenizer] = (
            clip_tokenizer(pad_token="<|endoftext|>"),
            clip_tokenizer(pad_token="!"),
        )
        self.encoders = new_text_encoders()

    def __call__(
        self, texts: list[str], padding: str = "max_length"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token states (texts, tokens, 160) and pooled vectors (texts, 96)."""
        states = []
        pooled = torch.empty(0)
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids = tokenizer(
                texts, padding=padding, max_length=77, truncation=True, return_tensors="pt"
            ).input_ids
            out = encoder(ids, output_hidden_states=True)
            states.append(out.hidden_states[-2])
            pooled = out[0]  # of the second: its projected end token
        return torch.cat(states, dim=-1), pooled


class Job:
    """The stages and their files. One thread."""

    def __init__(self, work_dir: Path, target: Path, seed: int, *, go_on: bool = False):
        """go_on: the denoiser starts from the weights in `target`, and so do the other parts."""
        self._work = work_dir
        self._target = target
        self._seed = seed
        self._go_on = go_on

    # --- pictures to latents -------------------------------------------------------------------

    def train_vae(self) -> None:
        if self._go_on:
            return
        torch.manual_seed(self._seed)
        vae = new_vae().train()
        # Tells the colours of a cell from its noisy latent: see the loss.
        probe = nn.Conv2d(4, len(PALETTE), 1)
        average = Average(vae, 0.99)
        kernels = [p for p in vae.parameters() if p.ndim > 1 and p.shape[0] > 1]
        chosen = {id(p) for p in kernels}
        rest = [p for p in [*vae.parameters(), *probe.parameters()] if id(p) not in chosen]
        optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": Muon([{"params": kernels, "scale": 4.0}]),
            "adam": torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.0),
        }

        def step(index: int) -> dict[str, float]:
            # Whole pictures have borders, and other statistics for the norms.
            whole = index % 2 == 1
            pictures, colours = _pictures(self._seed * 10_000_019 + index, whole=whole)
            posterior = vae.encode(pictures * 2 - 1).latent_dist
            means = posterior.mean
            # The decoder forgives what a denoiser leaves behind.
            noise = torch.rand(len(means), 1, 1, 1) * VAE_NOISE
            latents = means + noise * torch.randn_like(means)
            again = vae.decode(latents).sample
            absolute = F.l1_loss(again, pictures * 2 - 1)
            squared = F.mse_loss(again, pictures * 2 - 1)
            # Channels of unit size without correlation, so that noise hides all of them alike.
            flat = means.permute(1, 0, 2, 3).flatten(1)
            second = flat @ flat.T / flat.shape[1]
            spread = (second - torch.eye(4)).square().mean() + flat.mean(dim=1).square().mean()
            # Colours that are far apart in meaning lie far apart in the latents too.
            told = F.cross_entropy(probe(latents), colours)
            # The posterior's own spread is pulled to a hundredth: an encoded picture is one point.
            narrow = (posterior.logvar + 9).square().mean()
            loss = absolute + 4 * squared + 0.05 * spread + 0.05 * told + 1e-4 * narrow
            vae.zero_grad(set_to_none=True)
            probe.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            for optimizer in optimizers.values():
                set_learning_rate(optimizer, learning_rate(index, VAE_STEPS, VAE_RATE))
                optimizer.step()
            average.update()
            return {"absolute": absolute.item(), "spread": spread.item(), "told": told.item()}

        run_stage(
            "vae",
            VAE_STEPS,
            step,
            {"vae": vae, "probe": probe, "average": average, **optimizers},
            self._work,
            self._seed,
        )

    # --- texts ---------------------------------------------------------------------------------

    def train_text(self) -> None:
        if self._go_on:
            return
        torch.manual_seed(self._seed + 1)
        side = TextSide()
        reader, pooled_reader = Reader(sum(TEXT_WIDTHS)), PooledReader(TEXT_WIDTHS[1])

        def read(texts: list[str]) -> list[list[torch.Tensor]]:
            states, pooled = side(texts, padding="longest")
            return [reader(states, None), pooled_reader(pooled)]

        networks = {
            "encoder": side.encoders[0],
            "encoder_2": side.encoders[1],
            "reader": reader,
            "pooled_reader": pooled_reader,
        }
        train_reader(networks, read, self._work, self._seed, film=False, steps=TEXT_STEPS)

    # --- the training set ----------------------------------------------------------------------

    @torch.inference_mode()
    def make_latents(self) -> None:
        """Draw and encode the training scenes; one file, made once."""
        file = self._work / "latents.pt"
        if file.is_file():
            return
        vae = self._vae()
        chance = random.Random(self._seed)
        sets = {}
        for (width, height), count in SCENES.items():
            # What is learned last is two things, and how many there are when no place tells.
            wanted = [
                training_description(chance, things=2 if self._go_on and row % 2 else None)
                for row in range(count)
            ]
            scenes = [place(one, chance, aspect=width / height) for one in wanted]
            latents = []
            for start in range(0, count, 50):
                pictures = draw(scenes[start : start + 50], width, height) * 2 - 1
                latents.append(vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor)
                print(f"latents {width}x{height}: {start + 50}/{count}", flush=True)
            sets[width, height] = (torch.cat(latents), wanted, scenes)
        self._work.mkdir(parents=True, exist_ok=True)
        torch.save(sets, file)

    # --- the denoiser --------------------------------------------------------------------------

    def train_unet(self) -> None:
        sets: dict[tuple[int, int], tuple[torch.Tensor, list[Description], list[Scene]]]
        sets = torch.load(self._work / "latents.pt", weights_only=False)
        sizes, weights = list(sets), [len(one[1]) for one in sets.values()]
        side = self._text_side()
        noise_schedule = DDPMScheduler(**NOISE)
        torch.manual_seed(self._seed + 2)
        steps = FURTHER_STEPS if self._go_on else UNET_STEPS
        unet = self._start().train()
        average = Average(unet, 0.997)
        middle = Overheard(unet.mid_block)  # 96 channels, 16 x 16 pixels to a cell
        layout_reader = nn.Conv2d(96, CLASSES, 1)
        inner, outer = [], []
        for name, parameter in unet.named_parameters():
            is_inner = parameter.ndim >= 2 and "block" in name
            (inner if is_inner else outer).append(parameter)
        outer += layout_reader.parameters()
        optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": Muon([{"params": inner, "scale": 2.0}]),
            "adam": torch.optim.AdamW(outer, betas=(0.9, 0.98), weight_decay=0.0),
        }

        def step(index: int) -> dict[str, float]:
            chance = random.Random(self._seed * 10_000_019 + index)
            width, height = chance.choices(sizes, weights)[0]
            latents, wanted, scenes = sets[width, height]
            rows = [chance.randrange(len(wanted)) for _ in range(UNET_BATCH)]
            clean = latents[rows]
            states, pooled = self._conditions(side, [wanted[row] for row in rows], chance)
            times = torch.randint(0, 1000, (UNET_BATCH,))
            noise = torch.randn_like(clean)
            noisy = noise_schedule.add_noise(clean, noise, times)
            target = noise_schedule.get_velocity(clean, noise, times)
            size_and_crop = torch.tensor([[height, width, 0, 0, height, width]]).float()
            guess = unet(
                noisy,
                times,
                states,
                added_cond_kwargs={
                    "text_embeds": pooled,
                    "time_ids": size_and_crop.expand(UNET_BATCH, -1),
                },
            ).sample
            loss = F.mse_loss(guess, target)
            truth = layout([scenes[row] for row in rows], height // 16, width // 16)
            planned = layout_loss(layout_reader(middle.output), truth)
            unet.zero_grad(set_to_none=True)
            layout_reader.zero_grad(set_to_none=True)
            (loss + LAYOUT_WEIGHT * planned).backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            for optimizer in optimizers.values():
                set_learning_rate(optimizer, learning_rate(index, steps, UNET_RATE))
                optimizer.step()
            average.update()
            return {"loss": loss.item(), "layout": planned.item()}

        run_stage(
            "unet",
            steps,
            step,
            {"unet": unet, "average": average, "layout_reader": layout_reader, **optimizers},
            self._work,
            self._seed,
        )

    @torch.no_grad()
    def _conditions(
        self, side: TextSide, wanted: list[Description], chance: random.Random
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States and pooled vectors of texts: whole ones, partial ones, the empty one, none."""
        texts, silent = [], []
        for one in wanted:
            kind = chance.random()
            silent.append(kind < 0.1)  # as the pipeline does for a negative prompt that is absent
            if kind < 0.13:
                texts.append("")
                continue
            text = caption(opened(one, chance) if kind < 0.28 else one, chance)
            texts.append(with_details(text, chance) if chance.random() < 0.45 else text)
        states, pooled = side(texts)
        heard = 1.0 - torch.tensor(silent).float()
        return states * heard[:, None, None], pooled * heard[:, None]

    # --- the finished model --------------------------------------------------------------------

    def publish(self) -> None:
        """Write the model folder in bfloat16."""
        unet = new_unet()
        unet.load_state_dict(self._saved("unet")["average"]["average"])
        side = self._text_side()
        pipeline = StableDiffusionXLPipeline(
            vae=self._vae(),
            text_encoder=side.encoders[0],
            text_encoder_2=side.encoders[1],
            tokenizer=side.tokenizers[0],
            tokenizer_2=side.tokenizers[1],
            unet=unet,
            scheduler=EulerDiscreteScheduler(**NOISE),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        ).to(torch.bfloat16)
        publish(self._target, lambda folder: pipeline.save_pretrained(folder))

    def _start(self) -> UNet2DConditionModel:
        if not self._go_on:
            return new_unet()
        return UNet2DConditionModel.from_pretrained(
            self._target, subfolder="unet", dtype=torch.float32
        )

    def _saved(self, stage: str) -> dict[str, dict[str, object]]:
        file = self._work / f"{stage}.pt"
        content: dict[str, dict[str, object]] = torch.load(file, weights_only=False)
        return content

    def _vae(self) -> AutoencoderKL:
        """The trained autoencoder, its latents shifted and scaled to what SDXL's are."""
        if self._go_on:
            published = AutoencoderKL.from_pretrained(
                self._target, subfolder="vae", dtype=torch.float32
            )
            # What is loaded knows its folder, and would write that into the new one.
            vae = new_vae().eval().requires_grad_(False)
            vae.load_state_dict(published.state_dict())
            return vae
        vae = new_vae().eval().requires_grad_(False)
        vae.load_state_dict(self._saved("vae")["average"]["average"])
        chance = random.Random(self._seed)
        with torch.inference_mode():
            pictures = draw([_scene(chance) for _ in range(200)], WIDTH, HEIGHT) * 2 - 1
            posterior = vae.encode(pictures).latent_dist
        whiten(
            vae.quant_conv,
            vae.post_quant_conv,
            posterior.mean,
            posterior.var,
            1 / vae.config.scaling_factor,
        )
        return vae

    def _text_side(self) -> TextSide:
        side = TextSide()
        if self._go_on:
            side.encoders = (
                CLIPTextModel.from_pretrained(self._target / "text_encoder", dtype=torch.float32),
                CLIPTextModelWithProjection.from_pretrained(
                    self._target / "text_encoder_2", dtype=torch.float32
                ),
            )
            for encoder in side.encoders:
                encoder.eval().requires_grad_(False)
            return side
        saved = self._saved("text")
        for encoder, name in zip(side.encoders, ("encoder", "encoder_2"), strict=True):
            encoder.load_state_dict(saved[name])
            encoder.eval().requires_grad_(False)
        return side


def _pictures(seed: int, *, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of random scenes, (pictures, 3, side, side) in 0 .. 1; crops hold part of a thing.

    With it the shares of the palette's colours in each cell of 8 x 8 pixels, (pictures, 9, rows,
    columns).
    """
    chance = random.Random(seed)
    if whole:
        pictures = draw([_scene(chance) for _ in range(VAE_BATCH // 5)], WIDTH, HEIGHT)
        return pictures, colour_shares(pictures, 8)
    crops = []
    for _ in range(VAE_BATCH):
        scene = _scene(chance)
        thing = chance.choice(scene.things)
        left, top = (
            min(max(int(at * WIDTH - chance.uniform(0.1, 0.9) * VAE_CROP), 0), WIDTH - VAE_CROP)
            for at in (thing.x, thing.y)
        )
        crops.append(draw([scene], WIDTH, HEIGHT, window=(left, top, VAE_CROP, VAE_CROP)))
    pictures = torch.cat(crops)
    return pictures, colour_shares(pictures, 8)


def _scene(chance: random.Random) -> Scene:
    return place(random_description(chance), chance)
