"""Several weights of one model in one pass: the frozen vision encoder runs once a picture for base and adapter."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

from transformers import PreTrainedModel

from vlmcap.captioning.branches import BranchGenerator, Caption
from vlmcap.models.tower import fed_with_features

BASE, ADAPTER = "base", "adapter"


def weights(model: PreTrainedModel, which: str) -> AbstractContextManager:
    """Within it the model is its base, or as it is."""
    return model.disable_adapter() if which == BASE else nullcontext()


def run_engines(
    model: PreTrainedModel, engines: dict[str, BranchGenerator], pictures: Iterable[dict]
) -> Iterator[tuple[str, Caption]]:
    """(BASE or ADAPTER, caption), each as soon as it is complete, as `BranchGenerator.run` of each would find it.

    A group of pictures goes through the vision encoder, then through projector and language model of each.

    Args:
        model: with its adapter on, if it has one. Between two captions it may be used.
        engines: BASE, ADAPTER or both -> an engine of `model`; with as many rows.
    """
    numbered = enumerate(pictures)
    while True:
        room = min(engine.free if engine.has_room else 0 for engine in engines.values())
        if group := list(islice(numbered, room)):
            if len(engines) == 1:
                _add(model, engines, group)
            else:
                with fed_with_features(model) as encode:
                    features = encode([one for _, one in group])
                    fed = zip(group, features, strict=True)
                    group = [(number, one | {"pixel_values": made}) for (number, one), made in fed]
                    _add(model, engines, group)
        if not any(engine.work for engine in engines.values()):
            return
        found = []
        for which, engine in engines.items():
            if engine.work:
                with weights(model, which):
                    found += [(which, caption) for caption in engine.step()]
        yield from found


def _add(model: PreTrainedModel, engines: dict[str, BranchGenerator], group: list[tuple[int, dict]]) -> None:
    for which, engine in engines.items():
        with weights(model, which):
            engine.add(group)
