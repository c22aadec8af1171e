"""Settings of how captions are made and audited. Imports nothing heavy: command lines are read with it."""

import json
import re
from dataclasses import dataclass, field, fields, replace

from vlmcap.data.corpora import KEY
from vlmcap.errors import UserError

# What an audit finds wrong with the form of a caption.
FORM = ("empty", "repetition", "truncated", "non_japanese", "copied_prompt", "special_tokens")
# What holds a caption back unless other reasons are asked for.
HELD_BACK = ("hallucination", "gender_mismatch", "gender_unsupported", *FORM)


@dataclass
class BeamArguments:
    """How captions are searched for."""

    num_beams: int = field(default=3, metadata={"help": "Beam width; 1 is greedy search."})
    max_new_tokens: int = field(default=64, metadata={"help": "A caption is cut after this many tokens."})
    generation_batch_size: int = field(default=16, metadata={"help": "Images generated for at once."})
    no_repeat_ngram_size: int = field(
        default=0, metadata={"help": "No n-gram of this many tokens occurs twice in a caption; 0 allows it."}
    )


@dataclass
class GenerationArguments(BeamArguments):
    """How captions are asked for, searched for and constrained."""

    prompt: str = field(
        default="この画像を日本語で短く説明してください。", metadata={"help": "The user's text after the image."}
    )
    japanese_only: bool = field(
        default=False, metadata={"help": "Constrain captions to Japanese script, digits and punctuation."}
    )
    avoid_words: str | None = field(
        default=None,
        metadata={
            "help": "File of words, one a line, that no caption may contain, e.g."
            " recipes/vlmcap/evaluation/lexicons/avoid_persons_ja.txt."
        },
    )


@dataclass
class PromptArguments:
    """Several prompts of one picture, by KEY: a language, or language/style: `ja/plain`, `ja/polite`, `en`.

    A caption belongs to the key of its language and style (columns `languages` and `styles` of the dataset), else to
    that of its language.
    """

    prompts: dict | str | None = field(
        default=None,
        metadata={
            "help": "KEY -> prompt, or a list of wordings, of which training draws one by seed; instead of --prompt,"
            " which becomes the first wording of the first key. On the command line as JSON."
        },
    )
    prompt_weights: dict | str | None = field(
        default=None,
        metadata={
            "help": "KEY -> how often its captions are trained on, beside the other keys; left out: every caption of"
            " every key once an epoch."
        },
    )
    also_score: dict | str | None = field(
        default=None,
        metadata={"help": "KEY -> prompt of captions that are scored before and after, and not trained on."},
    )

    def __post_init__(self):
        for name in ("prompts", "prompt_weights", "also_score"):
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, read_mapping(f"--{name}", value))
        wordings = {key: [text] if isinstance(text, str) else text for key, text in (self.prompts or {}).items()}
        for key, texts in (wordings | {k: [v] for k, v in (self.also_score or {}).items()}).items():
            if not re.fullmatch(KEY, str(key)):
                raise ValueError(f"{key!r} is not a key of prompts: write LANGUAGE or LANGUAGE/STYLE, as in ja/polite")
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
                raise ValueError(f"the prompt of {key} must be a text or a list of texts, but is {texts!r}")
        if self.prompts is not None and not self.prompts:
            raise ValueError("prompts is empty: name a key with its prompt, or leave it out")
        if both := sorted(set(wordings) & set(self.also_score or {})):
            raise ValueError(f"also_score: {both[0]} is trained on (prompts), and scored in any case: leave it out")
        if (self.prompt_weights or self.also_score) and not self.prompts:
            raise ValueError("prompt_weights and also_score need prompts: {KEY: prompt}")
        for key, weight in (self.prompt_weights or {}).items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise ValueError(f"prompt_weights: {key} must be a number above 0, but is {weight!r}")
        if self.prompt_weights and set(self.prompt_weights) != set(wordings):
            odd = sorted(set(self.prompt_weights) ^ set(wordings))
            raise ValueError(f"prompt_weights must have the keys of prompts, and differ in {', '.join(odd)}")
        self.wordings: dict[str, list[str]] = wordings

    def main(self, args: GenerationArguments) -> GenerationArguments:
        """`args` with the first wording of the first key as its prompt, if there are prompts."""
        return replace(args, prompt=next(iter(self.first_wordings.values()))) if self.prompts else args

    def all_wordings(self, prompt: str) -> list[str]:
        """Every prompt that is trained on, the main one first: `prompt`, or the wordings of all keys."""
        return [text for texts in self.wordings.values() for text in texts] or [prompt]

    @property
    def first_wordings(self) -> dict[str, str]:
        """KEY -> the prompt that captions are asked for with, of all keys that are scored, trained ones first."""
        return {key: texts[0] for key, texts in self.wordings.items()} | (self.also_score or {})


def read_mapping(option: str, text: str) -> dict:
    """A mapping that was given on the command line. Raises ValueError naming the option."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f'{option} must be JSON, as in \'{{"en": "Describe this image."}}\': {error}') from error
    if not isinstance(value, dict):
        raise ValueError(f"{option} must be a JSON object, but is {text}")
    return value


FORMATS = ("text", "jsonl", "csv", "html")
DTYPES = ("float32", "bfloat16", "float16")
OF_ADAPTER = "default: the adapter's captioning.json, else"


@dataclass
class CaptionArguments:
    """scripts/caption.py: which pictures, by which model, written where. None leaves a choice to captioning.json."""

    pictures: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Pictures, folders (with their subfolders), patterns such as 'photos/**/*.jpg', or - for a list of"
            " names on stdin, one a line. --pictures may be left out: `caption.py photo.jpg --adapter you/name`."
        },
    )
    adapter: str | None = field(
        default=None, metadata={"help": "What a recipe trained (OUTPUT_DIR/adapter or /model): Hub id or folder."}
    )
    adapter_revision: str | None = field(default=None, metadata={"help": "Revision of the adapter on the Hub."})
    model: str | None = field(
        default=None,
        metadata={
            "help": "A model without an adapter: Hub id or folder. With --adapter: where its base is, instead of the"
            " name that the adapter gives. With --server: the name of the served model."
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of --model on the Hub."})
    output: str | None = field(
        default=None, metadata={"help": "File to write; the same command continues it. Without it: to stdout."}
    )
    format: str | None = field(
        default=None,
        metadata={"help": "text, jsonl, csv or html; default: by the ending of --output, else text."},
    )
    sidecar: bool = field(
        default=False,
        metadata={"help": "Write a .txt beside each picture. Pictures that have one are left out, without --output."},
    )
    overwrite: bool = field(default=False, metadata={"help": "With --sidecar: overwrite a .txt that exists."})
    num_captions: int = field(
        default=1, metadata={"help": "Captions of each picture, the best first: alternatives of the beam."}
    )
    prompt: str | None = field(default=None, metadata={"help": f"Text after the image; {OF_ADAPTER} the recipe's."})
    language: str | None = field(
        default=None,
        metadata={"help": "Of an adapter with several prompts: the one for captions in this language, e.g. en."},
    )
    style: str | None = field(
        default=None, metadata={"help": "The one for captions of this style, e.g. polite; with --language or alone."}
    )
    num_beams: int | None = field(default=None, metadata={"help": f"Beam width, 1 is greedy; {OF_ADAPTER} 3."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": f"A caption is cut after this many tokens; {OF_ADAPTER} 64."}
    )
    no_repeat_ngram_size: int | None = field(
        default=None, metadata={"help": f"No n-gram of so many tokens occurs twice; {OF_ADAPTER} 0, which allows it."}
    )
    japanese_only: bool | None = field(
        default=None, metadata={"help": f"Japanese script, digits and punctuation alone; {OF_ADAPTER} false."}
    )
    avoid_words: str | None = field(
        default=None, metadata={"help": "File of words, one a line, that no caption may contain."}
    )
    load_in_4bit: bool | None = field(default=None, metadata={"help": f"Language model in NF4; {OF_ADAPTER} false."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "float32, bfloat16 or float16; default: float32 on a CPU, on a GPU the adapter's where it has it."
        },
    )
    min_pixels: int | None = field(
        default=None, metadata={"help": f"Smallest image in pixels; {OF_ADAPTER} the processor's. Qwen-VL alone."}
    )
    max_pixels: int | None = field(
        default=None,
        metadata={"help": f"Largest image in pixels; {OF_ADAPTER} the processor's (1,003,520 for a server)."},
    )
    batch_size: int = field(
        default=16, metadata={"help": "Pictures captioned at once; a kill loses about as many captions."}
    )
    workers: int = field(default=4, metadata={"help": "Threads that read pictures ahead of the model."})
    review_queue: str | None = field(
        default=None, metadata={"help": "Folder for released.jsonl and held_back.jsonl. Needs --output."}
    )
    hold_back: list[str] = field(
        default_factory=list,
        metadata={"help": f"Reasons to hold a caption back, of: {', '.join(FORM)}. Default: those fit for the model."},
    )
    server: str | None = field(
        default=None,
        metadata={
            "help": "Address of an OpenAI-compatible chat server, e.g. http://localhost:8000; a key for it is taken"
            " from the environment variable CAPTION_SERVER_KEY."
        },
    )
    concurrency: int = field(default=8, metadata={"help": "Requests to --server at once."})

    def __post_init__(self):
        for name in ("num_captions", "num_beams", "max_new_tokens", "batch_size", "workers", "concurrency"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be 1 or more, but is {getattr(self, name)}")
        for name, known in (("format", FORMATS), ("dtype", DTYPES)):
            if getattr(self, name) not in (None, *known):
                raise ValueError(f"--{name} must be one of {', '.join(known)}, but is {getattr(self, name)}")
        for reason in self.hold_back:
            if reason not in FORM:
                raise ValueError(f"--hold_back {reason}: without references there are only {', '.join(FORM)}")
        if self.format is None:
            ending = (self.output or "").rsplit(".", 1)[-1].lower()
            self.format = ending if ending in FORMATS else "text"


def check_caption_arguments(args: CaptionArguments) -> None:
    """Raises UserError where settings are missing or exclude each other, as far as no model must be asked."""
    if not args.pictures or not (args.adapter or args.model or args.server):
        raise UserError("pictures, and --adapter, --model or --server are needed; --help shows examples")
    if args.format == "html" and not args.output:
        raise UserError("--format html writes a file: add --output captions.html")
    if args.review_queue and not args.output:
        raise UserError("--review_queue divides the captions of a file: add --output captions.jsonl")
    if args.prompt and (args.language or args.style):
        raise UserError(
            "--language and --style choose one of the adapter's prompts, and --prompt is another: give one"
        )
    if args.overwrite and not args.sidecar:
        raise UserError("--overwrite is for the .txt files of --sidecar: add --sidecar, or leave it out")
    if args.num_beams:
        check_num_captions(args.num_captions, args.num_beams)
    unfit = [
        name
        for name in "num_beams no_repeat_ngram_size japanese_only avoid_words load_in_4bit dtype min_pixels".split()
        if getattr(args, name)
    ]
    if args.server and (unfit or args.num_captions > 1):
        option = unfit[0] if unfit else "num_captions"
        raise UserError(f"--{option} cannot be asked of a server, which decodes in its own way: leave it out")


def check_num_captions(num_captions: int, num_beams: int) -> None:
    """Raises UserError where more captions are asked for than the beam has."""
    if num_captions > num_beams:
        raise UserError(
            f"--num_captions {num_captions} is more than the beam is wide, {num_beams}: add --num_beams {num_captions}"
        )


def name_pictures(words: list[str]) -> list[str]:
    """The command line with all pictures after --pictures, wherever they were in it.

    They are the words that are neither an option nor the value of one: a switch has a value only if that reads as one
    (true, false), --hold_back has all words up to one that is not a reason, every other option has one value.
    """
    kinds = {f"--{known.name}": known.type for known in fields(CaptionArguments)}
    pictures, rest, option = [], [], None
    for number, word in enumerate(words):
        if word == "--":
            # argparse takes what begins with a dash for an option.
            pictures += [f"./{name}" if name.startswith("-") else name for name in words[number + 1 :]]
            break
        if word.startswith("-") and word != "-":
            option = None if "=" in word or word in ("-h", "--help") else word
            if kinds.get(word.replace("-", "_").replace("__", "--", 1)) in (bool, bool | None):
                following = words[number + 1 : number + 2]
                option = word if following and following[0].lower() in ("true", "false") else None
                rest += [word] if option else [word, "true"]
            elif word != "--pictures":
                rest.append(word)
        elif option in (None, "--pictures") or option == "--hold_back" and word not in FORM:
            pictures.append(word)
        else:
            rest.append(word)
            option = option if option == "--hold_back" else None
    return ["--pictures", *pictures, *rest] if pictures else rest
