"""A small dataset of drawn scenes with captions in several languages and styles."""

from pathlib import Path

import datasets

from vlmcap.miniature.scenes import scenes, write_instances

PROMPTS = {"ja/plain": "普通体で。", "ja/polite": ["丁寧に。", "丁寧体で。"], "en": "Describe this image."}
ALSO = {"vi": "Mô tả ảnh này."}


def write_dataset(folder: Path) -> None:
    """Six pictures a split in `folder`, `folder/instances.json`, what is on them, and `folder/data`, their captions:
    of four kinds, Vietnamese ones of every third picture."""
    drawn = []
    for split, seed in (("train", 1), ("validation", 2), ("test", 3)):
        rows = []
        for number, scene in enumerate(scenes(6, seed=seed, held_out=split != "train")):
            name = f"{split}{number}.png"
            scene.draw().save(folder / name)
            drawn.append((seed * 100 + number, name, scene))
            kinds = [("ja", "plain", scene.japanese()), ("ja", "polite", scene.japanese(polite=True)[:2])]
            kinds += [("en", "", scene.english()[:3]), ("vi", "", scene.vietnamese()[: 2 * (number % 3 == 0)])]
            said = [(language, style, text) for language, style, texts in kinds for text in texts]
            languages, styles, captions = map(list, zip(*said, strict=True))
            rows.append({"image_id": seed * 100 + number, "file_name": name, "captions": captions})
            rows[-1] |= {"languages": languages, "styles": styles}
        (folder / "data/data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / f"data/data/{split}-00000-of-00001.parquet")
    write_instances(folder / "instances.json", drawn)
    (folder / "data/README.md").write_text("---\nlicense: cc0-1.0\n---\n")
