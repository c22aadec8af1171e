"""The files of the feature cache: continued after interruptions, keyed by contents, read by workers and processes."""

import json
import multiprocessing
import os
import pickle
import shutil
from collections import namedtuple
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from torch.utils.data import DataLoader

from tests.invariants import tiny
from vlmcap.data.errors import DataError
from vlmcap.training import features as module
from vlmcap.training.collator import BadImages
from vlmcap.training.features import FeatureCache, cache_features


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    tiny.write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny.build_model("qwen3_vl")


def build(pictures: Path, model, folder: Path | None = None, rows=None, limit=9, **processor_settings) -> FeatureCache:
    """The cache of the pictures in `<pictures>/../cache`, two pictures a forward."""
    processor = tiny.build_processor("qwen3_vl")
    for name, value in processor_settings.items():
        setattr(processor.image_processor, name, value)
    rows = tiny.read_pictures(pictures) if rows is None else rows
    folder = folder or pictures.parent / "cache"
    bad_images = BadImages(pictures.parent / "bad_images.jsonl", limit)
    return cache_features(folder, model, processor, rows, "tiny", None, bad_images)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "BATCH", 2)


@pytest.fixture
def computed(capsys):
    """computed(): how many pictures the caches built since the last call had to compute."""

    def count() -> int:
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Image features: ")]
        return sum(int(line.split(" pictures, ")[1].split(" of them new")[0]) for line in lines)

    return count


def bad_images(pictures: Path) -> dict[int, str]:
    lines = (pictures.parent / "bad_images.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["image_id"]: entry["reason"] for entry in map(json.loads, lines)}


def assert_same_features(ours: FeatureCache, theirs: FeatureCache) -> None:
    assert ours.rows["image_id"] == theirs.rows["image_id"]
    for row in range(len(theirs.rows)):
        for key, value in theirs.batch([row]).items():
            torch.testing.assert_close(ours.batch([row])[key], value, rtol=1e-6, atol=1e-6)


def test_pictures_read_in_another_way_are_computed_again(pictures, model, computed, monkeypatch):
    Image.new("RGBA", (84, 84), (0, 0, 0, 0)).save(pictures / "0.png")
    on_white = build(pictures, model)
    Image.new("RGB", (84, 84), "white").save(pictures / "0.png")
    assert_same_features(build(pictures, model), on_white)
    computed()
    monkeypatch.setattr(module, "READING", "as before")
    build(pictures, model)
    assert computed() == len(tiny.read_pictures(pictures))


def test_batches(pictures, model):
    cache = build(pictures, model)
    batch = cache.batch([3, 0])
    assert batch["image_grid_thw"].tolist() == [[1, 8, 10], [1, 6, 6]]  # 168x112 and 84x84, in patches of 16
    assert batch["image_grid_thw"].dtype == torch.int64
    assert batch["pixel_values"].shape == (80 + 36, 3 * 32) and batch["pixel_values"].dtype == torch.float32
    assert torch.equal(batch["pixel_values"], torch.cat([cache.batch([row])["pixel_values"] for row in (3, 0)]))
    settings = json.loads((cache.path.parent / "settings.json").read_text(encoding="utf-8"))
    assert settings["image_processor"]["size"] == {"shortest_edge": 56 * 56, "longest_edge": 280 * 280}
    assert settings["dtype"] == "torch.float32" and settings["blocks"] == [0, 1, 2] and settings["model"] == "tiny"


@pytest.mark.parametrize(
    ("features_left", "index_left", "new"),
    [
        (1.0, 1.0, 0),
        (0.999, 1.0, 2),  # the last picture's features are half there: its batch of two is computed again
        (0.5, 1.0, 4),
        (1.0, 0.99, 2),  # half a line
        (1.0, 0.5, 4),
        (0.4, 0.9, 4),
        (0.0, 1.0, 6),
        (1.0, 0.0, 6),
    ],
)
def test_continues_an_interrupted_build(pictures, model, tmp_path, computed, features_left, index_left, new):
    whole = build(pictures, model, tmp_path / "uninterrupted")
    files = {name: (whole.path.parent / name).stat().st_size for name in ("features.bin", "index.jsonl")}
    interrupted = build(pictures, model)
    computed()
    os.truncate(interrupted.path, int(files["features.bin"] * features_left))
    os.truncate(interrupted.path.parent / "index.jsonl", int(files["index.jsonl"] * index_left))
    continued = build(pictures, model)
    assert computed() == new
    assert_same_features(continued, whole)
    assert {name: (continued.path.parent / name).stat().st_size for name in files} == files


def test_a_block_of_zeros_ends_the_index(pictures, model, computed):
    """What some file systems leave of a file's end where a machine lost power."""
    path = build(pictures, model).path.parent / "index.jsonl"
    written = path.read_bytes()
    path.write_bytes(written[:-20] + bytes(19) + b"\n")
    computed()
    build(pictures, model)
    assert computed() == 2 and path.read_bytes() == written


def test_features_of_other_settings_are_named_with_their_size(pictures, model, capsys):
    first = build(pictures, model).path.parent
    assert "other models" not in capsys.readouterr().out
    second = build(pictures, model, size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}).path.parent
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"Features of other models or settings are in {first.parent}: {first.name} (0.00 GiB).")
    assert first != second and (first / "features.bin").exists()


def test_changed_picture_is_computed_again_and_a_renamed_one_is_not(pictures, model, computed):
    before = build(pictures, model)
    (pictures / "2.png").rename(pictures / "renamed.png")
    Image.open(pictures / "1.png").rotate(180).save(pictures / "2.png")
    (pictures / "1.png").unlink()
    (pictures / "renamed.png").rename(pictures / "1.png")
    computed()
    after = build(pictures, model)
    assert computed() == 1
    assert torch.equal(after.batch([1])["pixel_values"], before.batch([2])["pixel_values"])
    assert after.batch([2])["image_grid_thw"].tolist() == before.batch([1])["image_grid_thw"].tolist()
    assert not torch.allclose(after.batch([2])["pixel_values"], before.batch([1])["pixel_values"], atol=1e-2)


def test_key_changes_with_all_that_features_depend_on(pictures, model, computed):
    first = build(pictures, model)
    assert build(pictures, model).path == first.path and computed() == 6
    smaller = build(pictures, model, size={"shortest_edge": 56 * 56, "longest_edge": 100 * 100})
    assert smaller.path != first.path and computed() == 6
    assert smaller.shape[0] < first.shape[0]

    other = tiny.build_model("qwen3_vl")
    with torch.no_grad():
        other.model.visual.merger.linear_fc1.weight += 1  # above the features
        other.model.language_model.embed_tokens.weight += 1
    assert build(pictures, other).path == first.path and computed() == 0
    with torch.no_grad():
        other.model.visual.blocks[1].mlp.linear_fc1.bias[0] += 1e-3
    assert build(pictures, other).path != first.path and computed() == 6
    assert build(pictures, tiny.build_model("qwen3_vl").to(torch.bfloat16)).path != first.path


def test_bad_pictures_are_listed_and_left_out(pictures, model, computed):
    """No picture, half a picture (twice), none there, a strip; each in another batch than the next good one."""
    whole = build(pictures, model)
    (pictures / "0.png").write_bytes(b"no picture")
    half = (pictures / "3.png").read_bytes()
    (pictures / "1.png").write_bytes(half[: len(half) // 2])
    (pictures / "4.png").write_bytes(half[: len(half) // 2])
    (pictures / "2.png").unlink()
    Image.new("RGB", (1000, 3)).save(pictures / "5.png")
    cache = build(pictures, model, pictures.parent / "bad")
    assert cache.rows["image_id"] == [3]
    torch.testing.assert_close(cache.batch([0])["pixel_values"], whole.batch([3])["pixel_values"])
    reasons = bad_images(pictures)
    assert sorted(reasons) == [0, 1, 2, 4, 5]
    assert "not an image" in reasons[0] and "truncated" in reasons[1] and "truncated" in reasons[4]
    assert "no such file" in reasons[2] and "aspect ratio" in reasons[5]
    computed()
    assert build(pictures, model, cache.path.parents[1]).rows["image_id"] == [3]
    assert computed() == 1  # the half picture is tried again


def test_too_many_bad_pictures_end_the_build_and_what_was_computed_stays(pictures, model, computed):
    half = (pictures / "5.png").read_bytes()
    for name in ("4.png", "5.png"):
        (pictures / name).write_bytes(half[: len(half) // 2] + name.encode())
    with pytest.raises(DataError, match="2 training pictures cannot be read, more than the 1 that max_bad_images"):
        build(pictures, model, limit=1)
    computed()
    assert build(pictures, model, limit=2).rows["image_id"] == [0, 1, 2, 3] and 2 <= computed() <= 4


def test_size_is_known_before_it_starts(pictures, model, monkeypatch, capsys, tmp_path):
    """To the byte; refused with the fix if there is no room."""
    size = build(pictures, model).path.stat().st_size
    usage = namedtuple("Usage", "total used free")
    for free in (size - 1, size):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: usage(10**12, 0, free))
        if free < size:
            with pytest.raises(DataError) as error:
                build(pictures, model, tmp_path / "small")
            assert str(tmp_path / "small") in str(error.value) and "6 pictures need 0.00 GiB" in str(error.value)
            assert "GiB free. Name a folder on a larger disk, lower max_pixels" in str(error.value)
            assert not [*(tmp_path / "small").rglob("*.bin")][0].stat().st_size
        else:
            assert build(pictures, model, tmp_path / "small").path.stat().st_size == size
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**12, 0, 5 * 2**30))
    monkeypatch.setattr(module, "compute", lambda *args: pytest.fail("no room, and yet it started"))
    monkeypatch.setattr(module, "identify", lambda rows, processor, row: (f"{row:064}", 10**7))
    capsys.readouterr()
    with pytest.raises(DataError, match="the features of 6 pictures need 21.46 GiB, and .* has 5.00 GiB free"):
        build(pictures, model, tmp_path / "large")
    assert "6 pictures, 6 of them new; 21.46 GiB to write to" in capsys.readouterr().out


def test_embedded_pictures(pictures, model):
    """Pictures inside the dataset are the same pictures as in a folder."""
    whole = build(pictures, model)
    rows = [{**row, "image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}} for row in whole.rows]
    rows = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
    cache = build(pictures, model, rows=rows)
    assert cache.path == whole.path and cache.path.stat().st_size == whole.path.stat().st_size
    assert_same_features(cache, whole)


def test_workers_read_it(pictures, model):
    """Forked, with the file mapped before; or started again, with what is pickled."""
    cache = build(pictures, model)
    batches = [[row, 5 - row] for row in range(6)]
    expected = [cache.batch(rows) for rows in batches]
    assert len(pickle.dumps(cache.__getstate__() | {"rows": None})) < 2_000 < cache.path.stat().st_size
    pickled = pickle.loads(pickle.dumps(cache))
    loader = DataLoader(
        batches, batch_size=None, collate_fn=cache.batch, num_workers=2, multiprocessing_context="fork"
    )
    for forked, rows, theirs in zip(loader, batches, expected, strict=True):
        for key, value in theirs.items():
            assert torch.equal(forked[key], value) and torch.equal(pickled.batch(rows)[key], value)


def one_of_two(rank: int, pictures: Path, model) -> None:
    torch.set_num_threads(1)  # OpenMP's threads are not forked
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    store = f"file://{pictures.parent / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    PartialState._reset_state()
    assert PartialState(cpu=True).num_processes == 2
    torch.save(build(pictures, model), pictures.parent / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_share_one_build(pictures, model, tmp_path):
    """Each identifies half the pictures; one computes, the other waits; both read the same. One picture is bad."""
    (pictures / "2.png").write_bytes(b"no picture")
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=one_of_two, args=(rank, pictures, model), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    alone = build(pictures, model, tmp_path / "alone")
    for rank in range(2):
        cache = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        assert_same_features(cache, alone)
        index = (cache.path.parent / "index.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(index) == 5 and cache.path.stat().st_size == alone.path.stat().st_size
    assert list(bad_images(pictures)) == [2]
