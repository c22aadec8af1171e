"""Loading models for QLoRA and for inference: precision, NF4, LoRA on the top layers, projector, frozen tower."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import bitsandbytes as bnb
import torch
from httpx2 import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PaliGemmaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen2VLImageProcessorPil,
)
from transformers.utils import logging

# Where the parts lie (transformers 5.23): of the Qwen2-VL family first, then of LLaVA, PaliGemma, InternVL, SmolVLM.
# `lm_head` shares the embedding matrix.
VISION_TOWERS = ["model.visual", "model.vision_tower", "model.vision_model"]
PROJECTOR = re.compile(r"model\.(visual\.(merger|deepstack_merger_list\.\d+)|multi_modal_projector|connector)")
COMMIT = re.compile(r"[0-9a-f]{40}")
LAYERS_PATTERN = "layers"  # language_model.layers; Qwen's ViT calls its layers `blocks`
UNQUANTISED = [*VISION_TOWERS, "model.multi_modal_projector", "model.connector", "lm_head"]


class ModelError(ValueError):
    """The model is not what the configuration asks for. The message names the value and the mend."""


@dataclass
class ModelArguments:
    """What is loaded and what of it is trained."""

    model_name_or_path: str = field(
        default="Qwen/Qwen2-VL-2B-Instruct", metadata={"help": "Base model: Hub id or local folder."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the base model on the Hub."})
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
    lora_top_layers: int = field(default=6, metadata={"help": "LoRA goes on this many of the last language layers"})
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


def compute_dtype() -> torch.dtype:
    """bfloat16 on compute capability 8.0 and later, float16 on older GPUs (T4: 7.5), float32 on a CPU.

    `torch.cuda.is_bf16_supported()` is no test for this: it says yes on a T4, by slow emulation.
    """
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def local_device() -> str:
    """This process's device, as `device_map` takes it."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def nf4_config(unquantised: list[str] | None = None) -> BitsAndBytesConfig:
    """NF4 with double quantisation (Dettmers et al. 2023) of all linear layers but those of the modules named; None
    leaves the choice to transformers, which spares the output layer."""
    dtype = compute_dtype()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # FSDP shards parameters of one dtype, so the 4-bit weights are stored in the dtype of the rest.
        bnb_4bit_quant_storage=dtype if os.environ.get("ACCELERATE_USE_FSDP") == "true" else torch.uint8,
        llm_int8_skip_modules=unquantised,
    )


def resolve_revision(name: str, revision: str | None) -> str | None:
    """The commit that a branch, tag or None means on the Hub now; None for a local folder.

    A commit is returned as it is, and without a network (HF_HUB_OFFLINE) so is anything.

    Raises:
        ModelError: there is no such model or revision.
    """
    if Path(name).exists():
        return None
    if COMMIT.fullmatch(revision or ""):
        return revision
    try:
        return HfApi().model_info(name, revision=revision).sha
    except OfflineModeIsEnabled:
        return revision
    except (HTTPError, OSError, HFValidationError) as error:
        raise ModelError(
            f"{name} is no folder, and the Hub does not have it as a model, or not at revision {revision}"
            f" ({str(error).strip().splitlines()[0]})"
        ) from error


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turns what transformers raises about a repository into a ModelError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"{name} cannot be loaded: {str(error).strip().splitlines()[0]} A gated model: accept its licence at"
            f" https://huggingface.co/{name} and log in with `hf auth login`."
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ModelError(
            f"{name} needs code of its own repository, which is not run: read it, then give --trust_remote_code and"
            " --model_revision with the commit that you read"
        ) from error


def load_model(
    name: str,
    revision: str | None = None,
    load_in_4bit: bool = True,
    attn_implementation: str | None = "sdpa",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads an image-text-to-text model on this process's device, its language layers in NF4 unless told otherwise.

    Raises:
        ModelError: there is no such model, or it is gated, or it needs code of its repository without
            `trust_remote_code`; after a 4-bit load, the projector is quantised or a language layer is not.
    """
    with loading(name):
        model = AutoModelForImageTextToText.from_pretrained(
            name,
            revision=revision,
            dtype=compute_dtype(),
            quantization_config=nf4_config(UNQUANTISED) if load_in_4bit else None,
            attn_implementation="sdpa" if attn_implementation == "flex_attention" else attn_implementation,
            device_map={"": local_device()},
            trust_remote_code=trust_remote_code,  # left out, transformers would ask at the terminal
        )
    if attn_implementation == "flex_attention":
        # transformers does not offer it for this family, but its attention takes any implementation with its mask. The
        # vision tower stays with sdpa: it has no mask.
        model.config.get_text_config()._attn_implementation = attn_implementation
    if load_in_4bit:
        check_quantisation(model)
    return model


def load_part(
    kind: type[PreTrainedModel], model_type: str, name: str, revision: str | None, new: str = "", **options
) -> PreTrainedModel:
    """`kind.from_pretrained` for a part of a model that is put together here, from safetensors alone.

    Args:
        model_type: of the configuration that must lie there.
        new: what marks the names of weights that are new, and so in no checkpoint.

    Raises:
        ModelError: there is no such model, it is of another architecture, or it has no weights for what is not new.
    """
    with loading(name):
        found = AutoConfig.from_pretrained(name, revision=revision).model_type
        if found != model_type:
            raise ModelError(f"{name} is a model of type {found!r}, where one of type {model_type!r} is needed")
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it would report unused weights, such as a ViT's pooler, and what is new
        try:
            model, report = kind.from_pretrained(
                name, revision=revision, use_safetensors=True, output_loading_info=True, **options
            )
        finally:
            logging.set_verbosity(verbosity)
    missing = sorted(key for key in report["missing_keys"] if not new or new not in key)
    if missing:
        raise ModelError(f"{name} has no weights for {missing[0]} of a {kind.__name__}")
    return model


def check_quantisation(model: PreTrainedModel) -> None:
    """Every linear layer of the language layers is 4-bit, none of the vision tower is; else ModelError."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantised = {name for name, module in linears.items() if isinstance(module, bnb.nn.Linear4bit)}
    wrong = sorted(name for name in quantised if name.startswith(tuple(UNQUANTISED)))
    if wrong:
        raise ModelError(
            f"{len(wrong)} linear layers of the vision tower are quantised (first: {wrong[0]}), so the projector"
            f" could not be trained. llm_int8_skip_modules={UNQUANTISED} does not match the module"
            f" names of {type(model).__name__}."
        )
    missed = sorted(set(linears) - quantised - {n for n in linears if n.startswith(tuple(UNQUANTISED))})
    if missed or not quantised:
        raise ModelError(
            f"load_in_4bit left {missed[0] if missed else 'every layer'} of {type(model).__name__} in full precision"
        )


def takes_pixel_bounds(processor: ProcessorMixin) -> bool:
    """Whether images are scaled to a number of pixels between two bounds, as in the Qwen-VL family.

    Its image processor calls the bounds `shortest_edge` and `longest_edge`; in others these are lengths of edges.
    """
    return isinstance(processor.image_processor, Qwen2VLImageProcessor | Qwen2VLImageProcessorPil)


def load_processor(
    name: str,
    revision: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
) -> ProcessorMixin:
    """Loads a processor; given pixel bounds replace its own. The bounds are saved with it.

    Raises:
        ModelError: as `load_model`; or bounds were given, and the processor has none.
    """
    with loading(name):
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    if takes_pixel_bounds(processor):
        size = processor.image_processor.size
        processor.image_processor.size = {
            "shortest_edge": min_pixels or size["shortest_edge"],
            "longest_edge": max_pixels or size["longest_edge"],
        }
    elif min_pixels or max_pixels:
        raise ModelError(
            f"min_pixels={min_pixels}, max_pixels={max_pixels}: {type(processor).__name__} of {name} scales images to"
            " a size of its own. Leave both out, or set them to null in the configuration."
        )
    return processor


def takes_prompt(processor: ProcessorMixin) -> bool:
    """Whether a model can be asked something, by its processor: BLIP and its like only caption."""
    return isinstance(processor, PaliGemmaProcessor) or processor.chat_template is not None


def chat_prompt(processor: ProcessorMixin, prompt: str) -> str:
    """The text of one user turn, image first, up to where the assistant begins to write.

    PaliGemma has no turns: its text is the image and a task prefix such as `caption ja`.

    Raises:
        ModelError: another processor has no chat template.
    """
    if isinstance(processor, PaliGemmaProcessor):
        return processor.image_token + prompt
    if not takes_prompt(processor):
        raise ModelError(f"{type(processor).__name__} has no chat template: this model cannot be given a prompt")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def load_adapter(model: PreTrainedModel, adapter: str, revision: str | None = None) -> PeftModel:
    """Puts a trained adapter on a base model, for inference."""
    return PeftModel.from_pretrained(model, adapter, revision=revision).eval()


def lora_config(model: PreTrainedModel, args: ModelArguments) -> LoraConfig:
    """LoRA on the last `lora_top_layers` language layers, and the projector in full.

    Raises:
        ModelError: more layers asked for than there are, or a target module that no layer has.
    """
    depth = model.config.get_text_config().num_hidden_layers
    if not 1 <= args.lora_top_layers <= depth:
        raise ModelError(
            f"lora_top_layers={args.lora_top_layers}: {args.model_name_or_path} has {depth} language layers, so"
            f" choose 1 to {depth}"
        )
    names = [name for name, _ in model.named_modules()]
    layer = f".{LAYERS_PATTERN}.{depth - 1}."
    top = [name for name in names if layer in name and not name.startswith(tuple(VISION_TOWERS))]
    for target in args.lora_target_modules:
        if not any(name.split(".")[-1] == target for name in top):
            leaves = sorted({n.split(".")[-1] for n in top if n.split(".")[-1].endswith("proj")})
            raise ModelError(
                f"lora_target_modules: {target!r} matches nothing in a language layer; there are {', '.join(leaves)}"
            )
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
        layers_to_transform=list(range(depth - args.lora_top_layers, depth)),
        layers_pattern=LAYERS_PATTERN,
        exclude_modules="|".join(rf".*{re.escape(tower)}\..*" for tower in VISION_TOWERS),
        # Without "model.", the name by which vLLM and PEFT's own tools know it too.
        modules_to_save=[n.removeprefix("model.") for n in names if PROJECTOR.fullmatch(n)]
        if args.train_projector
        else None,
        task_type="CAUSAL_LM",
    )


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def count_parameters(model: nn.Module) -> int:
    """Parameters of the base model, adapter left out; a packed 4-bit byte counts as the two numbers it holds."""
    count = 0
    for name, parameter in model.named_parameters():
        if not any(part in name for part in (".lora_", ".modules_to_save.", ".trainable_tokens_delta.")):
            packed = isinstance(parameter, bnb.nn.Params4bit)
            count += parameter.numel() * (2 * parameter.element_size() if packed else 1)
    return count


def free_frozen_parts(model: nn.Module) -> None:
    """Makes what lies below the lowest trained weight free: nothing there is back-propagated or run a second time.

    Under gradient checkpointing, transformers, TRL and PEFT hook every embedding so that its output requires
    gradients, the ViT's `patch_embed` too. Then the whole frozen tower is checkpointed, run again and
    back-propagated, and with a frozen projector all language layers below LoRA's as well. The graph is cut where the
    first trained module begins, whatever was hooked before or will be.
    """
    base = base_model(model)
    tower = next(module for name, module in base.named_modules() if name in VISION_TOWERS)
    if hasattr(tower, "merger"):  # the projector is inside
        tower.blocks[0].register_forward_pre_hook(_detach, with_kwargs=True)
    else:
        tower.forward = torch.no_grad()(tower.forward)
    if not any(p.requires_grad and PROJECTOR.match(name) for name, p in base.named_parameters()):
        layers = next(
            m
            for n, m in base.named_modules()
            if n.endswith(f".{LAYERS_PATTERN}") and not n.startswith(tuple(VISION_TOWERS))
        )
        trained = (layer for layer in layers if any(p.requires_grad for p in layer.parameters()))
        next(trained).register_forward_pre_hook(_detach, with_kwargs=True)


def _detach(module, args, kwargs):
    def cut(values):
        return [value.detach() if isinstance(value, torch.Tensor) else value for value in values]

    return tuple(cut(args)), dict(zip(kwargs, cut(kwargs.values()), strict=True))
