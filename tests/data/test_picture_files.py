"""Pictures in a folder, in COCO's folders and in COCO's zip files, also from processes that were forked."""

import multiprocessing
import zipfile
from pathlib import Path

import datasets
import pytest
from PIL import Image

from vlmcap.data.errors import DataError
from vlmcap.data.fetch import COCO_SIZES, recommend_zips
from vlmcap.data.images import BadImageError, load_captions, missing_files, open_image
from vlmcap.data.picture_files import PictureFile, is_picture_file, open_picture, picture_finder

NAMES = ["COCO_val2014_000000391895.jpg", "COCO_train2014_000000000009.jpg", "000000000042.jpg"]


def write(path: Path, colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), (colour, 0, 0)).save(path)


def in_coco_2014(folder: Path) -> None:
    write(folder / "val2014/COCO_val2014_000000391895.jpg", 10)
    write(folder / "train2014/COCO_train2014_000000000009.jpg", 90)
    write(folder / "train2014/COCO_train2014_000000000042.jpg", 200)


def in_coco_2017(folder: Path) -> None:
    """Nearly all of val2014 is in train2017."""
    for number, colour in ((391895, 10), (9, 90), (42, 200)):
        write(folder / f"train2017/{number:012d}.jpg", colour)


def directly(folder: Path) -> None:
    for name, colour in zip(NAMES, (10, 90, 200), strict=True):
        write(folder / name, colour)


def in_zips(folder: Path) -> None:
    """As COCO's own: each holds a folder of its name, and the pictures are not compressed again."""
    in_coco_2014(folder / "unpacked")
    for part in ("train2014", "val2014"):
        with zipfile.ZipFile(folder / f"{part}.zip", "w", zipfile.ZIP_STORED) as archive:
            archive.mkdir(part)
            for path in (folder / "unpacked" / part).iterdir():
                archive.write(path, f"{part}/{path.name}")
    (folder / "unpacked").rename(folder.parent / "away")


def red(row: dict) -> int:
    return round(open_image(row).getpixel((8, 6))[0] / 10) * 10


@pytest.fixture
def dataset(tmp_path) -> str:
    rows = {"image_id": ["a", "b", "c"], "file_name": NAMES, "captions": [["犬"], ["猫"], ["馬"]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "dataset/data/test-00000-of-00001.parquet")
    return str(tmp_path / "dataset")


@pytest.mark.parametrize("place", [directly, in_coco_2014, in_coco_2017, in_zips], ids=lambda place: place.__name__)
def test_pictures_are_found(dataset, tmp_path, place):
    (tmp_path / "images").mkdir()
    place(tmp_path / "images")
    rows = load_captions(dataset, "test", image_dir=str(tmp_path / "images"))
    assert missing_files(rows) == [] and [red(row) for row in rows] == [10, 90, 200]


def test_one_zip_file(dataset, tmp_path):
    (tmp_path / "images").mkdir()
    in_zips(tmp_path / "images")
    rows = load_captions(dataset, "test", image_dir=str(tmp_path / "images/val2014.zip"))
    assert missing_files(rows) == [1, 2] and red(rows[0]) == 10
    with pytest.raises(BadImageError, match="COCO_train2014_000000000009.jpg: no such file"):
        open_image(rows[1])


def read_many(paths: list[str], results) -> None:
    results.put([PictureFile(path).read() for path in paths for _ in range(50)])


def test_forked_processes_read_one_zip_at_a_time_each(tmp_path):
    """The parent has it open too: a shared place in the file would mix up what they read."""
    contents = {f"p/{number}.bin": bytes([number]) * 20_000 for number in range(8)}
    with zipfile.ZipFile(tmp_path / "p.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    find = picture_finder(tmp_path)
    paths = [find(name) for name in contents]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=read_many, args=(paths, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    wanted = [content for content in contents.values() for _ in range(50)]
    assert [PictureFile(path).read() for path in paths for _ in range(50)] == wanted
    assert all(results.get(timeout=60) == wanted for _ in workers)
    for worker in workers:
        worker.join()


def test_damaged_zip_files_are_named(dataset, tmp_path):
    (tmp_path / "images").mkdir()
    in_zips(tmp_path / "images")
    path = tmp_path / "images/val2014.zip"
    data = bytearray(path.read_bytes())
    place = data.index(b"\xff\xd8") + 100
    data[place] ^= 255
    path.write_bytes(data)
    rows = load_captions(dataset, "test", image_dir=str(tmp_path / "images"))
    with pytest.raises(BadImageError, match="COCO_val2014_000000391895.jpg: the zip file is damaged"):
        open_image(rows[0])
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="val2014.zip: not a whole zip file .* Download it again"):
        load_captions(dataset, "test", image_dir=str(tmp_path / "images"))
    with pytest.raises(DataError, match="no.zip is not a folder, nor a zip file"):
        picture_finder(tmp_path / "no.zip")


def test_a_folder_may_be_called_zip(tmp_path):
    write(tmp_path / "old.zip/a.jpg", 10)
    path = picture_finder(tmp_path / "old.zip")("a.jpg")
    assert is_picture_file(path) and open_picture(path).read(2) == b"\xff\xd8"
    assert not is_picture_file(str(tmp_path / "old.zip/b.jpg"))
    with pytest.raises(FileNotFoundError):
        open_picture(str(tmp_path / "old.zip/b.jpg"))


def test_zips_are_recommended_where_most_is_wanted(tmp_path, capsys):
    def rows(part: str, count: int) -> list[dict]:
        names = [f"{number:012d}.jpg" for number in range(count)]
        return [{"file_name": n, "coco_url": f"http://images.cocodataset.org/{part}/{n}"} for n in names]

    most, few = COCO_SIZES["val2017"] // 2 + 1, COCO_SIZES["val2014"] // 2
    recommend_zips(rows("val2017", most) + rows("val2014", few), tmp_path)
    said = capsys.readouterr().err
    assert "2,501 of the 5,000 photographs of val2017" in said and "zips/val2017.zip" in said and "val2014" not in said
    (tmp_path / f"{0:012d}.jpg").touch()  # is there already
    recommend_zips(rows("val2017", most) + [{"file_name": "x.jpg", "coco_url": None}], tmp_path)
    assert capsys.readouterr().err == ""
