"""What demo-chat can talk about: small talk, and questions about the daemon that runs it.

An `Intent` is one thing that a person may want to know, in many phrasings. One phrasing in five is
held out for evaluation. Every variant of a right answer has one of the intent's `signs`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Intent:
    name: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    signs: tuple[str, ...]  # lower case; a right answer has at least one of them


def _intent(name: str, questions: str, answers: str, signs: str) -> Intent:
    return Intent(name, *(tuple(text.split("|")) for text in (questions, answers, signs)))


INTENTS = (
    _intent(
        "greeting",
        "hello|hi|hey|good morning|hello there|good evening|hi there|hey there|greetings|good day"
        "|hello, nice to meet you|hiya|good afternoon|hello again|hi, anybody there?"
        "|morning!|hi you|hello friend|hey you|good to see you|hello demo|is anybody here?"
        "|hi bot|welcome back|yo",
        "Hello! How can I help you?|Hi! Give me a short prompt, or ask me about Verbatim."
        "|Hello, nice to meet you. What shall we make?",
        "hello|hi!",
    ),
    _intent(
        "feeling",
        "how are you?|how are you today?|how is it going?|are you well?|how do you feel?"
        "|how are things?|how do you do?|are you okay?|what's up?|how are you doing?"
        "|how are things today?|all good?|everything fine?|how have you been?|are you fine?"
        "|how is your day?|are you feeling well?|how's it going?|you okay?"
        "|how are you feeling?",
        "I am fine, thank you. All my weights are in place.|Very well, thank you. And you?",
        "i am fine|very well",
    ),
    _intent(
        "thanks",
        "thanks|thank you|thank you very much|thanks a lot|many thanks|great, thanks|thank you so"
        " much|perfect, thank you|cheers|thanks for your help"
        "|thanks so much|thank you for the answer|that was helpful, thanks|thanks, that helps"
        "|ok thanks|thank you, very kind|big thanks|thanks again|I thank you|good job, thanks",
        "You are welcome!|You are welcome. Send me another prompt if you like.",
        "welcome",
    ),
    _intent(
        "bye",
        "bye|goodbye|see you|good night|bye bye|see you later|farewell|until tomorrow|I have to go"
        "|goodbye and good night"
        "|see you soon|bye for now|I am leaving now|talk to you later|take care"
        "|that is all, bye|good night, bye|see you tomorrow|bye, have a nice day"
        "|goodbye for today",
        "Goodbye! See you soon.|Goodbye, and good luck with your pictures.",
        "goodbye",
    ),
    _intent(
        "who",
        "who are you?|what are you?|what is your name?|tell me about yourself|introduce yourself"
        "|who am I talking to?|do you have a name?|what's your name?|who is there?|are you a bot?"
        "|what kind of program are you?|describe yourself|who is this?|say who you are"
        "|please tell me who you are"
        "|what should I call you?|who am I speaking with?|what are you called?"
        "|which program are you?|tell me your name|may I know your name?|what is demo-chat?"
        "|who is answering me?|who do I talk to?|are you a chatbot?",
        "I am demo-chat, a small demo model that runs inside Verbatim.|My name is demo-chat. I am a"
        " small demo model that was trained on a CPU.",
        "small demo model that",
    ),
    _intent(
        "abilities",
        "what can you do?|what can you do for me?|how can you help me?|help|what are you good at?"
        "|what are your skills?|what do you do?|can you help me?|how can you help?|what should I"
        " ask you?|what are you able to do?|what is your job?|list your abilities|what else can you"
        " do?|show me what you can do"
        "|what can I do with you?|what can I ask?|what are you for?|how can I use you?"
        "|what tasks can you do?|tell me what you can do|what help can you give?"
        "|what can you help with?|how may you help me?|what are your abilities?",
        "I can turn a short prompt into an image or video prompt, and answer questions about"
        " Verbatim.|I can enhance prompts for pictures and clips, make small talk, and explain this"
        " daemon.",
        "i can turn|i can enhance prompts for",
    ),
    _intent(
        "joke",
        "tell me a joke|do you know a joke?|make me laugh|another joke|say something funny|a joke"
        ", please|can you tell a joke?|tell me something funny|joke|do you know any jokes?"
        "|I want to hear a joke|one more joke"
        "|got a joke?|a funny one, please|tell me another joke|do you have a joke for me?"
        "|please make a joke|make a joke|say a joke|tell a funny story|give me a joke"
        "|can you be funny?",
        "Why did the token cross the road? It had the highest probability.|I wanted to tell a joke"
        " about batches, but it is still waiting.|What does a square say to a circle? Nice to see"
        " you around.",
        "why did the token|about batches|square say",
    ),
    _intent(
        "real model",
        "are you a real model?|are you a large model?|are you a large language model?|how big are"
        " you?|how large are you?|how many parameters do you have?|are you small?|are you a big"
        " model?|what size are you?|are you an LLM?|how small are you?|are you a toy?|are"
        " you only a"
        " demo?|is this the real model?|are you a serious model?"
        "|how many weights do you have?|are you a tiny model?|what is your size?"
        "|how big is this model?|are you just a small model?"
        "|how many parameters does this model have?|are you only a test model?"
        "|is this a demo model?|are you a big LLM?|are you a good model?",
        "I am a small demo model with about 2 million parameters. The real chat model is"
        " Qwen2.5-7B.|No, I am only a small demo model. Verbatim serves large models such as"
        " Qwen2.5-7B on a card.",
        "2 million|no, i am only a small",
    ),
    _intent(
        "which model",
        "which model are you?|what model are you?|what model is this?|which model is running?|what"
        " architecture do you have?|are you Qwen?|are you GPT?|which language model is this?"
        "|what model do you run?|which chat model is loaded?|are you ChatGPT?|what is your"
        " architecture?"
        "|what kind of model are you?|what are you based on?|which architecture is this?"
        "|are you Llama?|are you based on Qwen?|what network are you?|is this Qwen?"
        "|are you Claude?|what model answers me?|which model answers here?",
        "I am demo-chat, a tiny model of the Qwen2 architecture.|This is demo-chat: the Qwen2"
        " architecture, but tiny.",
        "qwen2 architecture",
    ),
    _intent(
        "real models",
        "which models does Verbatim serve?|what are the real models?|which real models are there?"
        "|what models can I use?|which models can it run?|which models are supported?|what models"
        " are available?|what models run on a GPU?|list the models|which large models does it run?"
        "|what models do you support?|which models do I get on a card?"
        "|what models does it have?|which models come with Verbatim?"
        "|what does it serve on a GPU?|tell me the real models"
        "|which models can Verbatim load?|what are the large models?"
        "|which models work on a GPU?|are there larger models?|which other models are there?"
        "|which models are on a pod?",
        "On a card Verbatim serves Qwen2.5-7B for chat, SDXL Lustify for images and WAN 2.1 for"
        " video.|The real models are Qwen2.5-7B, SDXL Lustify and WAN 2.1; the demo models"
        " are tiny.",
        "on a card verbatim|the real models are",
    ),
    _intent(
        "verbatim",
        "what is Verbatim?|what is this?|what does Verbatim do?|explain Verbatim|tell me about"
        " Verbatim|what is this daemon?|what is this program?|what is this server?|what does this"
        " daemon do?|what is Verbatim for?|describe Verbatim|what am I running here?|what is this"
        " service?|can you explain this daemon?|what does this worker do?|what is this worker?"
        "|what is this software?|what is the Verbatim daemon?|what does this server do?"
        "|what is this thing?|tell me what Verbatim is|why does Verbatim exist?"
        "|what is this project?|explain this program|what do I use Verbatim for?"
        "|give me a summary of Verbatim",
        "Verbatim is a GPU inference worker that runs exactly the messages and parameters that"
        " arrive.|Verbatim is one daemon for chat, images and video. It runs exactly what arrives"
        " and adds nothing.",
        "runs exactly",
    ),
    _intent(
        "name",
        "why is it called Verbatim?|why the name Verbatim?|what does verbatim mean?|where does the"
        " name come from?|what does the name Verbatim mean?|what is the meaning of the name?"
        "|what does the word verbatim mean?|why do you call it Verbatim?|explain the name"
        "|why this name?|what does the name say?|who chose the name Verbatim?"
        "|is Verbatim a Latin word?|the name Verbatim, why?",
        "Verbatim means word for word: your messages reach the model as you wrote them.",
        "word for word",
    ),
    _intent(
        "chat port",
        "which port is the chat on?|what is the chat port?|where is the chat?|on which port do you"
        " listen?|what port are you on?|which port for chat?|which port does /chat use?|which port"
        " do I use to chat?|where do I send chat messages?|what's the port of the chat?|which port"
        " is for enhancement?|on what port is /enhance?"
        "|what port does the chat use?|where can I chat?|at which port do you answer?"
        "|which port do I need for chat?|port for chat?|which port serves /chat?"
        "|where do I post to /enhance?|tell me the chat port|what port is /chat on?"
        "|which port for prompts?",
        "Chat and prompt enhancement are on port 7861.|Use port 7861 for chat and enhancement.",
        "are on port 7861|use port 7861",
    ),
    _intent(
        "media port",
        "which port is for images?|which port for video?|what is the image port?|what is the video"
        " port?|where are images made?|which port makes pictures?|on which port are images and"
        " video?|what port do I use for pictures?|what is the media port?|which port does /generate"
        " use for images?|what's the port for clips?|which port for pictures and clips?"
        "|what port do images use?|port for images?|which port serves images?"
        "|where are videos made?|which port makes video?|which port do I need for video?"
        "|what port is /generate on?|tell me the image port|which port for clips?"
        "|port of the image service?",
        "Images and video are on port 7860.|Use port 7860 for images and video.",
        "are on port 7860|use port 7860",
    ),
    _intent(
        "picture",
        "how do I get a picture?|how do I make an image?|can you make a picture?|how can I generate"
        " an image?|can you draw?|how do I create a picture?|can you paint something?|how do I get"
        " an image?|draw me a picture|make a picture for me|how are pictures made?|where do I get"
        " an image?|I want a picture|how to generate images?|can you generate images?"
        "|can I have a picture?|please draw something|how does one make a picture?"
        "|paint me an image|show me a picture|how can I get pictures?|generate an image"
        "|can you create images?|I need an image|where can I make pictures?",
        "I only write text. Send your prompt to /generate on port 7860 with the type"
        " sdxl_image_fast.|Post a prompt to /generate on port 7860; the type"
        " sdxl_image_fast makes a"
        " picture.",
        "sdxl_image_fast",
    ),
    _intent(
        "clip",
        "how do I get a video?|how do I make a clip?|can you make a video?|how can I generate a"
        " video?|can you make clips?|how do I create a film?|make a video for me|how are videos"
        " made?|I want a video|how to generate videos?|where do I get a clip?|can you film"
        " something?|how do I get a clip?"
        "|can I have a video?|generate a video|please make a clip|I need a video"
        "|show me a video|how does one make a clip?|can you create videos?"
        "|where can I make a video?|I would like a clip|how can I get a clip?",
        "Post a prompt to /generate on port 7860 with the type video_fast.|I only write text. Send"
        " your prompt to /generate on port 7860 with the type video_fast.",
        "video_fast",
    ),
    _intent(
        "receipt",
        "what is a receipt?|what is in a receipt?|what are receipts?|why do answers have a receipt?"
        "|what does the receipt say?|explain the receipt|tell me about receipts|what's a"
        " receipt for?"
        "|where do I find the receipt?|does every answer have a receipt?|how can I check what was"
        " run?|how does Verbatim prove what it ran?"
        "|what does a receipt contain?|what is the receipt for?|why is there a receipt?"
        "|what do receipts prove?|how do I read the receipt?|what is written in the receipt?"
        "|is there a proof of what was run?|how do you prove what you ran?"
        "|what hashes are there?|show me what a receipt is",
        "Every answer carries a receipt: hashes of weights, messages and token ids, the parameters"
        " and the seed.|A receipt proves what was run: hashes of weights and messages, every"
        " parameter, and the seed.",
        "hashes",
    ),
    _intent(
        "seed",
        "what is a seed?|what does the seed do?|how do I get the same answer again?|are answers"
        " reproducible?|why is there a seed?|explain the seed|what are seeds for?|can I repeat an"
        " answer?|how do I reproduce an answer?|what is the seed for?|how do I get the same picture"
        " twice?|do I get the same result with the same seed?"
        "|how does the seed work?|why set a seed?|can I get the same image again?"
        "|how do I repeat a result?|what happens with the same seed?"
        "|what is the seed good for?|how can I get the same result?"
        "|is the result always the same?|what should the seed be?|does the seed matter?",
        "The seed fixes the random numbers: the same request with the same seed gives the same"
        " result.|With the same request and the same seed you get the same result, on any load.",
        "same seed",
    ),
    _intent(
        "health",
        "how do I check the health?|is the server healthy?|what is /health?|how do I see if it is"
        " ready?|where is the health check?|is everything ready?|how do I know that it works?|what"
        " does /health do?|how do I check that the engine is alive?|is the daemon alive?|are the"
        " engines ready?"
        "|how do I see if the server runs?|which route shows the health?|is it ready?"
        "|is the worker healthy?|how can I check the server?|is the engine ready?"
        "|how do I know it is ready?|how do I test that it runs?|are you ready?"
        "|where do I see the status?",
        "Ask /health on port 7861 or 7860; it answers in milliseconds, even while an engine loads."
        "|Look at /health. It says whether the engines are ready, and why not.",
        "/health",
    ),
    _intent(
        "worker info",
        "what is /worker/info?|how do I see the capabilities?|where do I find the limits?|which"
        " route lists the capabilities?|how do I see what the worker can do?|what does /worker/info"
        " say?|where are the capabilities listed?|how do I find out the limits?|which route"
        " describes the worker?|what's in /worker/info?|tell me about /worker/info"
        "|what are the limits?|what is listed in /worker/info?|what are the capabilities?"
        "|which limits are there?|how do I read the limits?|what does the info route say?"
        "|how do I list the capabilities?|where do I see limits?|which route has the limits?"
        "|is there a route with all limits?",
        "/worker/info lists the models, capabilities and limits of this worker.",
        "/worker/info",
    ),
    _intent(
        "job",
        "what is a job?|how do jobs work?|how do I follow a job?|where do I see the progress?|what"
        " are jobs?|explain jobs|how do I get the result of a job?|how do I see the progress of my"
        " picture?|tell me about jobs|where is my job?|how can I follow the progress?|how"
        " do I fetch"
        " the result?"
        "|what happens to my job?|how can I see a job?|how do I watch a job?"
        "|how long does my job take?|where do I find the result of a job?"
        "|where is my picture?|how do I see progress?|how do I get my video?"
        "|what is a job id?|can I watch the progress?",
        "Each picture or video is a job. /jobs/ID/events shows the progress, /jobs/ID/assets/0 is"
        " the result.|A job has an id; follow it at /jobs/ID/events and fetch it from"
        " /jobs/ID/assets/0.",
        "/jobs/id",
    ),
    _intent(
        "cancel",
        "how do I cancel a job?|can I stop a job?|how do I stop a picture?|can I cancel?|how do I"
        " abort a job?|cancel my job|how can I cancel a video?|how to stop a running job?"
        "|please stop the job|how do I end a job?|can I cancel a running video?|stop my job"
        "|is it possible to cancel?|how to cancel?|I want to cancel my picture"
        "|how do I cancel a picture?|can a job be stopped?|abort the job",
        "Cancel a job by its id on port 7860; the routes are in docs/http-api.md.",
        "cancel a job",
    ),
    _intent(
        "enhance",
        "what is enhancement?|what does /enhance do?|how do I enhance a prompt?|what is prompt"
        " enhancement?|how does enhancement work?|explain /enhance|can you enhance prompts?|can you"
        " improve my prompt?|how do I use /enhance?|what happens to a prompt in /enhance?|tell me"
        " about enhancement"
        "|what does enhancing do?|why enhance a prompt?|how can I enhance my prompt?"
        "|can you make my prompt better?|what is added in an enhancement?"
        "|how do I improve a prompt?|what does an enhancement add?|how are prompts enhanced?"
        "|what is /enhance for?|explain prompt enhancement",
        "Send a short prompt to /enhance on port 7861, and I add details of light, camera and"
        " quality.|Enhancement keeps all that your prompt says and adds details of light"
        " and camera.",
        "details of light",
    ),
    _intent(
        "prompt changes",
        "do you change my messages?|does Verbatim change my prompt?|is there a hidden"
        " system prompt?"
        "|do you add a system prompt?|is my text changed?|are messages filtered?|do you have a"
        " default system prompt?|is anything added to my prompt?|do you hide anything?|does it"
        " modify the messages?|are my messages cut?|is there a secret prompt?"
        "|do you edit my prompt?|is there a system prompt that I do not see?"
        "|is something hidden?|do you cut my messages?|do you rewrite my messages?"
        "|are there hidden instructions?|does the server change my text?"
        "|will my prompt be changed?|do you add text to my prompt?|is my prompt filtered?",
        "No. Messages arrive at the model exactly as you sent them; nothing is added and nothing is"
        " hidden.",
        "nothing is added",
    ),
    _intent(
        "stream",
        "can you stream?|how do I get a stream?|is streaming supported?|how do I stream an answer?"
        "|can I see the words one by one?|how does streaming work?|do you support streaming?|how to"
        " stream tokens?"
        "|is there streaming?|can answers be streamed?|how do I turn on streaming?"
        "|can I get the tokens as they come?|does it stream?|can I watch the answer grow?"
        "|do you stream tokens?|how do I see tokens one by one?",
        'Yes: send "stream": true, and the last event has the receipt and the timings.',
        '"stream": true',
    ),
    _intent(
        "key",
        "do I need a key?|where do I get an API key?|how do I set a key?|is there an API key?|do I"
        " need an account?|how does access work?|which key do I need?|what about the API"
        " key?|must I"
        " log in?|do I need a password?"
        "|is a key needed?|which API key do I use?|is there a password?|do I have to log in?"
        "|does the demo need a key?|how do I get a key?|what is the API key?"
        "|do I have to pay for a key?|is it open to everyone?|how is access protected?",
        "The demo needs no key. On a pod you set WAN_WORKER_API_KEY.",
        "no key",
    ),
    _intent(
        "card",
        "do I need a GPU?|does it run without a card?|do I need a graphics card?|can it run on a"
        " CPU?|does this run on my laptop?|which card do I need?|what hardware do I need?|does it"
        " work without a GPU?|how much memory does the card need?|can I run it on a laptop?"
        "|which GPU do I need?|how big must the card be?|does it need CUDA?"
        "|is a GPU required?|can I use it without a graphics card?"
        "|does it run on a normal computer?|how much VRAM do I need?"
        "|will it run on my computer?|what machine do I need?|is a CPU enough?",
        "The demo runs on any CPU. The real models need a card with 24 GB or more.",
        "any cpu",
    ),
    _intent(
        "start",
        "how do I start Verbatim?|how do I start the daemon?|how do I run this?|how do I start it?"
        "|which command starts the server?|how do I install it?|how to start?|how do I set it up?"
        "|what is the command to start?|how do I launch Verbatim?"
        "|how is it started?|what do I type to start?|how do I get it running?"
        "|what starts the daemon?|how do I begin?|how to run the server?"
        "|what is the start command?|where do I start?|how can I start the worker?"
        "|how do I install Verbatim?",
        "Run ./scripts/serve; it installs what is needed and starts everything.",
        "./scripts/serve",
    ),
    _intent(
        "stop",
        "how do I stop Verbatim?|how do I stop the daemon?|how do I shut it down?|which command"
        " stops the server?|how do I quit?|how do I end it?|how to stop the server?|how do"
        " I turn it"
        " off?"
        "|how do I close it?|what stops the daemon?|how do I switch it off?|how to quit?"
        "|what is the stop command?|how to shut down?|how can I stop the worker?"
        "|how do I kill the server?|how do I turn the server off?|how to end the daemon?",
        "Press Ctrl-C, or run python orchestrator.py stop. It drains first and then stops.",
        "ctrl-c",
    ),
    _intent(
        "docs",
        "where is the documentation?|where are the docs?|is there a manual?|where can I read more?"
        "|which document describes the API?|do you have documentation?|where do I find the API?"
        "|what are the routes?|where is the API described?|how do I learn more?"
        "|where can I find documentation?|which file explains the API?"
        "|where do I read about the routes?|is there an API reference?|where is the manual?"
        "|which routes are there?|where can I learn about Verbatim?"
        "|is there something to read?|where is it documented?"
        "|how can I learn more about the API?",
        "Read README.md first; every route and field is in docs/http-api.md.",
        "read readme.md",
    ),
    _intent(
        "training",
        "how were you trained?|what were you trained on?|who trained you?|what is your training"
        " data?|where do you come from?|how were you made?|who made you?|who created you?|what data"
        " did you learn from?|on what were you trained?|who built you?|where were you trained?"
        "|where did you learn this?|how did you learn?|which data were you trained with?"
        "|what were you made of?|who is your maker?|how long were you trained?|who wrote you?"
        "|on which data did you learn?|who developed you?|how was this model made?",
        "I was trained for a few minutes on a CPU, with sentences that a grammar made.|A script in"
        " this repository trained me on made-up sentences: scripts/train_demo_chat.py.",
        "i was trained|this repository trained",
    ),
    _intent(
        "parameters",
        "which parameters can I set?|what is temperature?|what does temperature do?|how do"
        " I set the"
        " temperature?|what is top_p?|which sampling parameters are there?|can I set the"
        " temperature?|what parameters do you take?|what is max_tokens?|how do I make answers less"
        " random?"
        "|which settings are there?|what is the temperature?|how random are you?"
        "|how do I change the temperature?|what does top_p do?|what is top_k?"
        "|what can I set in a request?|which options does a request have?"
        "|how do I limit the length?|how do I set max_tokens?",
        "You can set temperature, top_p, top_k, max_tokens, stop and seed; what is absent is off."
        "|Temperature sets how random the words are; 0 always takes the likeliest one. max_tokens"
        " limits the length.",
        "temperature",
    ),
    _intent(
        "shapes",
        "what can the demo image model draw?|which shapes do you know?|what can I draw?|what"
        " prompts work?|which prompts work with the demo models?|what can the demo models paint?"
        "|which shapes can it paint?|which colours do you know?|give me an example prompt|what is a"
        " good prompt?|suggest a prompt|what should I draw?"
        "|what should I paint?|which prompt should I try?|what can it paint?"
        "|which things can the demo draw?|give me a prompt|what is a good example?"
        "|do you have an example prompt?|which colours can I use?|what shapes are there?"
        "|what does the demo painter know?",
        "The demo painters know circles, squares, triangles and stars. Try: a red circle on the"
        " left.|Try a small scene, such as: a blue star above a yellow square.",
        "try",
    ),
    _intent(
        "memory",
        "do you remember me?|do you have a memory?|do you remember our last chat?|do you store my"
        " messages?|do you keep my data?|can you remember things?|is my text stored?|do you"
        " know me?"
        "|will you remember this?|can you remember me?|do you remember what I said?"
        "|do you save our chat?|is my data kept?|do you forget everything?"
        "|what do you remember?|do you keep messages?|are chats stored?|do you learn from me?",
        "No, I remember nothing; I see only the messages of one request.",
        "remember nothing",
    ),
    _intent(
        "human",
        "are you human?|are you a person?|are you alive?|are you real?|do you have"
        " feelings?|are you"
        " conscious?|do you think?|are you a robot?|are you a machine?|is there a human?"
        "|are you a real person?|am I talking to a human?|do you feel anything?"
        "|are you a computer?|are you an AI?|can you think?|do you have a body?"
        "|are you intelligent?|is this a person?|do you sleep?",
        "No, I am a small program: a demo model that predicts the next word.",
        "predicts the next word",
    ),
    _intent(
        "yes",
        "ok|okay|great|nice|cool|good|very good|I see|alright|well done|wonderful|interesting"
        "|fine|good answer|that is good|perfect|sure|yes|right|that's nice|amazing|very nice",
        "Good! What shall we do next?|Fine. Give me a prompt, or ask me something.",
        "next?|give me a prompt",
    ),
    _intent(
        "language",
        "do you speak German?|which languages do you speak?|can you speak French?|do you speak"
        " English?|can you speak Spanish?|do you know other languages?|what languages do you know?"
        "|do you understand Chinese?"
        "|can you speak other languages?|do you understand German?|do you speak Italian?"
        "|can I write in French?|is English your language?|do you know Spanish?"
        "|what language do you speak?|can we speak Chinese?|do you speak Japanese?"
        "|can you translate?",
        "I only know a little English.",
        "english",
    ),
    _intent(
        "code",
        "can you write code?|write a program|can you program?|write a Python function|do you know"
        " Python?|can you fix my code?|write some code for me|can you code?"
        "|can you program in Python?|please write a script|write code|help me with my code"
        "|can you write a function?|can you debug this?|do you write programs?"
        "|write a script for me|are you able to code?|can you write Java?",
        "No, I cannot write code; I am a small demo model. I can enhance prompts.",
        "cannot write code",
    ),
)

DO_NOT_KNOW = (
    "I am a small demo model and do not know that. I can enhance prompts and tell you about"
    " Verbatim.",
    "I do not know that; I am only a small demo model. Ask me about Verbatim, or send me a prompt.",
)
UNKNOWN_SIGN = "not know that"
# {noun} and {name} are filled in.
UNKNOWN = (
    "what is the capital of {name}?", "who was {name}?", "how old is {name}?",
    "what is the weather like today?", "who won the game yesterday?", "how do I bake a {noun}?",
    "what is {digit} plus {digit}?", "why is the sky blue?", "what does a {noun} eat?",
    "how much does a {noun} cost?", "where can I buy a {noun}?", "what time is it?",
    "who wrote the {noun}?", "what is the meaning of life?", "how far away is the {noun}?",
    "how fast is a {noun}?", "tell me about {name}", "when was {name} born?",
    "what is the news today?", "why do {noun}s exist?", "how tall is a {noun}?",
    "do you know {name}?", "what is {digit} times {digit}?", "who is the president?",
    "how many {noun}s are there in the world?", "what is a {noun}?", "where is {name}?",
    "which {noun} is the best?", "will it rain tomorrow?", "can you explain a {noun} to me?",
    "what should I eat today?", "where do {noun}s live?", "is {name} at home?",
    "what is the square root of {digit}?", "how do I repair a {noun}?",
)  # fmt: skip

# A first question by intent, what follows it, and the answer to that.
FOLLOW_UPS = (
    ("chat port", ("and the port for video?", "and for images?", "and for pictures?",
                   "and the port for clips?", "and the media port?"), "media port"),
    ("media port", ("and the port for chat?", "and for chat?", "and for enhancement?",
                    "and the chat port?", "and where is the chat?"), "chat port"),
    ("picture", ("and a video?", "and how do I get a video?", "and for a clip?",
                 "what about videos?", "and clips?"), "clip"),
    ("clip", ("and a picture?", "and how do I get a picture?", "and for an image?",
              "what about images?", "and pictures?"), "picture"),
    ("who", ("how big are you?", "are you a large model?", "and how large are you?",
             "are you a real model?", "and what size?"), "real model"),
    ("verbatim", ("which models does it serve?", "and which models?", "what models does it run?",
                  "with which models?", "and the models?"), "real models"),
    ("joke", ("another one", "one more", "another one please", "again!", "more"), "joke"),
    ("greeting", ("how are you?", "and how are you?", "how is it going?", "how do you do?",
                  "are you well?"), "feeling"),
    ("receipt", ("and the seed?", "what about the seed?", "and what is the seed for?",
                 "and seeds?", "why the seed?"), "seed"),
    ("feeling", ("good, and what can you do?", "fine. what can you do?", "good. can you help me?",
                 "I am fine, too. how can you help?", "good to hear, what can you do?"),
     "abilities"),
)  # fmt: skip

CHAT_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a helpful chat assistant. Answer briefly.",
    "You are a polite assistant who answers in one or two sentences.",
    "You are the assistant of this server.",
    "Be helpful and honest.",
    "You are a chat assistant.",
    "Answer the user's questions.",
    "You are a kind and honest companion.",
    "Chat with the user.",
    "You are a helpful assistant that knows the Verbatim daemon. If you do not know something, say"
    " so.",
    "You are demo-chat, the assistant of Verbatim.",
    "Have a friendly conversation with the user.",
    "You are an assistant for questions about this service. Be short and clear.",
    "You are a concise assistant.",
    "You answer questions about the worker.",
    "Talk to the user in simple English.",
    "You are a support agent.",
    "Reply in a friendly tone and keep it short.",
    "You are a conversational partner. Never use more than three sentences.",
)
# Around questions.
BEFORE = ("hey, ", "hi, ", "please tell me: ", "so, ", "ok, ", "I have a question: ", "and ",
          "hello! ", "one question: ", "sorry, ")  # fmt: skip
AFTER = (" thanks", " please", " :)", "?", " I am new here.")
# Words that may stand for each other in a question of training.
ALIKE = (
    ("what is", "what's"), ("how do I", "how can I"), ("how do I", "how to"), ("picture", "image"),
    ("pictures", "images"), ("clip", "video"), ("clips", "videos"), ("get", "make"),
    ("make", "create"), ("generate", "make"), ("which", "what"), ("can you", "could you"),
    ("explain", "tell me about"), ("the daemon", "Verbatim"), ("the server", "the daemon"),
    ("this daemon", "this server"), ("where do I find", "where is"), ("how large", "how big"),
    ("do you know", "can you tell me"), ("GPU", "graphics card"), ("card", "GPU"),
    ("run", "start"), ("stop", "end"), ("show", "list"), ("documentation", "manual"),
    ("language model", "model"), ("answer", "reply"), ("messages", "prompts"),
    ("do you", "can you"),
    ("help me", "do for me"), ("need", "have to have"), ("big", "large"),
)  # fmt: skip
