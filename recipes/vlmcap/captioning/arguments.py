"""Settings of how captions are made and audited. Imports nothing heavy: command lines are read with it."""

from dataclasses import dataclass, field

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
