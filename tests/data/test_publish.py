"""From annotation files to a folder and a Hub repository that load_dataset reads, and every way it must stop."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Image, load_dataset
from huggingface_hub import DatasetCard, HfApi
from PIL import Image as PILImage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlmcap.data import publish as build_module
from vlmcap.data.errors import DataError
from vlmcap.data.publish import PublishArguments, build, publish, push
from vlmcap.upload import PushError

CAPTIONS = ("白い犬が浜辺を走る", "波打ち際に犬が一匹いる。")


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """A tokenizer of the real model's kind (byte-level BPE) that knows the 256 bytes only."""
    alphabet = {char: id for id, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizers") / "bytes"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def image_entry(image_id: int, folder: str) -> dict:
    return {"id": image_id, "file_name": f"COCO_{folder}_{image_id:012d}.jpg"}


@pytest.fixture
def world(tmp_path, tokenizer_dir):
    """Six train2014 and six val2014 images with two captions each; YJ has two of the train2014 images."""
    for part, ids in (("train", range(1, 7)), ("val", range(11, 17))):
        images = [image_entry(image_id, f"{part}2014") for image_id in ids]
        annotations = [
            {"id": 10 * image_id + n, "image_id": image_id, "caption": f"{caption}{image_id}"}
            for image_id in ids
            for n, caption in enumerate(CAPTIONS)
        ]
        (tmp_path / f"stair_{part}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    yj = {
        "info": {"licence": "CC BY-SA 4.0 (made up)"},
        "images": [{"id": 2}, {"id": 3}],
        "annotations": [
            {"id": 1, "image_id": 2, "caption": "犬です。"},
            {"id": 2, "image_id": 3, "caption": "犬です。 "},
            {"id": 3, "image_id": 3, "caption": "犬です。"},
        ],
    }
    (tmp_path / "yj.json").write_text(json.dumps(yj))
    (tmp_path / "val_ids.txt").write_text("12\n11\n")
    (tmp_path / "test_ids.txt").write_text("16\n")

    def arguments(source: str = "stair", **changed) -> PublishArguments:
        files = {"annotations": [str(tmp_path / "yj.json")]}
        if source == "stair":
            files = {
                "annotations": [str(tmp_path / "stair_train.json"), str(tmp_path / "stair_val.json")],
                "yj_annotations": [str(tmp_path / "yj.json")],
                "val_ids": str(tmp_path / "val_ids.txt"),
                "test_ids": str(tmp_path / "test_ids.txt"),
            }
        places = {"tokenizer": str(tokenizer_dir), "output_dir": str(tmp_path / "out")}
        return PublishArguments(**{"source": source, **places, **files, **changed})

    arguments.folder = tmp_path
    return arguments


@pytest.fixture
def photographs(world):
    """Photographs of the images of YJ, as COCO lays them out."""
    folder = world.folder / "coco" / "train2014"
    folder.mkdir(parents=True)
    for image_id in (2, 3):
        picture = PILImage.effect_noise((64, 48), 50 + image_id).convert("RGB")
        picture.save(folder / f"COCO_train2014_{image_id:012d}.jpg", quality=90)
    return folder.parent


def loaded(folder, tmp_path):
    return load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))


def test_stair_folder_is_what_load_dataset_reads(world, tmp_path):
    summary = build(world())
    dataset = loaded(world().output_dir, tmp_path)
    assert {split: dataset[split]["image_id"][:] for split in dataset} == {
        "train": [1, 2, 3, 4, 5, 6, 13, 14, 15],
        "validation": [11, 12],
        "test": [16],
    }
    assert dataset["train"].filter(lambda row: row["in_yj"])["image_id"][:] == [2, 3]
    assert dataset["test"][0] == {
        "image_id": 16,
        "file_name": "COCO_val2014_000000000016.jpg",
        "coco_url": "http://images.cocodataset.org/val2014/COCO_val2014_000000000016.jpg",
        "license": "",
        "captions": ["白い犬が浜辺を走る16", "波打ち際に犬が一匹いる。16"],
        "caption_ids": [160, 161],
        "in_yj": False,
    }
    assert summary["splits"]["train"] == {"images": 9, "captions": 18, "in_yj": 2}
    assert "2 of the 9 training images are also in YJ Captions" in summary["overlap"]
    report = json.loads((tmp_path / "out" / "cleaning_report.json").read_text())
    assert report == {key: value for key, value in summary.items() if key not in ("folder", "seconds")}
    assert report["cleaning"]["captions_in"] == 24


def test_the_same_build_writes_the_same_bytes(world, tmp_path):
    build(world())
    build(world(output_dir=str(tmp_path / "again")))
    for path in sorted(tmp_path.glob("out/**/*.*")):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "out")).read_bytes()


def test_splits_without_lists_are_drawn(world):
    summary = build(world(val_ids=None, test_ids=None, val_size=2, test_size=1))
    assert {split: counts["images"] for split, counts in summary["splits"].items()} == {
        "train": 9,
        "validation": 2,
        "test": 1,
    }
    assert "not Karpathy's own" in summary["split_origin"]


def test_card_metadata_is_that_of_the_hub(world):
    shards = f"data/test-{build(world('yj', pretty_name='Dogs | of Japan'))['fingerprint']}-*.parquet"
    card = DatasetCard.load(world.folder / "out" / "README.md")
    metadata = card.data.to_dict()
    assert metadata["configs"] == [{"config_name": "default", "data_files": [{"split": "test", "path": shards}]}]
    assert (metadata["language"], metadata["license"]) == (["ja"], "cc-by-sa-4.0")  # as the file's info says
    assert (metadata["task_categories"], metadata["size_categories"]) == (["image-to-text"], ["n<1K"])
    assert metadata["pretty_name"] == "Dogs | of Japan"
    assert "| test | 2 | 2 | 2 |" in card.text
    assert "| spacing |" in card.text and "1 changed | `犬です。 ` → `犬です。` |" in card.text
    assert "Not the whole of YJ Captions 26k" in card.text
    assert str(world.folder) not in card.content + (world.folder / "out" / "cleaning_report.json").read_text()


def test_licence_is_the_releases_unless_said_otherwise(world):
    assert build(world())["license"] == "cc-by-4.0"  # STAIR's, not that of the YJ file that flags rows
    assert build(world("yj", license="other", overwrite=True))["license"] == "other"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a|b", "`a\\|b`"), ("犬\u200bと\n猫", "`犬\\u200bと\\u000a猫`"), ("a`b", "``a`b``")],
)
def test_examples_cannot_break_the_cards_table(text, shown):
    assert build_module._visible(text) == shown


def test_photographs_are_embedded_byte_for_byte(world, photographs, tmp_path):
    build(world("yj", images=str(photographs)))
    dataset = loaded(world().output_dir, tmp_path)["test"]
    assert dataset[0]["image"].size == (64, 48)
    assert isinstance(dataset.features["image"], Image)
    for row in dataset.cast_column("image", Image(decode=False)):
        assert row["image"]["bytes"] == (photographs / "train2014" / row["file_name"]).read_bytes()
        assert row["image"]["path"] == row["file_name"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "not under that licence" in card and "| `image` |" in card


def test_photographs_make_several_bounded_shards(world, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "SHARD_BYTES", 1)
    build_id = build(world("yj", images=str(photographs)))["fingerprint"]
    names = sorted(path.name for path in (tmp_path / "out" / "data").iterdir())
    assert names == [f"test-{build_id}-00000-of-00002.parquet", f"test-{build_id}-00001-of-00002.parquet"]
    assert loaded(world().output_dir, tmp_path)["test"]["image_id"][:] == [2, 3]


def test_another_build_in_a_folder_of_the_same_name_loads_as_itself(world, tmp_path):
    """Through one cache, as two runs of `--output_dir outputs/X/dataset` meet in: datasets goes by the last name."""
    first, second = world("yj"), world("yj", output_dir=str(tmp_path / "elsewhere" / "out"))
    build(first)
    assert loaded(first.output_dir, tmp_path)["test"]["captions"][0] == ["犬です。"]
    annotations = json.loads(Path(second.annotations[0]).read_text(encoding="utf-8"))
    annotations["annotations"][0]["caption"] = "猫です。"
    Path(second.annotations[0]).write_text(json.dumps(annotations), encoding="utf-8")
    build(second)
    assert loaded(second.output_dir, tmp_path)["test"]["captions"][0] == ["猫です。"]


def test_row_groups_of_photographs_are_small(world, photographs, monkeypatch):
    monkeypatch.setitem(build_module.ROW_GROUP, "images", 1)
    build(world("yj", images=str(photographs)))
    (shard,) = (world.folder / "out" / "data").iterdir()
    assert pq.ParquetFile(shard).num_row_groups == 2


def test_bad_photographs_stop_the_build_or_are_left_out_and_counted(world, photographs, tmp_path):
    path = photographs / "train2014" / "COCO_train2014_000000000003.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # its header can be read, its pixels cannot
    arguments = {"source": "yj", "images": str(photographs)}
    with pytest.raises(DataError, match=r"1 of 2 photographs .*\n  COCO_train2014_000000000003.jpg: .*truncated"):
        build(world(**arguments))
    assert not (tmp_path / "out").exists()
    summary = build(world(**arguments, skip_bad_images=True))
    assert [(bad["image_id"], bad["file_name"]) for bad in summary["bad_images"]] == [(3, path.name)]
    assert loaded(world().output_dir, tmp_path)["test"]["image_id"][:] == [2]
    assert path.name in (tmp_path / "out" / "README.md").read_text()
    path.unlink()
    with pytest.raises(DataError, match="COCO_train2014_000000000003.jpg: missing"):
        build(world(**arguments, overwrite=True))


def test_a_folder_with_none_of_the_photographs(world, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds none of the 2 photographs: no COCO_train2014_000000000002.jpg"):
        build(world("yj", images=str(tmp_path / "empty")))


def test_yj_images_in_a_held_out_split_stop_the_build(world):
    (world.folder / "test_ids.txt").write_text("16\n3\n")
    with pytest.raises(DataError, match=r"test split that YJ Captions has too \(1\): 3\."):
        build(world())
    lists = {"val_ids": str(world.folder / "val_ids.txt"), "test_ids": str(world.folder / "test_ids.txt")}
    with pytest.raises(DataError, match="YJ Captions has too"):
        build(world("yj", **lists))
    (world.folder / "test_ids.txt").write_text("16\n")
    assert "None of the 2 images is among the 2 validation and 1 test" in build(world("yj", **lists))["overlap"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"val_ids": None}, "--val_ids and --test_ids go together"),
        ({"karpathy": "dataset_coco.json"}, "not both"),
        ({"images": "no/such/folder"}, "no/such/folder: no such folder"),
        ({"tokenizer": "no/such/folder"}, "--tokenizer no/such/folder"),
        ({"source": "yj", "yj_annotations": ["a.json"]}, "it goes with stair and coco and uit_viic and multi"),
        ({"push_to_hub": True}, "needs --repo_id"),
    ],
)
def test_arguments_that_do_not_fit(world, changed, message):
    with pytest.raises(DataError, match=message):
        publish(world(**changed))


def test_nothing_is_overwritten_unasked_and_a_failed_build_leaves_no_trace(world, tmp_path):
    build(world())
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataError, match="out: holds files already.*--overwrite"):
        build(world())
    (tmp_path / "stair_val.json").write_text('{"images": [')
    with pytest.raises(DataError, match="cut off"):
        build(world(overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert loaded(world().output_dir, tmp_path)["test"]["image_id"][:] == [16]
    build_id = build(world("yj", overwrite=True))["fingerprint"]
    assert [path.name for path in (tmp_path / "out" / "data").iterdir()] == [f"test-{build_id}-00000-of-00001.parquet"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == before


def test_a_crash_while_writing_keeps_the_old_dataset(world, photographs, tmp_path, monkeypatch):
    build(world("yj"))
    before = (tmp_path / "out" / "README.md").read_bytes()
    monkeypatch.setattr(build_module, "CARDS", tmp_path)  # no template there: the error comes after the cleaning
    monkeypatch.setitem(build_module.ROW_GROUP, "images", 0)  # and this one in the middle of a parquet file
    for changed in ({}, {"images": str(photographs)}):
        with pytest.raises(Exception, match="yj_captions.md.j2|zero"):
            build(world("yj", overwrite=True, **changed))
    assert (tmp_path / "out" / "README.md").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_a_folder_of_other_things_is_never_replaced(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(DataError, match="not a dataset of ours"):
        build(world(overwrite=True))
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_push_and_load_from_the_hub(world, photographs, hub, tmp_path):
    arguments = {"images": str(photographs), "push_to_hub": True, "repo_id": "user/yj-captions"}
    summary = publish(world("yj", **arguments))
    local = loaded(world().output_dir, tmp_path)["test"]
    remote = load_dataset("user/yj-captions", split="test", cache_dir=str(tmp_path / "fresh"))
    assert remote.features == local.features
    assert remote.cast_column("image", Image(decode=False))[:] == local.cast_column("image", Image(decode=False))[:]
    assert remote[0]["image"].tobytes() == local[0]["image"].tobytes()
    info = HfApi().dataset_info("user/yj-captions")
    assert info.private
    assert (summary["url"], summary["revision"]) == (f"{hub.endpoint}/datasets/user/yj-captions", info.sha)
    assert hub.file("datasets", "user/yj-captions", "README.md") == (tmp_path / "out" / "README.md").read_bytes()


def test_a_second_push_leaves_no_stale_shards(world, hub, tmp_path):
    publish(world(push_to_hub=True, repo_id="user/captions", public=True))
    assert not HfApi().dataset_info("user/captions").private
    again = {"push_to_hub": True, "repo_id": "user/captions", "public": True, "overwrite": True}
    build_id = publish(world("yj", **again))["fingerprint"]
    files = HfApi().list_repo_files("user/captions", repo_type="dataset")
    assert [name for name in files if name.endswith(".parquet")] == [f"data/test-{build_id}-00000-of-00001.parquet"]
    assert load_dataset("user/captions", cache_dir=str(tmp_path / "fresh"))["test"]["image_id"][:] == [2, 3]


def test_a_failed_push_keeps_the_folder_and_says_how_to_continue(world, hub, tmp_path):
    hub.fail(method="POST", path="/commit/", status=403, times=99)
    with pytest.raises(DataError, match=r"(?s)Nothing was lost.*scripts/push_dataset.py .*--repo_id user/captions$"):
        publish(world("yj", push_to_hub=True, repo_id="user/captions"))
    assert loaded(world().output_dir, tmp_path)["test"]["image_id"][:] == [2, 3]
    hub.faults.clear()
    url, _ = push(world().output_dir, "user/captions")
    assert url.endswith("/datasets/user/captions")


def test_a_push_that_would_be_refused_stops_before_the_build(world, hub):
    HfApi().create_repo("user/captions", repo_type="dataset", private=False)
    with pytest.raises(PushError, match="--repo_id user/captions: the repository exists and is public"):
        publish(world("yj", push_to_hub=True, repo_id="user/captions"))
    assert not Path(world().output_dir).exists()


def test_publish_prints_what_was_built(world, capsys):
    publish(world("yj"))
    printed = capsys.readouterr().out
    assert "test                2         2       2" in printed
    assert "exact_duplicate                     1  removed" in printed
    assert "overlap     Not compared" in printed
    assert f'load_dataset("{world.folder}/out")' in printed


def test_script_reads_a_config_and_reports_errors_without_a_traceback(world, run_script):
    config = world.folder / "config.yaml"
    config.write_text(f"source: yj\ntokenizer: {world().tokenizer}\noutput_dir: {world().output_dir}\n")
    done = run_script("publish_datasets.py", "--config", config, "--annotations", "no_such.json", expect=1)
    assert done.stderr.strip().splitlines()[-1] == "error: no_such.json: no such file."
    assert "Traceback" not in done.stderr


def test_real_captions_and_photographs(data_dir, qwen2vl_dir, tmp_path):
    folder = data_dir / "coco_yj_images"
    summary = build(
        PublishArguments(
            source="yj",
            annotations=[str(folder / "captions.json")],
            images=str(folder),
            tokenizer=str(qwen2vl_dir),
            output_dir=str(tmp_path / "out"),
        )
    )
    dataset = loaded(tmp_path / "out", tmp_path)["test"]
    assert (len(dataset), sum(map(len, dataset["captions"]))) == (21, 44)
    assert min(min(row["image"].size) for row in dataset) >= 200
    assert summary["cleaning"]["tokenizer"] == "qwen2_vl_2b"
