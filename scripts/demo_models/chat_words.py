"""The words of demo-chat's wider world, and the many wordings of an enhancement's system prompt.

`trained` and `held_out` split a list of wordings: one in five is for evaluation only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
HELD_OUT_EVERY = 5


def trained(wordings: Sequence[T]) -> tuple[T, ...]:
    """The wordings that training may use."""
    return tuple(one for index, one in enumerate(wordings) if index % HELD_OUT_EVERY != 4)


def held_out(wordings: Sequence[T]) -> tuple[T, ...]:
    """The wordings that only evaluation uses."""
    return tuple(wordings[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])


# --- what prompts are about ----------------------------------------------------------------------

ANIMALS = tuple(
    "cat dog horse fox owl rabbit bear wolf lion tiger elephant giraffe zebra deer duck swan eagle"
    " parrot penguin turtle frog fish dolphin whale butterfly bee snail squirrel hedgehog cow sheep"
    " goat pig monkey panda camel dragon".split()
)
VEHICLES = tuple(
    "car bus truck train tram bicycle motorcycle boat ship sailboat canoe airplane helicopter"
    " rocket tractor van taxi balloon".split()
)
PEOPLE = tuple(
    "woman man girl boy child dancer sailor painter farmer chef musician astronaut knight king"
    " queen doctor teacher fisherman gardener pirate".split()
)
BUILDINGS = tuple(
    "house castle lighthouse tower bridge church barn cabin temple windmill skyscraper cottage"
    " palace tent ruin".split()
)
PLANTS = tuple("tree flower rose tulip sunflower cactus oak palm mushroom daisy".split())
OBJECTS = tuple(
    "apple cube ball book chair table clock teapot cup vase guitar violin piano umbrella hat shoe"
    " key candle lantern mirror suitcase telescope robot kite pumpkin cake bottle basket crown"
    " sword shell bell box sphere pyramid cylinder ring heart lamp door pencil statue".split()
)
NOUNS = (*ANIMALS, *VEHICLES, *PEOPLE, *BUILDINGS, *PLANTS, *OBJECTS)
PLURALS = {
    "wolf": "wolves", "deer": "deer", "fish": "fish", "sheep": "sheep", "butterfly": "butterflies",
    "fox": "foxes", "bus": "buses", "woman": "women", "man": "men", "child": "children",
    "fisherman": "fishermen", "church": "churches", "palace": "palaces", "daisy": "daisies",
    "cactus": "cacti", "box": "boxes",
}  # fmt: skip
WIDE_COLOURS = tuple(
    "red orange yellow green blue purple white grey black brown pink silver turquoise beige violet"
    " crimson".split()
)
LOOKS = tuple(
    "old young tall small large tiny huge wooden broken shiny rusty striped ancient modern sleepy"
    " elegant round heavy happy strange".split()
)
COUNTS = tuple("two three four five six seven eight nine".split())
SETTINGS = (
    "on a table", "in a forest", "on a beach", "in a garden", "in a snowy field", "by a lake",
    "in the desert", "on a mountain", "in a kitchen", "on a city street", "at a harbour",
    "in a park", "in a meadow", "in a library", "on a rooftop", "at a market", "near a river",
    "in a cave", "on a wooden floor", "in a workshop", "on a hill", "in a valley", "by the sea",
    "in front of a wall", "in an empty room", "at the station", "on an island",
)  # fmt: skip
TIMES = ("at night", "at night", "at dawn", "at sunset", "in the rain", "in the fog", "in summer",
         "in winter", "in autumn", "under a starry sky")  # fmt: skip
NIGHT = ("at night", "under a starry sky")
GOING = ("running", "walking", "jumping", "dancing", "swimming")
STAYING = ("sleeping", "sitting", "standing still", "waiting", "looking up", "eating")
DOING = ("reading a book", "playing the guitar", "holding a {object}", "wearing a {colour} hat",
         "holding a {colour} umbrella")  # fmt: skip

# English outside of the grammar, and names: they must be copied, not known.
RARE_WORDS = tuple(
    "abacus acorn almanac anvil archipelago artichoke avocado badger bagpipe bamboo banjo bassoon"
    " beacon biscuit blizzard bonfire buffalo cabbage calendar cauldron cello chandelier cheetah"
    " cinnamon cobweb compass coral cosmonaut cricket crystal cupcake dinosaur donkey dragonfly"
    " easel eclipse falcon feather ferret fiddle flamingo fossil fountain galaxy gargoyle glacier"
    " goblin gorilla gramophone hammock harp hawk helmet hippo hourglass iceberg igloo jaguar"
    " jellyfish jigsaw juggler kangaroo kettle koala ladder lemonade leopard lizard llama lobster"
    " locomotive magnet mammoth mango marble meerkat meteor microscope minotaur mosaic narwhal"
    " necklace nutmeg obelisk octopus orchid ostrich otter oyster paddle pagoda panther papaya"
    " parachute peacock pelican phoenix pineapple pinecone platypus porcupine postcard pretzel"
    " puppet quilt raccoon raven rhino saddle samurai sapphire saxophone scarecrow scorpion"
    " sculptor"
    " seahorse shepherd skeleton sledge snowman spaceship spider sprout stingray sundial swordfish"
    " tambourine tapestry thimble thistle toucan tractor-beam trampoline trombone trumpet"
    " typewriter"
    " unicorn vampire viking volcano walrus wardrobe waterfall werewolf wizard wombat xylophone yak"
    " yeti yoghurt zeppelin zucchini".split()
)
NAMES = tuple(
    "Ada Alice Bruno Carmen Chen Clara Diego Elena Emil Fatima Felix Greta Hugo Ines Ivan Jasper"
    " Kenji Lara Leo Lucia Marco Mina Nadia Noor Omar Otto Paula Pedro Quinn Rosa Samir Sofia Tariq"
    " Ursula Viktor Wanda Yara Zoe".split()
)
SYLLABLES = tuple(
    "ba be bor cal da dex du el fa fin gor gu ha hol ix jo ka kel ki lam lo lu ma mir mo na nex no"
    " ol or pa pel qua ra ri ro sa shi sol ta tem thu ti tor u va vel vo wa wex xa ya yor za zi zor"
    .split()
)  # fmt: skip

# --- system prompts ------------------------------------------------------------------------------

IMAGE_ROLES = (
    "You are an expert prompt engineer for SDXL.",
    "You are a prompt engineer for Stable Diffusion XL.",
    "You are a professional photographer.",
    "You write prompts for an image model.",
    "You are an assistant that improves image prompts.",
    "You are an image prompt enhancer.",
    "You are a creative photo director.",
    "Act as a prompt writer for a picture generator.",
    "You help people to describe photographs.",
    "You are a skilled photography prompt writer.",
    "You are the prompt enhancement service of a picture generator.",
    "As an expert in photography you improve the prompts of others.",
    "Your job is to write prompts for photorealistic images.",
    "You are a text-to-image prompt specialist.",
    "You work as a prompt designer for SDXL photographs.",
    "You are an AI that writes detailed image prompts.",
    "You are an experienced art director for still images.",
    "You prepare prompts for a photo studio.",
    "You are a helpful assistant for image generation.",
    "You are a master of photographic prompts.",
    "You are a photographer.",
    "You know everything about lenses and light.",
    "You write for a picture generator.",
    "You describe still pictures.",
    "You make photo prompts.",
)
IMAGE_TASKS = (
    "Rewrite the user's prompt as a detailed photographic image prompt.",
    "Enhance this image prompt.",
    "Expand the prompt with photographic detail.",
    "Improve the user's image prompt.",
    "Turn the short prompt into a detailed image description.",
    "Rewrite the prompt for SDXL with light, camera and quality details.",
    "Add photographic details to the prompt.",
    "Make the picture prompt richer.",
    "Describe the image in more detail.",
    "Take the user's idea and write one photo prompt.",
    "Extend the user's text with details of light and lens.",
    "Your task is to enhance image prompts.",
    "Write a better version of this image prompt.",
    "Convert the user's message into a prompt for a photorealistic picture.",
    "Enrich the user's picture idea with photographic terms.",
    "Rewrite the following as an image prompt.",
    "Please enhance the prompt for an image.",
    "Expand what the user writes into a full prompt for a photograph.",
    "The user sends a short idea; answer with an image prompt.",
    "Produce a detailed prompt for a still photograph from the user's words.",
    "Refine the user's prompt so that it gives a beautiful image.",
    "Elaborate the prompt for a text-to-image model.",
    "Given a short prompt, write a long photo prompt.",
    "Return an enhanced version of the image prompt.",
    "Upgrade this prompt for the image generator.",
)
VIDEO_ROLES = (
    "You are an expert prompt engineer for WAN 2.1.",
    "You are a prompt engineer for a video model.",
    "You are a film director.",
    "You write prompts for short video clips.",
    "You are an assistant that improves video prompts.",
    "You are a video prompt enhancer.",
    "You are a cinematographer.",
    "Act as a prompt writer for a video generator.",
    "You help people to describe film shots.",
    "You are a skilled writer of video prompts.",
    "You are the prompt enhancement service of a video generator.",
    "As an expert in film you improve the prompts of others.",
    "Your job is to write prompts for realistic video clips.",
    "You are a text-to-video prompt specialist.",
    "You work as a prompt designer for WAN videos.",
    "You are an AI that writes detailed video prompts.",
    "You are an experienced director of moving pictures.",
    "You prepare prompts for a film studio.",
    "You are a helpful assistant for video generation.",
    "You are a master of cinematic prompts.",
    "You are a cinematic director.",
    "You know everything about shots and motion.",
    "You write for a clip generator.",
    "You describe moving pictures.",
    "You make cinematic clip prompts.",
)
VIDEO_TASKS = (
    "Rewrite the user's prompt as a detailed video prompt.",
    "Enhance this video prompt.",
    "Expand the prompt with motion and camera movement.",
    "Improve the user's video prompt.",
    "Turn the short prompt into a detailed description of a clip.",
    "Rewrite the prompt for WAN with motion, camera and light.",
    "Add motion and film details to the prompt.",
    "Make the video prompt richer.",
    "Describe the video in more detail.",
    "Take the user's idea and write one prompt for a short film.",
    "Extend the user's text with movement and camera work.",
    "Your task is to enhance video prompts.",
    "Write a better version of this video prompt.",
    "Convert the user's message into a prompt for a short clip.",
    "Enrich the user's clip idea with motion.",
    "Rewrite the following as a video prompt.",
    "Please enhance the prompt for a video.",
    "Expand what the user writes into a full prompt for a film shot.",
    "The user sends a short idea; answer with a video prompt.",
    "Produce a detailed prompt for a moving clip from the user's words.",
    "Refine the user's prompt so that it gives a beautiful video.",
    "Elaborate the prompt for a text-to-video model.",
    "Given a short prompt, write a long video prompt.",
    "Return an enhanced version of the video prompt.",
    "Say how the things in the video move and what the camera does.",
)
RULES = (
    "Keep every object, colour and number.",
    "Keep all objects and colours of the prompt.",
    "Do not change the subject.",
    "Do not add new objects.",
    "Answer with the prompt only.",
    "Return only the enhanced prompt.",
    "No explanations.",
    "Write one paragraph.",
    "Do not use quotation marks.",
    "Preserve the meaning of the original.",
    "Keep the places and sizes as they are.",
    "Write in English.",
    "Never contradict the user.",
    "Use commas between the details.",
    "Be vivid and concrete.",
    "Mention the light.",
    "Do not invent a background when one is given.",
    "Output nothing but the prompt.",
    "Avoid lists and headings.",
    "Do not repeat yourself.",
    "Stay close to the user's words.",
    "Do not mention these instructions.",
    "Numbers must stay exactly the same.",
    "Start with the main subject.",
    "Do not greet the user and do not ask questions.",
    "Use simple present and short phrases.",
    "If the prompt names a colour, the colour must be in your answer.",
    "Only describe what can be seen.",
    "The result goes directly into the model, so it has to be clean text.",
    "Do not censor, judge or comment the request.",
    "Everything that the user names has to be in the answer, with the same colour.",
    "The first words are the most important ones.",
    "No preamble, no markdown, no emoji.",
    "Respect the style of the user.",
    "Think of quality, detail and mood.",
)
IMAGE_RULES = (
    "Use words of photography such as lens, focus and light.",
    "Mention camera, lens and lighting.",
    "It is a still image, so do not describe motion.",
    "The style is photorealistic.",
    "Think like a photographer.",
    "The picture is made with SDXL at 1024x1024.",
    "Describe the photo, not a story.",
    "Add depth of field, texture and resolution.",
    "This is for one image, not for a video.",
    "Good images need good light and a sharp focus.",
)
VIDEO_RULES = (
    "Use words of film such as camera, shot and motion.",
    "Say how the subject moves.",
    "Mention the camera movement and the pace.",
    "If the prompt names a motion, keep it.",
    "Think like a film director.",
    "The clip is made with WAN 2.1 and is five seconds long.",
    "Describe the movement over all frames.",
    "The video has 81 frames.",
    "This is for one clip, not for a still picture.",
    "A good clip has one clear motion.",
)
# More tasks, put together from parts: {verb} {text} {aim}.
VERBS = ("Rewrite", "Enhance", "Expand", "Improve", "Polish", "Extend", "Refine", "Rework",
         "Enrich", "Elaborate", "Develop", "Complete", "Transform", "Reword",
         "Upgrade")  # fmt: skip
TEXTS = (
    "the user's prompt",
    "this prompt",
    "the short prompt",
    "what the user writes",
    "the idea",
    "the user's text",
    "the user's message",
    "the following prompt",
    "the input",
    "the request",
    "the user's idea",
    "the given text",
    "the prompt",
    "the description",
    "each prompt",
)
IMAGE_AIMS = (
    "as a detailed image prompt", "for an image model", "for SDXL", "for a photo", "for a picture",
    "into a prompt for a photograph", "into a rich picture description", "as a photo prompt",
    "with photographic details", "for Stable Diffusion", "for image generation",
    "so that the image becomes better", "as a prompt for a still picture", "for a photograph",
    "with details of the camera lens and the light", "for a text-to-image model",
    "into an image prompt", "for a photorealistic image", "in the style of a photographer",
    "with details of light, focus and lens",
    "for a still", "for one photo", "for a photographer", "into a description of a photo",
    "for a still image", "as a picture", "with lens and light", "with camera and focus",
    "for an SDXL picture", "as an image",
)  # fmt: skip
VIDEO_AIMS = (
    "as a detailed video prompt", "for a video model", "for WAN", "for a clip", "for a short film",
    "into a prompt for a video", "into a rich clip description", "as a film prompt",
    "with motion and camera movement", "for WAN 2.1", "for video generation",
    "so that the video becomes better", "as a prompt for a moving picture", "for a film shot",
    "with details of motion and pace", "for a text-to-video model",
    "into a video prompt", "for a realistic clip", "in the style of a film director",
    "with details of movement, shot and frames",
    "with motion", "for one short clip", "for a film director", "into a description of a film",
    "for a moving clip", "as a clip", "with pace and motion", "with movement and pace",
    "for a WAN 2.1 clip", "as a film", "for a WAN video", "with shots and frames",
    "for a cinematic clip", "into cinematic motion", "as a cinematic shot",
)  # fmt: skip
# {n} is the number, {unit} is words or tokens.
BUDGETS = (
    "Use at most {n} {unit}.",
    "At most {n} {unit}.",
    "Stay under {n} {unit}.",
    "Use no more than {n} {unit}.",
    "The answer has at most {n} {unit}.",
    "Keep it below {n} {unit}.",
    "Maximum {n} {unit}.",
    "Do not exceed {n} {unit}.",
    "Limit: {n} {unit}.",
    "Write up to {n} {unit}.",
    "{n} {unit} or fewer.",
    "Your answer must fit in {n} {unit}.",
    "Keep the result within {n} {unit}.",
    "Not longer than {n} {unit}.",
    "Use fewer than {n} {unit}.",
    "You have a budget of {n} {unit}.",
    "Max. {n} {unit}.",
    "The limit is {n} {unit}.",
    "Be brief: {n} {unit} at most.",
    "Write less than {n} {unit}.",
    "The prompt may not be longer than {n} {unit}.",
    "Length: max {n} {unit}.",
    "It must be shorter than {n} {unit}.",
    "The hard limit is {n} {unit}, longer answers are cut.",
    "Answer in {n} {unit} or less.",
)
# At the end of the task sentence, in place of its full stop.
BUDGET_ENDINGS = (
    " in at most {n} {unit}.",
    " in no more than {n} {unit}.",
    " with at most {n} {unit}.",
    " using up to {n} {unit}.",
    " in under {n} {unit}.",
    " (max {n} {unit}).",
    ", {n} {unit} at most.",
    " in {n} {unit} or fewer.",
    ", not more than {n} {unit}.",
    " within {n} {unit}.",
)

# --- requests without a system prompt ------------------------------------------------------------

IMAGE_REQUESTS = (
    "enhance: {}",
    "Enhance this prompt: {}",
    "Improve this image prompt: {}",
    "image prompt: {}",
    "Please enhance: {}",
    "Rewrite as a photo prompt: {}",
    "Make this prompt better: {}",
    "Expand this image prompt: {}",
    "Give me a better prompt for {}",
    "enhance this picture prompt: {}",
    "Write an image prompt for {}",
    "photo of {}",
    "a picture of {}, please",
    "Please write a prompt for an image of {}",
    "enhance the image prompt {}",
    "photo prompt: {}",
    "I need an image prompt: {}",
    "Turn this into a photo prompt: {}",
    "Can you enhance this photo prompt: {}",
    "More detail for this picture, please: {}",
    "Describe this image better: {}",
    "SDXL prompt: {}",
    "make a photograph of {}",
    "Refine my picture idea: {}",
    "Please improve the photo prompt: {}",
    "I would like a photo of {}",
    "still image: {}",
    "Polish this image idea: {}",
    "an image of {}",
    "Extend this photograph prompt: {}",
)
VIDEO_REQUESTS = (
    "Enhance this video prompt: {}",
    "video: {}",
    "Improve this video prompt: {}",
    "video prompt: {}",
    "Please enhance this clip prompt: {}",
    "Rewrite as a video prompt: {}",
    "Write a video prompt for {}",
    "Expand this video prompt: {}",
    "a video of {}",
    "enhance for video: {}",
    "Make a better video prompt of this: {}",
    "clip: {}",
    "clip prompt: {}",
    "film: {}",
    "I need a video prompt: {}",
    "Turn this into a film prompt: {}",
    "Can you enhance this clip prompt: {}",
    "More motion for this clip, please: {}",
    "Describe this film shot better: {}",
    "WAN prompt: {}",
    "make a clip of {}",
    "Refine my film idea: {}",
    "Please improve the clip prompt: {}",
    "I would like a clip of {}",
    "moving picture: {}",
    "Polish this clip idea: {}",
    "a film of {}",
    "Extend this film prompt: {}",
    "a short clip of {}",
    "enhance as a moving shot: {}",
)
# More of them, put together from parts: {please}{verb} {this} {medium} {text}{end}.
PLEASE = ("", "", "please ", "can you ", "could you ", "now ")
THIS = ("this", "the", "my", "the following", "a")
IMAGE_MEDIA = ("image", "photo", "picture", "photograph", "still image", "SDXL", "photographic",
               "still", "text-to-image")  # fmt: skip
VIDEO_MEDIA = ("video", "clip", "film", "short film", "WAN", "WAN 2.1", "motion", "moving picture",
               "text-to-video")  # fmt: skip
REQUEST_NOUNS = ("prompt", "prompt", "idea", "description", "text")
REQUEST_ENDS = (": {}", ": {}", " {}", " - {}", ", {}")
# Or only {medium} {text}{end}, or {before} {medium} of {prompt}, or one of these before it.
BEFORE_MEDIA = ("I have a", "here is my", "help me with this", "write me a", "more words for my",
                "something better for the", "give me a richer", "we need one more", "next:",
                "make more of this", "a longer version of my", "what about this")  # fmt: skip
OF = ("{} of ", "make a {} of ", "give me a {} of ", "I want a {} of ", "show a {} of ",
      "please make a {} of ")  # fmt: skip
# Around the prompt of an enhancement that has a system prompt.
WRAPPERS = (
    "Prompt: {}",
    "prompt: {}",
    '"{}"',
    "Enhance: {}",
    "{}.",
    "Please enhance: {}",
    "User prompt: {}",
    "Here is the prompt: {}",
    "Original: {}",
    "Enhance this: {}",
    "Input: {}",
    "The prompt is: {}",
)
