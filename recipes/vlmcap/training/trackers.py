"""Trackers (`report_to`): transformers' own, with captions of some validation pictures, and unable to end a run."""

import copy
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path

import numpy as np
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    get_reporting_integration_callbacks,
)
from transformers.trainer_callback import ExportableState

from vlmcap.credentials import redact
from vlmcap.data.images import open_image
from vlmcap.errors import notice
from vlmcap.markdown import markdown_table, prose
from vlmcap.training.validation import CaptionValidation

SHOWN = 8  # validation pictures: the first, the same at every evaluation
SIDE = 160  # of their thumbnails, in pixels
COLUMNS = ["image_id", "picture", "caption", "references"]
KEY = "validation/captions"


class TensorBoard(TensorBoardCallback):
    """Writes to `runs/<run>` in output_dir (or TENSORBOARD_LOGGING_DIR). A run that resumes takes back what was
    written after its checkpoint."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.logging_dir = self.logging_dir or str(Path(args.output_dir) / "runs" / args.run_name)
        resumed = {"purge_step": state.global_step + 1} if state.global_step else {}
        self.tb_writer = self._SummaryWriter(self.logging_dir, **resumed)
        self.pictures_shown = False
        super().on_train_begin(args, state, control, **kwargs)

    def on_evaluate(self, args, state, control, shown, **kwargs):
        shown = shown()
        rows = [[str(image_id), prose(said), prose(" / ".join(texts))] for image_id, _, said, texts in shown]
        self.tb_writer.add_text(
            KEY, markdown_table([["image_id", "caption", "references"], *rows], left=3), state.global_step
        )
        if not self.pictures_shown:
            for image_id, picture, *_ in shown:
                self.tb_writer.add_image(f"validation/{image_id}", np.asarray(picture), 0, dataformats="HWC")
        self.pictures_shown = True
        self.tb_writer.flush()


class Wandb(WandbCallback):
    """Begins the run with an id of ours, so that it can be resumed, and ends it; one that is open already is used."""

    ours = None

    def setup(self, args, state, model, **kwargs):
        import wandb

        if wandb.run is None:
            project = os.getenv("WANDB_PROJECT", args.project)
            self.ours = wandb.init(project=project, id=args.run_name, name=args.run_name, resume="allow")
        super().setup(args, state, model, **kwargs)

    def on_evaluate(self, args, state, control, shown, **kwargs):
        import wandb

        rows = [[i, wandb.Image(picture), said, "\n".join(texts)] for i, picture, said, texts in shown()]
        wandb.log({KEY: wandb.Table(COLUMNS, rows), "train/global_step": state.global_step})

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        if self.ours:
            self.ours.finish()


class Trackio(TrackioCallback):
    """transformers begins the run by its name and continues one that has it."""

    def on_evaluate(self, args, state, control, shown, **kwargs):
        import trackio

        rows = [[i, trackio.Image(picture), said, "\n".join(texts)] for i, picture, said, texts in shown()]
        trackio.log({KEY: trackio.Table(columns=COLUMNS, data=rows), "train/global_step": state.global_step})


OURS = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}


def trackers(args: TrainingArguments, validation: CaptionValidation | None) -> list[TrainerCallback]:
    """The callback for `args.report_to`, in the main process; none in the others, and without trackers.

    `report_to` is empty afterwards, or the Trainer would make callbacks of its own, and these could end the run.
    """
    names, args.report_to = args.report_to, []
    return [Trackers(names, args, validation)] if names and args.process_index == 0 else []


class Trackers(TrainerCallback, ExportableState):
    """Passes every event to transformers' callbacks of some trackers. One that raises is left out from there on, with
    a line that says so.

    A run is called by `run_name`, or by the name of output_dir, with six random digits (hexadecimal) after it.
    Checkpoints keep the name, and a run that resumes from one continues under it.

    Args:
        names: as transformers calls the trackers.
        validation: what captions validation images; None where nothing is evaluated.
    """

    def __init__(self, names: list[str], args: TrainingArguments, validation: CaptionValidation | None):
        name = args.run_name or Path(args.output_dir).resolve().name
        self.run = re.sub(r"[^\w.-]", "-", name) + "-" + secrets.token_hex(3)
        self.validation, self.pictures, self.callbacks = validation, [], {}
        for name in names:
            with self.guarded(name):
                kind = OURS.get(name) or get_reporting_integration_callbacks([name])[0]
                self.callbacks[name] = kind()

    def state(self) -> dict:
        return {"args": {}, "attributes": {"run": self.run}}

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.callbacks.pop(name, None)
            reason = next(iter(str(error).strip().splitlines()), "")
            notice(
                f"report_to: {name} failed and is left out from here on; the training continues"
                f" ({redact(f'{type(error).__name__}: {reason}')})"
            )

    def forward(self, event: str, args, state, control, **kwargs) -> None:
        args = copy.copy(args)
        # A Space that trackio makes shows pictures of others: private, as all that the recipes push.
        args.run_name, args.hub_private_repo = self.run, True
        for name, callback in list(self.callbacks.items()):
            with self.guarded(name):
                getattr(callback, event)(args, state, control, **kwargs)

    def on_train_begin(self, args, state, control, **kwargs):
        self.run = state.stateful_callbacks.get(type(self).__name__, self.state())["attributes"]["run"]
        self.forward("on_train_begin", args, state, control, **kwargs)

    def on_evaluate(self, args, state, control, **kwargs):
        self.forward("on_evaluate", args, state, control, shown=self.shown, **kwargs)

    def shown(self) -> list[tuple]:
        """(image id, thumbnail, caption, references) of the pictures whose captions are shown."""
        if not self.pictures:
            for row in self.validation.rows.select(range(min(SHOWN, len(self.validation.rows)))):
                picture = open_image(row)
                picture.thumbnail((SIDE, SIDE))
                self.pictures.append((row["image_id"], picture, row["captions"]))
        said = self.validation.latest
        return [(image_id, picture, said[str(image_id)], texts) for image_id, picture, texts in self.pictures]


for _event in {name for name in dir(TrainerCallback) if name.startswith("on_")} - vars(Trackers).keys():
    setattr(Trackers, _event, partialmethod(Trackers.forward, _event))
