"""Twelve scenes with captions, and six pictures for tiny models."""

import datasets
import pytest

from tests.invariants import tiny
from vlmcap.data.images import load_captions
from vlmcap.miniature.scenes import scenes
from vlmcap.models.load import load_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of twelve scenes and their captions as a published dataset without images."""
    folder = tmp_path_factory.mktemp("scenes")
    rows = []
    for number, scene in enumerate(scenes(12, seed=3, held_out=False)):
        scene.draw().save(folder / f"{number}.png")
        rows.append({"image_id": number, "file_name": f"{number}.png", "captions": scene.japanese()[: 1 + number % 3]})
    datasets.Dataset.from_list(rows).to_parquet(folder / "data/train-00000-of-00001.parquet")
    return folder


@pytest.fixture
def rows(folder):
    return load_captions(str(folder / "data"), "train", image_dir=str(folder))


@pytest.fixture(scope="module")
def processor(miniature_dir):
    return load_processor(str(miniature_dir))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    tiny.write_pictures(folder)
    return tiny.read_pictures(folder)
