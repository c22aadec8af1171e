"""Loading models for QLoRA and for inference: precision, NF4, LoRA on the top layers, projector, frozen tower."""

import os
import re
import sys
from pathlib import Path

import bitsandbytes as bnb
import torch
from accelerate import PartialState
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PaliGemmaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen2VLImageProcessorPil,
)
from transformers.utils import logging

from vlmcap.models.arguments import UNQUANTISED, VISION_TOWERS, ModelArguments
from vlmcap.models.weights import (
    COMMIT,
    PICKLES,
    Adapter,
    ModelError,
    check_adapter,
    expected_tensors,
    find_conversion,
    hub_errors,
    load_weights,
    loading,
    only_pickles,
    read_adapter,
    refuse_adapter,
    skeleton,
)
from vlmcap.places import check_miniature

PROJECTOR = re.compile(r"model\.(visual\.(merger|deepstack_merger_list\.\d+)|multi_modal_projector|connector)")
# Of YAML files: a model's name, and a revision that is not pinned.
LAYERS_PATTERN = "layers"  # language_model.layers; Qwen's ViT calls its layers `blocks`
# Architectures whose masks, positions and image features the project's engines are tested on (tests/invariants).
MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# Attention implementations of transformers that take a mask of our own. FlashAttention knows causal masks alone.
MASKED_ATTENTION = ("sdpa", "eager", "flex_attention")


def compute_dtype() -> torch.dtype:
    """bfloat16 on compute capability 8.0 and later, float16 on older GPUs (T4: 7.5), float32 on a CPU.

    `torch.cuda.is_bf16_supported()` is not a test for this: it says yes on a T4, by slow emulation.
    """
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def local_device() -> str:
    """This process's device, as `device_map` takes it."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def nf4_config(unquantised: list[str] | None = None, dtype: torch.dtype | None = None) -> BitsAndBytesConfig:
    """NF4 with double quantisation (Dettmers et al. 2023) of all linear layers but those of the modules named; None
    leaves the choice to transformers, which spares the output layer. `dtype` is what is computed in."""
    dtype = dtype or compute_dtype()
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

    A commit is returned as it is, and without a network (HF_HUB_OFFLINE) so is anything. When the main branch is
    looked up, the commit is printed: to load the same again, write it into the configuration. So is the commit that
    `find_conversion` finds where the weights are pickles.

    Raises:
        ModelError: there is no such model or revision, its weights are pickles that were not converted, or the Hub
            cannot be reached.
    """
    if Path(name).exists():
        return None
    check_miniature(name)
    if COMMIT.fullmatch(revision or ""):
        return revision
    with hub_errors(name, revision, "a model"):
        try:
            info = HfApi().model_info(name, revision=revision)
        except OfflineModeIsEnabled:
            return revision
        commit, said = info.sha, None if revision else f"no revision is given; the main branch is at {info.sha}"
        files = [file.rfilename for file in info.siblings]
        if any(file.endswith(PICKLES) for file in files) and not any(file.endswith(".safetensors") for file in files):
            commit = find_conversion(name, info.sha)
            if commit is None:
                raise ModelError(only_pickles(name))
            said = f"{info.sha} has pickles alone, which are not loaded; their conversion to safetensors is {commit}"
    if said and PartialState().is_main_process:
        print(f"{name}: {said}", file=sys.stderr, flush=True)
    return commit


def load_model(
    name: str,
    revision: str | None = None,
    load_in_4bit: bool = True,
    attn_implementation: str | None = "sdpa",
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Loads an image-text-to-text model on this process's device, its language layers in NF4 by default.

    Args:
        dtype: of what is not quantised; None for `compute_dtype()`.

    Raises:
        ModelError: as `load_weights`; the model needs code of its repository without `trust_remote_code`; after a
            4-bit load, the projector is quantised or a language layer is not.
    """
    model = load_weights(
        AutoModelForImageTextToText,
        name,
        revision,
        dtype=dtype or compute_dtype(),
        quantization_config=nf4_config(UNQUANTISED, dtype) if load_in_4bit else None,
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
    """`load_weights` for a part of a model that is put together here.

    Args:
        model_type: of the configuration that must be there.
        new: what marks the names of weights that are new, and so in no checkpoint.

    Raises:
        ModelError: as `load_weights`, or the model is of another architecture.
    """
    part_config(model_type, name, revision)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report unused weights, such as a ViT's pooler, and what is new
    try:
        return load_weights(kind, name, revision, new=new, **options)
    finally:
        logging.set_verbosity(verbosity)


def part_config(model_type: str, name: str, revision: str | None) -> PreTrainedConfig:
    """The configuration of a model of this type; ModelError when there is none or it is of another type."""
    with loading(name):
        refuse_adapter(name, revision)
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    if config.model_type != model_type:
        raise ModelError(
            f"{name} is a model of type {config.model_type!r}, where one of type {model_type!r} is needed"
        )
    return config


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
        UserError: it is a miniature that is not here.
    """
    check_miniature(name)
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


def special_tokens(processor: ProcessorMixin) -> set[str]:
    """What ends a turn, stands for an image and so on, and may not be taken for that in somebody's text."""
    known = processor.tokenizer.added_tokens_decoder.values()
    return {token.content for token in known if token.special} | {processor.image_token}


def chat_prompt(processor: ProcessorMixin, prompt: str) -> str:
    """The text of one user turn, image first, up to where the assistant begins to write.

    PaliGemma has no turns: its text is the image and a task prefix such as `caption ja`.

    Raises:
        ModelError: another processor has no chat template, or one that fails; the prompt holds a special token of the
            model, which would end the turn or stand for an image.
    """
    if not takes_prompt(processor):
        raise ModelError(f"{type(processor).__name__} has no chat template: this model cannot be given a prompt")
    held = sorted(token for token in special_tokens(processor) if token in prompt)
    if held:
        raise ModelError(f"the prompt holds {held[0]}, a special token of this model: write it without")
    if isinstance(processor, PaliGemmaProcessor):
        return processor.image_token + prompt
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    try:
        return processor.apply_chat_template(messages, add_generation_prompt=True)
    except Exception as error:  # a template is a program, run in a sandbox: it may fail in any way
        raise ModelError(f"the chat template of {processor.tokenizer.name_or_path} fails: {error}") from error


def load_adapter(
    model: PreTrainedModel, adapter: str, revision: str | None = None, base_revision: str | None = None
) -> PeftModel:
    """Puts a trained adapter on a base model, for inference, once `check_adapter` has found that it fits.

    Args:
        base_revision: the commit that the model was loaded from, where it is known.

    Raises:
        ModelError: as `read_adapter` and `check_adapter`.
    """
    found = read_adapter(adapter, revision)
    check_adapter(found, skeleton(model), model.name_or_path, base_revision)
    return PeftModel.from_pretrained(model, str(found.folder), config=found.config).eval()


def check_adapter_of(found: Adapter, name: str, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """`check_adapter` with a base that is not loaded: its configuration alone is read.

    Raises:
        ModelError: as `check_adapter`, or there is no such base.
    """
    check_adapter(found, skeleton_of(name, revision, trust_remote_code), name, revision)


def skeleton_of(name: str, revision: str | None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a repository or folder without weights (device "meta"); ModelError when there is none."""
    with loading(name):
        refuse_adapter(name, revision)
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(
                config, attn_implementation="eager", trust_remote_code=trust_remote_code
            )


def read_trained_adapter(args: ModelArguments) -> Adapter:
    """The adapter that `args.adapter` names, to be trained further with these settings.

    Raises:
        ModelError: as `read_adapter` and `check_adapter`; or it was trained with other settings, which are named.
    """
    name, revision = args.model_name_or_path, args.model_revision
    found, base = read_adapter(args.adapter, args.adapter_revision), skeleton_of(name, revision)
    depth = base.config.get_text_config().num_hidden_layers
    wanted, stored = lora_config(base, args), found.config
    check_adapter(found, base, name, revision)
    layers = stored.layers_to_transform
    settings = {
        "lora_r": (wanted.r, stored.r),
        "lora_alpha": (wanted.lora_alpha, stored.lora_alpha),
        "lora_top_layers": (args.lora_top_layers, depth if layers is None else len(layers)),
        "lora_target_modules": (sorted(wanted.target_modules), sorted(stored.target_modules)),
        "train_projector": (args.train_projector, bool(stored.modules_to_save)),
    }
    changed = {key: pair for key, pair in settings.items() if pair[0] != pair[1]}
    if changed:
        asked = ", ".join(f"{key} {value}" for key, (value, _) in changed.items())
        words = {key: " ".join(v) if isinstance(v, list) else str(v).lower() for key, (_, v) in changed.items()}
        raise ModelError(
            f"adapter {found.name} was trained with other settings than this run's {asked}: set"
            f" {' '.join(f'--{key} {value}' for key, value in words.items())}"
        )
    odd = [key for key in ("use_rslora", "alpha_pattern", "rank_pattern") if getattr(stored, key)]
    expected = expected_tensors(skeleton_of(name, revision), wanted, found.name)
    if odd or expected != found.tensors:
        raise ModelError(
            f"adapter {found.name} cannot be trained further: {odd[0] if odd else 'the weights that it has'} is not"
            " what this recipe trains (one rank on all the layers from lora_top_layers on, and the projector)"
        )
    return found


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
        revision=args.model_revision,
    )


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_quantised(model: nn.Module) -> bool:
    """Whether layers of a model are in 4 bits."""
    return any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())


def count_parameters(model: nn.Module) -> int:
    """Parameters of the base model, adapter left out; a packed 4-bit byte counts as the two numbers it holds."""
    count = 0
    for name, parameter in model.named_parameters():
        if not any(part in name for part in (".lora_", ".modules_to_save.", ".trainable_tokens_delta.")):
            packed = isinstance(parameter, bnb.nn.Params4bit)
            count += parameter.numel() * (2 * parameter.element_size() if packed else 1)
    return count


def free_frozen_parts(model: nn.Module) -> None:
    """Makes what is below the lowest trained weight free: nothing there is back-propagated or run a second time.

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
