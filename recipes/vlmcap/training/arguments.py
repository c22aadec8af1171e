"""Settings of recipes. Imports nothing heavy: command lines are read with it.

The classes that end in Fields are what a recipe adds to transformers' TrainingArguments or TRL's SFTConfig, whose own
fields are `vlmcap.training.inherited`. Joined with the real one they are CaptionSFTConfig, CaptionDPOConfig,
CaptionGRPOConfig, CaptionerTrainingArguments and FoodTrainingArguments (`vlmcap.training.trainer_arguments`), which
trainers take. What can be checked without torch is checked here, in `__post_init__`, so that a mistake is reported at
once.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

# What a recipe says when Ctrl-C ends it outside of a training step.
CONTINUE = "With --resume_from_checkpoint latest it continues from the last whole checkpoint, or with its captions."
# What may choose the best checkpoint and end a run early.
CAPTION_METRICS = "cider_d bleu_1 bleu_2 bleu_3 bleu_4 rouge_l".split()
# Optimizers of transformers that are refused, by how their names begin.
UNFIT_OPTIMIZERS = {
    ("galore", "apollo", "lomo", "adalomo"): "it updates whole weight matrices of the model by itself",
    ("schedule_free",): "it keeps other weights for validation than for training",
}


@dataclass
class ScoredSplitArguments:
    """What a model is evaluated on."""

    dataset: str = field(
        metadata={
            "help": "Caption dataset made by scripts/publish_datasets.py: Hub id (you/stair-captions-ja) or folder."
        }
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the dataset on the Hub."})
    image_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder or zip file of the photographs, for a dataset published without them; COCO's may be in "
            "its folders (train2014/, ...) or zip files."
        },
    )
    validation_split: str = field(
        default="validation",
        metadata={"help": "Split whose captions rank the checkpoints, with eval_strategy: steps."},
    )
    test_split: str = field(default="test", metadata={"help": "Split on which base and trained model are scored."})
    max_validation_images: int = field(default=300, metadata={"help": "Validate on this many images, drawn by seed."})
    max_test_images: int | None = field(default=None, metadata={"help": "Score on the first N test images only."})
    tokenizer: str = field(default="unidic-lite", metadata={"help": "Word segmentation for the metrics."})


@dataclass
class SplitArguments(ScoredSplitArguments):
    """What is trained and evaluated on."""

    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    max_train_images: int | None = field(default=None, metadata={"help": "Train on the first N images only."})
    max_bad_images: float = field(
        default=0.01, metadata={"help": "Share of training pictures that may be unreadable before the run stops."}
    )


@dataclass
class InstructionArguments:
    """Conversations about pictures that are trained on beside captions."""

    instructions: str | None = field(
        default=None,
        metadata={
            "help": "Rows with `messages` (one image, one or more turns), trained on beside the captions: a Hub id, a"
            " folder of a dataset, or a JSONL file."
        },
    )
    instructions_split: str = field(default="train", metadata={"help": "Split of a dataset of instructions."})
    instructions_revision: str | None = field(
        default=None, metadata={"help": "Revision of a dataset of instructions on the Hub."}
    )
    instructions_image_dir: str | None = field(
        default=None, metadata={"help": "Folder of the pictures that instructions name, where they are not embedded."}
    )


@dataclass
class PreferenceArguments(ScoredSplitArguments):
    """Preferences to train on, and the captions that the model is scored with."""

    preferences: str | None = field(
        default=None,
        metadata={
            "help": "Preferences: preferences.jsonl of scripts/human_eval.py, or any TRL preference dataset with"
            " images, as a file of rows, a Hub id or a folder. Needed."
        },
    )
    preferences_split: str = field(default="train", metadata={"help": "Split of a dataset of preferences."})
    preferences_revision: str | None = field(
        default=None, metadata={"help": "Revision of a dataset of preferences on the Hub."}
    )
    preferences_image_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the pictures that preferences name. Default: the working folder, then the file's own."
        },
    )
    heldout_preferences: str | None = field(
        default=None,
        metadata={"help": "Preferences that are only looked at, in the same forms; default: a share of the others."},
    )
    heldout_share: float = field(
        default=0.1, metadata={"help": "Share of the preferences' images, drawn by seed, that is only looked at."}
    )


@dataclass
class CaptionerDataArguments(SplitArguments):
    """What is trained and evaluated on, and how captions are scored."""

    tokenizer: str = field(default="english", metadata={"help": "Word segmentation for the metrics."})
    base_saw: list[str] = field(
        default_factory=lambda: ["unknown", "unknown", "unknown"],
        metadata={
            "help": "Whether the untrained model saw STAIR, YJ Captions and COCO, in this order: unknown, no or train."
            " Goes into the card."
        },
    )
    spice_url: str | None = field(
        default=None, metadata={"help": "SPICE service; vlmcap/evaluation/external.py describes its protocol."}
    )
    spice_dir: str | None = field(
        default=None, metadata={"help": "Or a local SPICE: folder with spice-1.0.jar and the CoreNLP jars in lib/."}
    )

    def __post_init__(self):
        if self.spice_url and self.spice_dir:
            raise ValueError(f"spice_url {self.spice_url} and spice_dir {self.spice_dir}: give one of the two")
        if len(self.base_saw) != 3:
            raise ValueError(f"base_saw: {self.base_saw}: give three, for STAIR, YJ Captions and COCO")


@dataclass
class TrainerFields:
    """Fields for a TrainingArguments beside it: `class X(TrainerFields, TrainingArguments)`.

    `bf16` and `fp16` may be left out: bfloat16 on compute capability 8.0 and later, float16 on older GPUs, float32 on
    a CPU (`vlmcap.training.trainer_arguments.choose_by_device`).
    """

    # What `validate` of the trainer returns.
    metrics: ClassVar[list[str]] = CAPTION_METRICS

    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16; left out with fp16, the device decides (see the class)."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep false: the collator reads columns that the model does not take."}
    )
    accelerator_config: dict | str | None = field(
        default=None,
        metadata={"help": "Of accelerate; by default batches travel to the GPU from pinned memory, beside its work."},
    )
    dataloader_pin_memory: bool | None = field(
        default=None,
        metadata={"help": "Page-locked memory for batches; left out: on GPUs.", "nargs": "?", "const": True},
    )
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Label smoothing of the caption tokens."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop when the model has not improved for this many evaluations (every eval_steps with"
            " eval_strategy: steps). They are ranked by metric_for_best_model, by default cider_d."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "By how much that metric must be better to count as better."}
    )

    def __post_init__(self):
        validates, keeps_best = self.eval_strategy != "no", self.save_strategy == "best"
        if (self.early_stopping_patience or self.load_best_model_at_end or keeps_best) and not validates:
            raise ValueError(
                "early_stopping_patience, load_best_model_at_end and save_strategy: best rank the model by captions of"
                " validation images: set eval_strategy: steps and eval_steps, or switch them off (0, false and steps)"
            )
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise ValueError(
                "early_stopping_patience needs load_best_model_at_end: true, or the worse models are kept"
            )
        # Without load_best_model_at_end there must be no metric: to keep the best checkpoint, the parent would delete
        # the latest, from which the run continues.
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "cider_d"
        metric, choices = self.metric_for_best_model, ", ".join(self.metrics)
        if metric is not None and metric.removeprefix("eval_") not in self.metrics:
            raise ValueError(
                f"metric_for_best_model: {metric} is not measured during training; choose one of {choices}"
            )
        if metric is None and (keeps_best or self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")):
            raise ValueError(
                f"save_strategy: {self.save_strategy} with lr_scheduler_type: {self.lr_scheduler_type} follows a"
                f" metric; name it as metric_for_best_model, one of {choices}"
            )
        for beginnings, reason in UNFIT_OPTIMIZERS.items():
            if self.optim.startswith(beginnings):
                raise ValueError(f"optim: {self.optim} cannot be used here, {reason}; adamw_torch is the default")
        super().__post_init__()


@dataclass
class CaptionSFTFields(TrainerFields):
    """What caption training adds to SFTConfig, and the defaults that it needs."""

    max_length: int | None = field(
        default=None,
        metadata={"help": "Keep unset: a bound cuts image tokens. Bound the image with max_pixels instead."},
    )
    dataset_kwargs: dict | str | None = field(
        default_factory=lambda: {"skip_prepare_dataset": True},
        metadata={"help": "Keep: captions are tokenised with their images, in the collator."},
    )
    captions_per_image: int = field(
        default=5,
        metadata={
            "help": "Captions of an image that are trained on together, at the cost of little more than one. An image"
            " with more of them comes up more often. The batch size counts images."
        },
    )
    shared_prefix: bool = field(
        default=True,
        metadata={"help": "Feed image and prompt once for all of them; false feeds them again with every caption."},
    )
    cache_image_features: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which the frozen vision encoder's outputs are kept, so that it runs once an image and"
            " not once an epoch. Takes about 4 MB an image of 391 tokens; the exact size is printed first."
        },
    )

    def __post_init__(self):
        if self.cache_image_features and not self.shared_prefix:
            raise ValueError("cache_image_features needs the shared-prefix engine: leave shared_prefix at true")
        super().__post_init__()


@dataclass
class CaptionDPOFields(TrainerFields):
    """What training on preferences adds to TrainingArguments, by the names of TRL's DPOConfig.

    `metric_for_best_model`: a score of validation captions, or of the held-out pairs `preference_rate`,
    `reward_accuracy` or `reward_margin` (`vlmcap.training.dpo.CaptionDPOTrainer.preferred`).
    """

    metrics: ClassVar[list[str]] = [*CAPTION_METRICS, "preference_rate", "reward_accuracy", "reward_margin"]

    label_smoothing_factor: float = field(
        default=0.0, metadata={"help": "Keep 0: it is that of cross-entropy. That of preferences is label_smoothing."}
    )
    beta: float = field(
        default=0.1, metadata={"help": "How strongly the model is held to the adapter it starts from."}
    )
    loss_type: Literal["sigmoid", "robust"] = field(
        default="sigmoid",
        metadata={"help": "sigmoid, or robust: for preferences some of which are the wrong way round."},
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "With loss_type robust: the share of those preferences, from 0 to below 0.5."}
    )
    pairs_per_image: int = field(
        default=4,
        metadata={
            "help": "Pairs of an image that are trained on together. An image with more of them comes up more often."
            " The batch size counts images."
        },
    )
    cache_image_features: str | None = field(
        default=None,
        metadata={"help": "Folder in which the frozen vision encoder's outputs are kept; as in the SFT recipe."},
    )

    @property
    def captions_per_image(self) -> int:
        """Captions of an image that are trained on together, at most."""
        return 2 * self.pairs_per_image

    def __post_init__(self):
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: {self.label_smoothing_factor} is of cross-entropy, which is not trained"
                " here: leave it at 0 (label_smoothing is that of preferences)"
            )
        if not 0 <= self.label_smoothing < 0.5 or (self.label_smoothing and self.loss_type != "robust"):
            raise ValueError(
                f"label_smoothing: {self.label_smoothing} must be from 0 to below 0.5, and has an effect with"
                " loss_type: robust alone (in TRL too)"
            )
        if self.beta <= 0 or self.pairs_per_image < 1:
            raise ValueError(
                f"beta: {self.beta} must be above 0, and pairs_per_image: {self.pairs_per_image} 1 or more"
            )
        super().__post_init__()


@dataclass
class CaptionerFields(TrainerFields):
    """What the training of a captioner adds to TrainingArguments.

    `metric_for_best_model`: a score of validation captions (cider_d, bleu_1 .. bleu_4, rouge_l), `loss` (mean
    cross-entropy of a validation token, unsmoothed), or `loss_and_bleu`, the mean of BLEU-2 and exp(-loss), the
    geometric mean of the probabilities of the validation tokens: both are in 0..1.
    """

    metrics: ClassVar[list[str]] = [*CAPTION_METRICS, "loss", "loss_and_bleu"]

    def __post_init__(self):
        if self.metric_for_best_model == "loss_and_bleu":
            self.greater_is_better = True
        super().__post_init__()


@dataclass
class FoodFields(CaptionerFields):
    """And a learning rate for each half of ViT + GPT-2."""

    encoder_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the ViT; learning_rate if left out."}
    )
    decoder_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of GPT-2 and its cross-attention; learning_rate if left out."}
    )


@dataclass
class CaptionGRPOFields(TrainerFields):
    """What training on rewards adds to TrainingArguments: settings of TRL's GRPOConfig, with its names and, except for
    `max_completion_length`, its defaults.

    One difference: `per_device_train_batch_size` counts images here and samples there. All samples of an optimizer
    step are drawn at once, as with TRL's `steps_per_generation` at its default.
    """

    metrics: ClassVar[list[str]] = [*CAPTION_METRICS, "reward"]

    label_smoothing_factor: float = field(default=0.0, metadata={"help": "Keep: samples are no labels to smooth."})
    num_generations: int = field(default=8, metadata={"help": "Captions that are sampled for each image of a step."})
    max_completion_length: int = field(
        default=64, metadata={"help": "A sample is cut after this many tokens; max_new_tokens is a good choice."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the samples: higher ones are more diverse."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the likeliest tokens with this much probability; 1.0: from all."}
    )
    top_k: int = field(default=0, metadata={"help": "Sample from this many tokens, the likeliest; 0: from all."})
    beta: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the KL divergence from the starting adapter, which holds the model near it; 0: none."
        },
    )
    use_bias_correction_kl: bool = field(
        default=True, metadata={"help": "Multiply the KL divergence by the ratio of probabilities, as TRL does."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Optimizer steps on the same samples."})
    epsilon: float = field(default=0.2, metadata={"help": "The ratio of probabilities is clipped below 1 - epsilon,"})
    epsilon_high: float | None = field(
        default=None, metadata={"help": "and above 1 + epsilon_high; left out: 1 + epsilon."}
    )
    loss_type: str = field(
        default="dapo",
        metadata={
            "help": "What the sum over tokens is divided by: grpo (each caption by its length), dr_grpo"
            " (max_completion_length) or dapo (all tokens of the step).",
            "choices": ["grpo", "dr_grpo", "dapo"],
        },
    )
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "Rewards are divided by their standard deviation within an image (group), within a step (batch),"
            " or by nothing (none).",
            "choices": ["group", "batch", "none"],
        },
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Leave samples that were cut out of the loss."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of reward_funcs, one each; left out: the defaults."}
    )
    cache_image_features: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which the frozen vision encoder's outputs are kept, so that it runs once an image and"
            " not once an epoch. Takes about 4 MB an image of 391 tokens; the exact size is printed first."
        },
    )

    @property
    def captions_per_image(self) -> int:
        """Captions of an image that are trained on together."""
        return self.num_generations

    def __post_init__(self):
        at_least = {"num_generations": 2, "max_completion_length": 1, "num_iterations": 1, "top_k": 0}
        at_least |= {"beta": 0, "epsilon": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)}: choose {least} or more")
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature}: choose a number above 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p}: choose a number above 0, 1 at most")
        if self.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor: {self.label_smoothing_factor}: samples are no labels to smooth")
        if self.ignore_data_skip and self.num_iterations > 1:
            raise ValueError("ignore_data_skip: samples of a checkpoint belong to its images; leave it at false")
        super().__post_init__()
