"""Settings of what is loaded and what of it is trained. Imports nothing heavy: command lines are read with it."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

# Where the parts are (transformers 5.23): of the Qwen2-VL family first, then of LLaVA, PaliGemma, InternVL, SmolVLM.
# `lm_head` shares the embedding matrix.
VISION_TOWERS = ["model.visual", "model.vision_tower", "model.vision_model"]
UNQUANTISED = [*VISION_TOWERS, "model.multi_modal_projector", "model.connector", "lm_head"]  # in a 4-bit model
# Attention implementations and the module that each needs beside transformers. Others would be compiled code that
# transformers fetches from the Hub.
ATTENTION = {
    "sdpa": None,
    "eager": None,
    "flex_attention": None,
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
}


def check_attention(name: str) -> None:
    """Raises ValueError where there is no such attention implementation, or the module that it needs is missing."""
    if name not in ATTENTION:
        raise ValueError(f"attn_implementation: {name!r} is none of {', '.join(ATTENTION)}")
    if (module := ATTENTION[name]) and find_spec(module) is None:
        raise ValueError(
            f"attn_implementation: {name} needs the module {module}, which is not installed: install FlashAttention"
            " (https://github.com/Dao-AILab/flash-attention), or choose sdpa"
        )


@dataclass
class ModelArguments:
    """What is loaded and what of it is trained."""

    model_name_or_path: str = field(
        default="Qwen/Qwen2-VL-2B-Instruct", metadata={"help": "Base model: Hub id or local folder."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the base model on the Hub."})
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Adapter to train further, on other captions for instance: Hub id or local folder. The settings"
            " lora_r, lora_alpha, lora_top_layers, lora_target_modules and train_projector must be those it was"
            " trained with; a message names those that are not."
        },
    )
    adapter_revision: str | None = field(default=None, metadata={"help": "Revision of that adapter on the Hub."})
    attn_implementation: str = field(
        default="sdpa",
        metadata={
            "help": "Attention of the language model: sdpa, eager, or flex_attention (block-sparse; NVIDIA GPUs of"
            " compute capability 8.0 and later)."
        },
    )
    load_in_4bit: bool = field(
        default=True,
        metadata={"help": "NF4 with double quantisation for the language model; the vision tower stays unquantised."},
    )
    lora_r: int = field(default=32, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale: updates are multiplied by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the LoRA matrices."})
    lora_top_layers: int = field(default=6, metadata={"help": "Number of the last language layers that get LoRA."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        metadata={"help": "Linear layers inside a language layer that get LoRA."},
    )
    train_projector: bool = field(
        default=True, metadata={"help": "Train the projector (visual.merger) in full; otherwise it is frozen."}
    )
    min_pixels: int | None = field(
        default=56 * 56, metadata={"help": "Images are scaled up to at least this many pixels."}
    )
    max_pixels: int | None = field(
        default=400 * 28 * 28,
        metadata={"help": "Images are scaled down to at most this many pixels; 28 x 28 of them are one image token."},
    )

    def __post_init__(self):
        check_attention(self.attn_implementation)


@dataclass
class BlipArguments:
    """What is loaded and what of it is trained."""

    model_name_or_path: str = field(
        default="Salesforce/blip-image-captioning-base", metadata={"help": "BLIP captioner: Hub id or local folder."}
    )
    model_revision: str | None = field(
        default=None,
        metadata={"help": "Revision of the base model on the Hub, one with safetensors; a commit pins it."},
    )
    new_pieces: int = field(
        default=500,
        metadata={
            "help": "How many words the tokenizer learns from the training captions, the most frequent first; rarer"
            " ones are spelled. UIT-ViIC's 500th is seen five times."
        },
    )
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale: updates are multiplied by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the LoRA matrices."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: "query key value attention.output.dense crossattention.output.dense".split(),
        metadata={"help": "Linear layers of the text decoder's self- and cross-attention that get LoRA."},
    )


@dataclass
class VitGpt2Arguments:
    """The two pretrained parts, and what of them is trained. The cross-attention between them always is."""

    encoder_name_or_path: str = field(
        default="google/vit-base-patch16-224-in21k", metadata={"help": "Image encoder, a ViT: Hub id or local folder."}
    )
    encoder_revision: str | None = field(default=None, metadata={"help": "Revision of the encoder on the Hub."})
    decoder_name_or_path: str = field(
        default="openai-community/gpt2", metadata={"help": "Text decoder, a GPT-2: Hub id or local folder."}
    )
    decoder_revision: str | None = field(default=None, metadata={"help": "Revision of the decoder on the Hub."})
    train: Literal["encoder", "decoder", "both"] = field(
        default="both",
        metadata={
            "help": "Part that is trained: encoder, decoder or both. The cross-attention layers are new weights and"
            " are trained in every mode."
        },
    )
    freeze_vit_blocks: int = field(
        default=0, metadata={"help": "Freeze the first N blocks of a trained encoder, 0 to its depth (ViT-B: 12)."}
    )
    freeze_gpt2_blocks: int = field(
        default=0,
        metadata={
            "help": "Freeze the first N blocks of a trained decoder, 0 to its depth (GPT-2: 12), except for their"
            " cross-attention, which is new and trained."
        },
    )
    freeze_embeddings: bool = field(
        default=True,
        metadata={
            "help": "Freeze the patch and position embeddings of the encoder, and the token and position embeddings of"
            " the decoder; GPT-2's output layer is its token embedding. False trains those of a part that is trained."
        },
    )


@dataclass
class VitLlamaArguments:
    """Which ViT and Llama are put together, and what of them is trained."""

    encoder_name_or_path: str = field(
        default="google/vit-base-patch16-224-in21k", metadata={"help": "ViT: Hub id or local folder. Stays frozen."}
    )
    encoder_revision: str | None = field(default=None, metadata={"help": "Revision of the ViT on the Hub."})
    decoder_name_or_path: str = field(
        default="meta-llama/Llama-3.2-1B",
        metadata={
            "help": "Llama: Hub id or local folder. meta-llama/Llama-3.2-1B and -3B are gated: accept Meta's licence"
            " on their pages and log in with `hf auth login`."
        },
    )
    decoder_revision: str | None = field(default=None, metadata={"help": "Revision of the Llama on the Hub."})
    image_prefix: Literal["pooled", "patches"] = field(
        default="pooled",
        metadata={
            "help": "What of a picture comes before the caption: pooled, one vector ([CLS]), or patches, one for"
            " each patch (196 at 224 pixels)."
        },
    )
    prefix_size: float = field(
        default=1.0,
        metadata={
            "help": "How large the prefix is at the start, in multiples of the Llama's embeddings (root mean square)."
        },
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "NF4 with double quantisation for the Llama; the ViT stays unquantised."}
    )
    lora_r: int = field(default=8, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA scale: updates are multiplied by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the LoRA matrices."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"],
        metadata={"help": "Linear layers inside each layer of the Llama that get LoRA."},
    )
