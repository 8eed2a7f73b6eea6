"""The job types of the wire contract, as one table, and what each kind of model can do."""

from __future__ import annotations

from dataclasses import dataclass

from worker.config import Kind


@dataclass(frozen=True, slots=True)
class JobType:
    """Defaults of a type; the request's own values win."""

    kind: Kind
    output: str  # image | video
    steps: int
    guidance_scale: float


# docs/http-api.md#job-types. The `*_enhanced` types run exactly like their plain twins: their
# prompt arrives enhanced.
JOB_TYPES = {
    "sdxl_image_fast": JobType("sdxl", "image", 15, 6.0),
    "sdxl_image_high": JobType("sdxl", "image", 25, 7.5),
    "image_fast": JobType("wan", "image", 25, 6.5),
    "image_high": JobType("wan", "image", 50, 7.5),
    "video_fast": JobType("wan", "video", 25, 6.5),
    "video_high": JobType("wan", "video", 50, 7.5),
    "image7b_fast_enhanced": JobType("wan", "image", 25, 6.5),
    "image7b_high_enhanced": JobType("wan", "image", 50, 7.5),
    "video7b_fast_enhanced": JobType("wan", "video", 25, 6.5),
    "video7b_high_enhanced": JobType("wan", "video", 50, 7.5),
}
SPELLINGS = {
    "wan_video_fast": "video_fast",
    "wan_video_high": "video_high",
    "image": "sdxl_image_fast",
    "video": "video_fast",
}
# Types of existing clients whose work is done elsewhere.
CHAT_TYPES = ("chat_enhance", "chat_conversation", "chat_unrestricted", "admin_utilities")
OTHER_PROVIDERS = ("rv51_", "fal_")  # what their types begin with

# Both sides of a picture are multiples of this: SDXL's VAE shrinks by 8; WAN's by 8, and its
# transformer takes patches of 2 x 2.
SIZE_STEP = {"sdxl": 8, "wan": 16}
MIN_SIDE = {"sdxl": 64, "wan": 32}  # pixels
GUIDANCE_RANGE = (0.0, 30.0)
FPS_RANGE = (1, 60)
SHIFT_RANGE = (0.1, 20.0)
# A client's database keeps seeds in a signed 32-bit column.
MAX_SEED = 2**31 - 1

# WAN's latents hold 4n + 1 frames. Clients have always sent 83 and got 81; this one number is
# taken as 81, and said so in the receipt.
FRAMES_ON_THE_WIRE = {83: 81}

# What this worker's engines build (worker/engine/media/schedulers.py).
SCHEDULERS = {
    "sdxl": ("ddim", "dpm++", "euler", "euler_a", "unipc"),
    "wan": ("dpm++", "euler", "unipc"),
}
# The wire contract's solver and flow shift for every WAN type.
WAN_SCHEDULER = "dpm++"
WAN_SHIFT = 5.0

# Image to image: the share of the noise that a picture gets. The default is the wire contract's.
# Below the least, a schedule would need more steps than the 1000 of the models' training to leave
# the picture one; 0 is the picture itself.
DEFAULT_DENOISE = 0.5
LEAST_DENOISE = 0.001
# Exact copy, the only mode that changes what was sent: at most this share, this guidance, and
# between so many steps, by the wire contract's formula.
COPY_MOST_DENOISE = 0.05
COPY_GUIDANCE = 1.0
COPY_STEPS = (6, 10)

# Clients offer 0.1 to 2 for terms; 0 leaves the term's meaning out.
TERM_WEIGHT_RANGE = (0.0, 2.0)
LORA_WEIGHT_RANGE = (-2.0, 2.0)  # below 0 turns a LoRA's effect round
MAX_LORAS = 8
