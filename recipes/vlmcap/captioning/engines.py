"""Several weights of one model in one pass: the frozen vision encoder runs once a picture for base and adapter."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

from transformers import PreTrainedModel

from vlmcap.captioning.branches import BranchGenerator, Caption, prefills
from vlmcap.models.tower import fed_with_features

BASE, ADAPTER = "base", "adapter"


def weights(model: PreTrainedModel, which: str) -> AbstractContextManager:
    """Within it the model is its base, or as it is."""
    return model.disable_adapter() if which == BASE else nullcontext()


def run_engines(
    model: PreTrainedModel, engines: dict[str, BranchGenerator], pictures: Iterable[dict]
) -> Iterator[tuple[str, Caption]]:
    """(BASE or ADAPTER, caption), as `BranchGenerator.run` of each would find it, in the order in which they end.

    A group of pictures goes through the vision encoder, then through projector and language model of each.

    Args:
        model: with its adapter on, if it has one. Between two captions it may be used.
        engines: BASE, ADAPTER or both -> an engine of `model`; with as many rows.
    """
    numbered, more = enumerate(pictures), True
    while more or any(engine.work for engine in engines.values()):
        group = list(islice(numbered, min(engine.free for engine in engines.values())))
        more = bool(group)
        if group:
            with fed_with_features(model) if len(engines) > 1 else nullcontext() as encode:
                if encode:
                    parts = prefills(group, model.device)
                    features = [made for few in parts for made in encode([one for _, one in few])]
                    fed = zip(group, features, strict=True)
                    group = [(number, one | {"pixel_values": made}) for (number, one), made in fed]
                for which, engine in engines.items():
                    with weights(model, which):
                        engine.add(group)
        for which, engine in engines.items():
            found = []
            with weights(model, which):  # PEFT takes longer to switch than a small model to write a token
                while engine.work and not (more and engine.has_room):
                    found += engine.step()
            yield from ((which, caption) for caption in found)
