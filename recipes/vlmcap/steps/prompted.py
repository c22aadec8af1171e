"""What the recipes of models with a prompt share: the base, the adapter that training starts from, the evaluation."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import datasets
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from vlmcap.captioning.arguments import GenerationArguments, PromptArguments
from vlmcap.captioning.generate import check_predictions, decoding_record, image_size_record
from vlmcap.captioning.predictions import model_record
from vlmcap.captioning.settings import check_prompts
from vlmcap.data.corpora import SEEN_CORPORA
from vlmcap.data.keys import parse_key
from vlmcap.errors import UserError
from vlmcap.evaluation.audit import write_audit
from vlmcap.evaluation.audit_checks import read_instances
from vlmcap.evaluation.lexicon import Lexicon
from vlmcap.evaluation.scoring import ScoreOptions
from vlmcap.evaluation.tasks import CaptionTask, caption_tasks
from vlmcap.models.arguments import ModelArguments
from vlmcap.models.load import (
    chat_prompt,
    load_adapter,
    load_model,
    load_processor,
    read_trained_adapter,
    resolve_revision,
)
from vlmcap.models.weights import Adapter
from vlmcap.provenance import public_name
from vlmcap.steps.arguments import EvaluationArguments, trained_prompts
from vlmcap.steps.begin import Run
from vlmcap.steps.finish import finish, saw_records
from vlmcap.steps.splits import Splits
from vlmcap.steps.start import score_start
from vlmcap.training.collator import BadImages
from vlmcap.training.features import FeatureCache, cache_features
from vlmcap.training.validation import CaptionValidation


@dataclass(frozen=True)
class PromptedBase:
    """The base of a run, and the adapter that training starts from.

    Attributes:
        args: with the commits of both.
        start: None where training starts from the base alone.
    """

    args: ModelArguments
    processor: ProcessorMixin
    start: Adapter | None

    @property
    def names(self) -> tuple[str, str | None]:
        """Name and commit."""
        return self.args.model_name_or_path, self.args.model_revision

    def load(self) -> PreTrainedModel:
        return load_model(*self.names, self.args.load_in_4bit, self.args.attn_implementation)

    def load_with(self, adapter: str, revision: str | None = None) -> tuple[PeftModel, ProcessorMixin]:
        """The base with an adapter, a Hub id or a folder, on it."""
        return load_adapter(self.load(), adapter, revision), self.processor

    def feature_cache(
        self, folder: str | None, model: PreTrainedModel, bad_images: BadImages
    ) -> Callable[[datasets.Dataset], FeatureCache | None]:
        """rows -> what the frozen vision encoder makes of their pictures, kept in `folder`; None without a folder."""

        def cached(rows: datasets.Dataset) -> FeatureCache | None:
            if not folder:
                return None
            return cache_features(Path(folder), model, self.processor, rows, *self.names, bad_images)

        return cached


def find_base(args: ModelArguments, generation_args: GenerationArguments, prompts: PromptArguments) -> PromptedBase:
    """Base and starting adapter as they will be loaded; no weights are loaded yet.

    Raises:
        ModelError: there is no such model or adapter, the adapter was trained with other settings, or a prompt would
            end the user's turn.
        UserError: captions are constrained to Japanese, and a key is of another language.
    """
    other = next((key for key in prompts.first_wordings if parse_key(key)[0] != "ja"), None)
    if generation_args.japanese_only and other:
        raise UserError(f"--japanese_only constrains the captions of all keys, of {other} too: leave it out")
    name, revision = args.model_name_or_path, args.model_revision
    args = replace(args, model_revision=resolve_revision(name, revision))
    processor = load_processor(name, args.model_revision, args.min_pixels, args.max_pixels)
    for prompt in [*prompts.all_wordings(generation_args.prompt), *prompts.first_wordings.values()]:
        chat_prompt(processor, prompt)
    if not args.adapter:
        return PromptedBase(args, processor, None)
    start = read_trained_adapter(args)
    return PromptedBase(replace(args, adapter_revision=start.revision), processor, start)


def check_start(base: PromptedBase, generation_args: GenerationArguments, prompts: PromptArguments) -> None:
    """Raises SettingsError where the starting adapter was trained with other prompts than this run trains."""
    option = "--prompts" if prompts.prompts else "--prompt"
    asked = (trained_prompts(prompts) or {None: generation_args.prompt}).values()
    check_prompts(base.start.name, base.start.revision, asked, option)


def read_for_audit(
    data_args: EvaluationArguments, generation_args: GenerationArguments, test: datasets.Dataset
) -> Lexicon:
    """Reads now what captions and audit will need hours later; returns the lexicon.

    Raises:
        LexiconError, AuditError, PredictionsError: a file cannot be used.
    """
    decoding_record(generation_args)
    things = Lexicon(data_args.lexicon)
    if data_args.instances:
        read_instances(data_args.instances, things, map(str, test["image_id"]))
    return things


@dataclass(frozen=True)
class Evaluation:
    """How the adapter is evaluated beside its base: on the same images, with the same decoding.

    Attributes:
        tasks: what both are asked for, the main task first.
        data_args: what is audited, and how.
        base_dir: folder of the base's captions.
        base_record: "model", "dataset" and "saw" of their run record.
        trained_saw: "saw" of the trained model's run record.
    """

    base: PromptedBase
    tasks: list[CaptionTask]
    data_args: EvaluationArguments
    base_dir: Path
    base_record: dict
    trained_saw: dict

    def score_start(self, folder: Path, adapter_dir: Path, splits: Splits) -> None:
        """Captions of the adapter that training started from go into `folder`; see `vlmcap.steps.start`."""
        start = self.base.start
        load_start = partial(self.base.load_with, start.name, start.revision)
        options = self._score_options()
        score_start(folder, adapter_dir, start, load_start, self.tasks, splits, self.base_record, self.audit, options)

    def finish(self, run: Run, recipe: str, adapter_dir: Path, splits: Splits) -> None:
        """Captions, scores and audits of base and trained adapter, card, page and push; see `vlmcap.steps.finish`."""
        finish(
            run,
            recipe,
            self.tasks,
            splits,
            base_dir=self.base_dir,
            base_record=self.base_record,
            load_base=lambda: (self.base.load(), self.base.processor),
            trained_dir=adapter_dir,
            trained_saw=self.trained_saw,
            load_trained=partial(self.base.load_with, str(adapter_dir)),
            options=self._score_options(),
            audit=partial(self._audit_both, adapter_dir, splits),
        )

    def _score_options(self) -> ScoreOptions:
        return ScoreOptions(meteor=self.data_args.meteor)

    def _audit_both(self, adapter_dir: Path, splits: Splits) -> None:
        trained_on = splits.train.remove_columns("image")  # scripts/audit_captions.py compares the pictures too
        main, *others = self.tasks

        def audit(task: CaptionTask, **more) -> dict:
            return self.audit(adapter_dir, task, train_rows=trained_on, base=self.audit(self.base_dir, task), **more)

        audit(main, languages={task.key: audit(task) for task in others})

    def audit(self, place: Path, task: CaptionTask, **more) -> dict:
        """Audits the captions of a task; `place` is the folder of the main one, `more` is of `write_audit`."""
        folder, tokenizer = task.folder(place), self.base.processor.tokenizer
        return write_audit(
            folder / "predictions.jsonl",
            task.references,
            folder / "audit.json",
            lexicon=self.data_args.lexicon,
            instances=self.data_args.instances or [],
            count_tokens=lambda caption: len(tokenizer(caption, add_special_tokens=False)["input_ids"]),
            language=parse_key(task.key)[0] if task.key else "ja",
            **more,
        )


def plan_evaluation(
    base: PromptedBase,
    model: PreTrainedModel,
    generation_args: GenerationArguments,
    prompts: PromptArguments,
    data_args: EvaluationArguments,
    splits: Splits,
    output_dir: Path,
    shared_dir: str | None = None,
) -> Evaluation:
    """Asks before training whether the base's captions, of an earlier run perhaps, can be taken or continued.

    Args:
        model: the base.
        shared_dir: where runs share captions of their bases, each in a folder named by a hash of what was asked; None:
            they are in `output_dir/base`.

    Raises:
        PredictionsError: captions that are there were asked for in another way, or are damaged.
    """
    saw, trained_saw = saw_records(dict.fromkeys(SEEN_CORPORA, data_args.base_saw), splits)
    if base.start:
        started = f"Training started from the adapter {public_name(base.start.name)}; what that saw is not listed."
        trained_saw["note"] += f" {started}"
    record = {"model": model_record(model, *base.names), "dataset": splits.test_record, "saw": saw}
    base_dir = output_dir / "base"
    if shared_dir is not None:
        asked = {"prompt": generation_args.prompt, "images": len(splits.test)}
        asked |= decoding_record(generation_args) | image_size_record(base.processor)
        if prompts.prompts:
            asked["prompts"] = prompts.first_wordings
        text = json.dumps(record | asked, sort_keys=True, ensure_ascii=False)
        base_dir = Path(shared_dir) / hashlib.sha256(text.encode()).hexdigest()[:12]
    place = f"{data_args.dataset} ({data_args.test_split})"
    tasks = caption_tasks(prompts, generation_args, data_args.tokenizer, splits.test, place)
    for task in tasks:
        check_predictions(base.processor, task.folder(base_dir) / "predictions.jsonl", task.args, record)
    return Evaluation(base, tasks, data_args, base_dir, record, trained_saw)


def plan_validation(
    base: PromptedBase,
    generation_args: GenerationArguments,
    prompts: PromptArguments,
    data_args: EvaluationArguments,
    rows: datasets.Dataset,
    features: FeatureCache | None,
) -> CaptionValidation:
    """What captions the validation images in training: with keys, each of those that are trained on.

    Args:
        rows: validation rows of `load_splits`.
        features: of the rows.
    """
    place = f"{data_args.dataset} ({data_args.validation_split})"
    tasks = caption_tasks(prompts, generation_args, data_args.tokenizer, rows, place, only_trained=True)
    return CaptionValidation(rows, base.processor, generation_args, data_args.tokenizer, features, tasks)
