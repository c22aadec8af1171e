"""TRL's SFTTrainer for captions: one forward a step, a free vision tower, our own model card."""

import hashlib
import json
import warnings

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, set_seed
from trl import SFTTrainer

from vlmcap.captioning.predictions import weights_hash
from vlmcap.models.load import MODEL_TYPES, ModelError, free_frozen_parts
from vlmcap.models.tower import feed_features
from vlmcap.models.weights import Adapter
from vlmcap.training import shared_prefix
from vlmcap.training.caption_tokens import TurnsEncoder
from vlmcap.training.collator import BadImages, CaptionCollator, caption_examples
from vlmcap.training.features import FeatureCache
from vlmcap.training.resumable import ResumableTrainer
from vlmcap.training.sampler import SimilarSizeSampler, count_image_tokens
from vlmcap.training.shared_prefix import SharedPrefixCollator
from vlmcap.training.trackers import trackers
from vlmcap.training.trainer_arguments import CaptionSFTConfig
from vlmcap.training.validation import CaptionValidation


class CaptionTrainer(ResumableTrainer, SFTTrainer):
    """SFTTrainer for caption rows. It differs from its parent in cost, not in result: the loss is the stock trainer's.

    An image and its prompt are fed once for up to `captions_per_image` captions (`vlmcap.training.shared_prefix`),
    logits are computed once a step and for caption positions alone (the stock trainer computes them everywhere, and
    runs a second forward when labels are smoothed), and nothing is recorded below the projector. An architecture
    that the shared-prefix engine does not know, or `shared_prefix: false`, gets one caption a sequence.

    Args:
        rows: as `load_captions` returns them, or with prompts of their own (`vlmcap.training.prompts`).
        processing_class: processor of the model.
        prompt: the user's text after the image, for captions without prompts of their own.
        bad_images: the list of unreadable pictures.
        features: cached image features of the rows, for the shared-prefix engine. The model's vision encoder is then
            taken out.
        adapter: trained weights to start from, of the same shapes as those of `peft_config`.
        validation: scores the model at every evaluation (`eval_strategy`), as "eval_cider_d" and so on.
    """

    _tag_names = ["trl", "sft", "image-captioning", "japanese"]

    def __init__(
        self,
        model: PreTrainedModel,
        args: CaptionSFTConfig,
        rows: Dataset,
        processing_class: ProcessorMixin,
        prompt: str,
        bad_images: BadImages,
        peft_config: PeftConfig,
        features: FeatureCache | None = None,
        validation: CaptionValidation | None = None,
        adapter: Adapter | None = None,
    ):
        self.rows, self.bad_images, self.validation = rows, bad_images, validation
        one_prompt = "prompts" in rows.column_names and not TurnsEncoder(processing_class).picture_first
        if one_prompt:
            PartialState().print(
                "Note: the chat template writes the picture after the user's text. Captions share a picture only with"
                " those of the same prompt."
            )
        examples = caption_examples(rows, args.captions_per_image, one_prompt)
        self.sizes = [0] * len(examples)
        if args.per_device_train_batch_size > 1 and model.config.model_type in MODEL_TYPES:
            tokens = count_image_tokens(rows, processing_class)
            self.sizes = [tokens[row] for row in examples["row"]]
        self.shared_prefix = args.shared_prefix and shared_prefix.supports(model)
        self.attention = model.config.get_text_config()._attn_implementation
        data = (rows, processing_class, prompt, bad_images)
        if self.shared_prefix:
            collator = SharedPrefixCollator(*data, model, features)
        else:
            collator = CaptionCollator(*data)
        if features is not None:
            feed_features(model)
        set_seed(args.seed)  # of LoRA's weights
        model = get_peft_model(model, peft_config)
        if adapter is not None:
            start_from(model, adapter)
        trained = {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}
        with warnings.catch_warnings():
            # TRL warns that smoothing costs it a second forward and will go; `compute_loss` below needs neither.
            warnings.filterwarnings("ignore", message="`label_smoothing_factor` is deprecated")
            super().__init__(
                model=model,
                args=args,
                data_collator=collator,
                train_dataset=examples,
                eval_dataset=validation and validation.rows,
                processing_class=processing_class,
                callbacks=trackers(args, validation),
            )
        # `compute_loss` takes the number of caption tokens of the whole step. transformers counts them for Qwen2-VL
        # alone of the family; for the others accumulated batches would each weigh the same, however few their tokens.
        self.model_accepts_loss_kwargs = True
        if self.is_fsdp_enabled and validation is not None:
            raise ModelError(
                "captions cannot be generated while FSDP shards the model: set eval_strategy: no,"
                " load_best_model_at_end: false and early_stopping_patience: 0"
            )
        self._keep_float32(trained)
        free_frozen_parts(self.model)
        sizes = hashlib.sha256(json.dumps(self.sizes).encode()).hexdigest()
        self.set_up_run({"image sizes": sizes, "adapter": adapter and weights_hash(adapter.folder)})

    def _keep_float32(self, trained: dict[str, torch.Tensor]) -> None:
        """Puts the trainable weights back as they were before TRL was called, which casts those of a quantised model
        to bfloat16.

        That drops digits of the projector, most AdamW updates of this size are rounded away, and on a T4 the float16
        GradScaler fails on bfloat16 gradients. FSDP needs a single dtype.
        """
        if not self.is_fsdp_enabled:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.data = trained[name]

    def _get_train_sampler(self, train_dataset=None) -> SimilarSizeSampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SimilarSizeSampler(self.sizes, self.args.per_device_train_batch_size, seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs, sources, labels = shared_prefix.caption_logits(model, inputs, self.attention)
        loss = self.caption_loss(outputs.logits.flatten(0, 1), sources, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def validate(self, model: nn.Module) -> dict[str, float]:
        return self.validation(model)


def start_from(model: PeftModel, adapter: Adapter) -> None:
    """Puts the weights of an adapter into a model that is to train them, in float32 as they were trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    set_peft_model_state_dict(model, load_peft_weights(str(adapter.folder), device="cpu"))
