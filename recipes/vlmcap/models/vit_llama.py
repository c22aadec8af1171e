"""A frozen ViT and a Llama: what the ViT makes of a picture, projected, is a soft prefix in front of the caption.

    picture -> ViT (frozen) -> image_projection (trained) -> [prefix, <|begin_of_text|>, t1, t2, ...] -> Llama (LoRA)

The prefix is one pooled vector or one vector a patch (`image_prefix`). An adapter is LoRA and the projection;
`config.json` beside it says which ViT and which Llama it belongs to, so that `load_vit_llama` needs nothing else.
"""

import os

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    TrOCRProcessor,
    ViTModel,
)
from transformers.modeling_outputs import CausalLMOutput

from vlmcap.models.arguments import VitLlamaArguments
from vlmcap.models.load import (
    check_quantisation,
    compute_dtype,
    load_part,
    local_device,
    nf4_config,
    part_config,
    resolve_revision,
)
from vlmcap.models.weights import ModelError, check_adapter, loading, read_adapter

# Llama 3.1 and 3.2 reserve it for padding (id 128004) and were never trained on it, but name no pad token.
PAD_TOKEN = "<|finetune_right_pad_id|>"
# Not just `projection`: PEFT matches the ends of names, and the ViT's patch embedding has a `projection` as well.
PROJECTION = "image_projection"


class VitLlamaConfig(PreTrainedConfig):
    """Which parts a VitLlama is made of and how: all that is needed to build it again under its adapter.

    Revisions are the commits that were loaded (null for local folders); `prefix_scale` see `VitLlama.init_projection`.
    """

    model_type = "vit_llama"

    encoder_name_or_path: str | None = None
    encoder_revision: str | None = None
    decoder_name_or_path: str | None = None
    decoder_revision: str | None = None
    image_prefix: str = "pooled"
    load_in_4bit: bool = False
    prefix_scale: float = 1.0


class VitLlama(PreTrainedModel):
    """A frozen ViT, a trained linear projection, and a Llama that reads what is projected in front of the caption.

    `pooled` is the [CLS] vector after the ViT's last LayerNorm. It is not HF's `pooler_output`: many ViT checkpoints
    have no pooler, and its tanh would only come before the projection, which is trained anyway. `patches` are the
    vectors of all other positions.

    Args:
        config: image_prefix and prefix_scale are read.
        encoder: always in eval mode, never back-propagated.
        decoder: frozen too; LoRA is put on it by `add_lora`.
    """

    config_class = VitLlamaConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: VitLlamaConfig, encoder: ViTModel, decoder: LlamaForCausalLM):
        super().__init__(config)
        self.encoder = encoder.requires_grad_(False)
        self.decoder = decoder.requires_grad_(False)
        sizes = encoder.config.hidden_size, decoder.config.hidden_size
        self.image_projection = nn.Linear(*sizes, device=decoder.device)  # float32, whatever the frozen parts are
        self.is_loaded_in_4bit = config.load_in_4bit  # where PEFT looks for it
        self.eval()

    def init_projection(self, seed: int, size: float = 1.0) -> None:
        """Draws the projection so that the prefix is `size` times as large as an embedding (root mean square).

        Layers normalise what they read, but not the sum that they add to. A prefix as large as an embedding is what
        the first layer was trained on. A larger one stays larger than what the layers add to it, so that upper layers
        still see the picture; at some size it hides what they add. The factor is kept apart from the weights, in
        `config.prefix_scale`, since AdamW moves a weight by about the learning rate however small it is. The ViT ends
        in a LayerNorm: its features are about as large for noise, which is measured here, as for pictures.
        """
        generator = torch.Generator().manual_seed(seed)
        config = self.encoder.config
        noise = torch.randn(4, config.num_channels, config.image_size, config.image_size, generator=generator)
        weight = torch.randn(self.image_projection.weight.shape, generator=generator)
        weight /= _root_mean_square(self.image_features(noise.to(self.device))) * weight.shape[1] ** 0.5
        with torch.no_grad():
            self.image_projection.weight.copy_(weight)
            self.image_projection.bias.zero_()
        self.config.prefix_scale = size * _root_mean_square(self.get_input_embeddings().weight)

    def train(self, mode: bool = True) -> "VitLlama":
        """As of any module, but the ViT stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    @torch.no_grad()
    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, P, ViT width) in float32, P = 1 (pooled) or the number of patches."""
        states = self.encoder(pixel_values).last_hidden_state.float()
        return states[:, :1] if self.config.image_prefix == "pooled" else states[:, 1:]

    def with_prefix(self, pixel_values: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) and (B, L, Llama width) -> (B, P + L, Llama width), pictures first."""
        prefix = self.image_projection(self.image_features(pixel_values)) * self.config.prefix_scale
        return torch.cat([prefix.to(embeddings.dtype), embeddings], dim=1)

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> CausalLMOutput:
        """Logits of the token after each token of the captions.

        Args:
            pixel_values: (B, 3, H, W).
            input_ids: (B, L), <|begin_of_text|> and the caption, padded on the right.
            attention_mask: (B, L), 0 on padding.

        Returns:
            `logits` (B, L, V): logits[:, i] predicts what follows input_ids[:, i]. None for the prefix.
        """
        embeddings = self.with_prefix(pixel_values, self.get_input_embeddings()(input_ids))
        if attention_mask is not None:
            prefix = embeddings.shape[1] - input_ids.shape[1]
            attention_mask = nn.functional.pad(attention_mask, (prefix, 0), value=1)
        output = self.decoder(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            use_cache=False,
            logits_to_keep=input_ids.shape[1],
        )
        return CausalLMOutput(logits=output.logits)

    @torch.no_grad()
    def generate(
        self, pixel_values: torch.Tensor, generation_config: GenerationConfig | None = None, **kwargs
    ) -> torch.Tensor:
        """(B, 3, H, W) -> (B, N) new token ids alone, started from the prefix and <|begin_of_text|>."""
        ids = torch.full((len(pixel_values), 1), self.generation_config.bos_token_id, device=self.device)
        embeddings = self.with_prefix(pixel_values, self.get_input_embeddings()(ids))
        return self.decoder.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long, device=self.device),
            generation_config=generation_config,
            **kwargs,
        )


class VitLlamaAdapter(PeftModel):
    """A PeftModel that saves the VitLlama's config.json beside the adapter, and nothing of the frozen parts."""

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        super().save_pretrained(save_directory, **{**kwargs, "save_embedding_layers": False})
        if kwargs.get("is_main_process", True):
            self.get_base_model().config.save_pretrained(save_directory)


def build_vit_llama(args: VitLlamaArguments, seed: int) -> tuple[VitLlama, ProcessorMixin]:
    """The two parts from the Hub or from folders, with a projection drawn by `seed`, and their processor.

    Raises:
        ModelError: a part is missing, gated, or of another architecture; the tokenizer has no token to begin, end or
            pad with; after a 4-bit load, a layer of the Llama is not quantised.
    """
    with loading(args.encoder_name_or_path):
        image_processor = AutoImageProcessor.from_pretrained(
            args.encoder_name_or_path, revision=args.encoder_revision, trust_remote_code=False
        )
    with loading(args.decoder_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(
            args.decoder_name_or_path, revision=args.decoder_revision, trust_remote_code=False
        )
    _complete_tokenizer(tokenizer, args.decoder_name_or_path)
    processor = TrOCRProcessor(image_processor, tokenizer)  # transformers' pair of any image processor and tokenizer
    config = VitLlamaConfig(
        encoder_name_or_path=args.encoder_name_or_path,
        encoder_revision=resolve_revision(args.encoder_name_or_path, args.encoder_revision),
        decoder_name_or_path=args.decoder_name_or_path,
        decoder_revision=resolve_revision(args.decoder_name_or_path, args.decoder_revision),
        image_prefix=args.image_prefix,
        load_in_4bit=args.load_in_4bit,
    )
    model = _load_parts(config, processor)
    model.init_projection(seed, args.prefix_size)
    return model, processor


def add_lora(model: VitLlama, args: VitLlamaArguments) -> VitLlamaAdapter:
    """LoRA in float32 on the named linear layers of the Llama; the projection is trained in full and saved with it.

    Raises:
        ModelError: a target module that no layer of the Llama has.
    """
    layers = model.decoder.model.layers
    names = {name.split(".")[-1] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    for target in args.lora_target_modules:
        if target not in names:
            raise ModelError(
                f"lora_target_modules: {target!r} matches nothing in a layer of {args.decoder_name_or_path}; there are"
                f" {', '.join(sorted(names))}"
            )
    peft_config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
        exclude_modules=r"encoder\..*",  # the ViT's attention has a q_proj and a v_proj as well
        modules_to_save=[PROJECTION],
        base_model_name_or_path=args.decoder_name_or_path,
        revision=model.config.decoder_revision,
    )
    adapted = VitLlamaAdapter(model, peft_config)
    stray = [n for n, p in model.named_parameters() if p.requires_grad and n.startswith("encoder.")]
    if stray:
        raise ModelError(f"LoRA or a trained copy is in the ViT, which must stay frozen: {stray[0]}")
    return adapted


def load_vit_llama(
    adapter: str, revision: str | None = None, dtype: torch.dtype | None = None
) -> tuple[VitLlamaAdapter, ProcessorMixin]:
    """A trained model and its processor, for inference, from an adapter's folder or Hub id alone.

    `dtype` is `compute_dtype()` where it is left out.

    Raises:
        ModelError: as `build_vit_llama`, `read_adapter` and `check_adapter`, or `adapter` is none of a VitLlama.
    """
    found = read_adapter(adapter, revision)
    with loading(adapter):
        config = VitLlamaConfig.from_pretrained(adapter, revision=found.revision)
        processor = AutoProcessor.from_pretrained(adapter, revision=found.revision, trust_remote_code=False)
    encoder = (config.encoder_name_or_path, config.encoder_revision)
    decoder = (config.decoder_name_or_path, config.decoder_revision)
    if not (isinstance(encoder[0], str) and isinstance(decoder[0], str)):
        raise ModelError(f"{adapter} is not an adapter of a ViT and a Llama: its config.json does not name both")
    if config.image_prefix not in ("pooled", "patches"):
        raise ModelError(f"{adapter}: image_prefix in its config.json is {config.image_prefix!r:.80}")
    with torch.device("meta"):
        vit = ViTModel(part_config("vit", *encoder), add_pooling_layer=False)
        skeleton = VitLlama(config, vit, LlamaForCausalLM(part_config("llama", *decoder)))
    check_adapter(found, skeleton, *decoder)
    model = _load_parts(config, processor, dtype)
    return VitLlamaAdapter.from_pretrained(model, str(found.folder), config=found.config).eval(), processor


def _load_parts(config: VitLlamaConfig, processor: ProcessorMixin, dtype: torch.dtype | None = None) -> VitLlama:
    """The ViT and the Llama that a configuration names, on this process's device, with an undrawn projection."""
    shared = {"dtype": dtype or compute_dtype(), "device_map": {"": local_device()}}
    encoder = load_part(
        ViTModel, "vit", config.encoder_name_or_path, config.encoder_revision, add_pooling_layer=False, **shared
    )
    decoder = load_part(
        LlamaForCausalLM,
        "llama",
        config.decoder_name_or_path,
        config.decoder_revision,
        quantization_config=nf4_config(dtype=dtype) if config.load_in_4bit else None,
        **shared,
    )
    if config.load_in_4bit:
        check_quantisation(decoder)
    model = VitLlama(config, encoder, decoder)
    ids = {role: getattr(processor.tokenizer, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # Instead of Llama 3.2's own, which samples with a temperature.
    model.generation_config = decoder.generation_config = GenerationConfig(**ids)
    return model


def _complete_tokenizer(tokenizer, name: str) -> None:
    """Pads on the right with a token that no caption holds; there must be tokens to begin and end with."""
    tokenizer.padding_side = "right"
    tokenizer.clean_up_tokenization_spaces = False  # " ," and " 's" of a title are its own
    if PAD_TOKEN in tokenizer.get_vocab():
        tokenizer.pad_token = PAD_TOKEN
    for role in ("bos_token", "eos_token", "pad_token"):
        if getattr(tokenizer, role) is None:
            raise ModelError(f"the tokenizer of {name} has no {role}: give it one, or choose a Llama 3.2")


def _root_mean_square(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float32)) / values.numel() ** 0.5
