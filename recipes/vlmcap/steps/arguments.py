"""Settings that the recipes of models with a prompt share. Imports nothing heavy: command lines are read with it."""

from dataclasses import dataclass, field

from vlmcap.captioning.arguments import PromptArguments
from vlmcap.training.arguments import ScoredSplitArguments

NO_PROMPTS = PromptArguments()  # a run with one prompt


@dataclass
class EvaluationArguments(ScoredSplitArguments):
    """What a model is evaluated on, and how its captions are scored and audited."""

    base_saw: str = field(
        default="unknown",
        metadata={
            "help": "Whether the base model saw STAIR, YJ Captions and COCO: unknown, no or train. Goes into the card."
        },
    )
    lexicon: str = field(
        default="coco_ja",
        metadata={"help": "Things that the audit (and the reward chair) looks for: coco_ja or a YAML file."},
    )
    instances: list[str] | None = field(
        default=None,
        metadata={
            "help": "COCO's instances_*.json of the test images, for the audit; without them the references alone say"
            " what is in an image."
        },
    )
    meteor: bool = field(
        default=True,
        metadata={"help": "METEOR 1.5 (English) in Java, if Java and the jar are there; seconds for each key."},
    )


def trained_prompts(prompts: PromptArguments) -> dict[str, str] | None:
    """Key -> the prompt that an adapter is asked, of the keys that it is trained on; None without keys."""
    return {key: texts[0] for key, texts in prompts.wordings.items()} or None


def reported_prompts(prompts: PromptArguments) -> dict:
    """What the model card prints among the settings."""
    if not prompts.prompts:
        return {}
    weights = {"prompt_weights": prompts.prompt_weights} if prompts.prompt_weights else {}
    return {"prompts": prompts.wordings} | weights
