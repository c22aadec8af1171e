"""The raters' page: blinded, complete in itself, and usable by keyboard and by touch in a real browser."""

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from vlmcap.data.images import BadImageError
from vlmcap.human.page import write_export
from vlmcap.human.report import report
from vlmcap.human.study import HumanError, draw, read_answers
from vlmcap.miniature.scenes import scenes
from vlmcap.reporting.html import PHOTO_SIDE, embed

GOOD, POOR = "qwen-adapter7", "llava-zeroshot"


def rows_of(folder: Path, count: int) -> dict[str, dict]:
    """Rows with pictures in a folder: scenes, the last one as large as a photograph, 1280 x 960."""
    folder.mkdir()
    rows = {}
    for number, scene in enumerate(scenes(count, 0, held_out=True)):
        path = folder / f"{number}.jpg"
        last = number == count - 1
        (scene.draw().resize((1280, 960)) if last else scene.draw()).save(path)
        rows[str(number)] = {"image": {"bytes": None, "path": str(path)}, "file_name": path.name, "image_id": number}
    return rows


def export(folder: Path, count: int = 4, seed: int = 0, raters: int = 2, **texts: str) -> tuple[dict, Path]:
    """A key and its folder. The good system writes 良い説明 and a number, the poor one 悪い説明."""
    good = {str(i): texts.get("good", f"良い説明{i}") for i in range(count)}
    poor = {str(i): texts.get("poor", f"悪い説明{i}") for i in range(count)}
    rows = rows_of(folder, count)
    key = draw({GOOD: good, POOR: poor}, list(rows), count, raters, seed)
    key["systems"] = {name: {"predictions": f"{name}.jsonl", "sha256": "ab" * 32} for name in (GOOD, POOR)}
    write_export(key, rows, folder / "human")
    return key, folder / "human"


def page_data(path: Path) -> dict:
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


# --- the files


def test_no_page_tells_who_wrote_what(tmp_path):
    key, folder = export(tmp_path / "a")
    for rater in key["raters"]:
        page = folder / f"rater_{rater}.html"
        text = page.read_text(encoding="utf-8").lower()
        for name in (GOOD, POOR):
            derived = [hash_(name.encode()).hexdigest()[:8] for hash_ in (hashlib.md5, hashlib.sha1, hashlib.sha256)]
            derived += [base64.b64encode(name.encode()).decode().strip("=").lower(), name.encode().hex()]
            assert not [part for part in [name, *re.split("-", name), *derived] if part in text]
        assert "ab" * 32 not in text and "key.json" not in text and str(tmp_path).lower() not in text
        data = page_data(page)
        assert set(data) == {"format", "rater", "fingerprint", "pictures", "items"}
        assert {frozenset(item) for item in data["items"]} == {frozenset({"id", "kind", "image", "captions"})}
    assert all(name in (folder / "key.json").read_text(encoding="utf-8") for name in (GOOD, POOR))


def test_pages_do_not_change_with_the_names_of_the_systems(tmp_path):
    rows = rows_of(tmp_path / "rows", 3)
    for name in ("zzz", "aaa"):
        texts = {name: {i: f"一{i}" for i in rows}, "other": {i: f"二{i}" for i in rows}}
        write_export(draw(texts, list(rows), 3, 1), rows, tmp_path / name)
    assert (tmp_path / "zzz/rater_1.html").read_bytes() == (tmp_path / "aaa/rater_1.html").read_bytes()


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    _, folder = export(tmp_path / "a")
    text = (folder / "rater_1.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1].split("; ")
    assert policy[:3] == ["default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"]
    assert re.fullmatch(r"script-src 'sha256-[\w+/]{43}='", policy[3])
    assert not re.search(r"https?://|url\(|@import|<link rel=.stylesheet", text)
    assert "voluntary" in text and "参加は任意です" in text


def test_pictures_are_bounded_on_the_page_and_whole_beside_it(tmp_path):
    key, folder = export(tmp_path / "a")
    pictures = page_data(folder / "rater_1.html")["pictures"]
    assert len(pictures) == 4 and max(max(p["width"], p["height"]) for p in pictures) == PHOTO_SIDE
    assert sorted(p["drawing"] for p in pictures) == [False, True, True, True]
    written = json.loads((folder / "key.json").read_text(encoding="utf-8"))
    assert list(written["pictures"]) == key["images"]
    for image_id, place in written["pictures"].items():
        assert (folder / place).read_bytes() == (tmp_path / "a" / f"{image_id}.jpg").read_bytes()
        assert Path(place).suffix == ".jpg"
    wide = embed(Image.new("RGB", (6000, 300)))
    assert (wide["width"], wide["height"]) == (640, 32) and wide["uri"].startswith("data:image/jpeg")


def test_the_same_export_is_the_same_files_and_another_does_not_overwrite_it(tmp_path):
    key, first = export(tmp_path / "a")
    _, second = export(tmp_path / "b")
    names = sorted(str(p.relative_to(first)) for p in first.rglob("*") if p.is_file())
    assert names[-3:] == ["key.json", "rater_1.html", "rater_2.html"] and "README.txt" in names
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    rows = {str(i): {"image": {"bytes": None, "path": str(tmp_path / f"a/{i}.jpg")}} for i in range(4)}
    write_export(key, {i: row | {"file_name": f"{i}.jpg"} for i, row in rows.items()}, first)
    with pytest.raises(HumanError, match=f"{first / 'key.json'} is the key of another export"):
        write_export(key | {"seed": 9}, rows, first)


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    rows = rows_of(tmp_path / "rows", 2)
    Path(rows["1"]["image"]["path"]).write_bytes(b"no picture")
    key = draw({"a": {"0": "一", "1": "二"}, "b": {"0": "三", "1": "四"}}, list(rows), 2, 1)
    with pytest.raises(BadImageError, match=r"1\.jpg"):
        write_export(key, rows, tmp_path / "out")
    assert not (tmp_path / "out" / "key.json").exists()


# --- in the browser


def shown(page) -> list[str]:
    """The captions on the screen: two of a preference, one of a rating."""
    return [text for text in page.locator("#item .caption:visible").all_inner_texts()]


def count(page) -> str:
    return page.locator("#count").inner_text()


def answered(page) -> int:
    return int(page.locator("#progress").evaluate("bar => bar.value"))


def press_answer(page) -> None:
    """Answers what is shown by keyboard, for the good system."""
    captions = shown(page)
    if len(captions) == 2:
        page.keyboard.press("ArrowLeft" if "良" in captions[0] else "ArrowRight")
    else:
        for button in "54n" if "良" in captions[0] else "21y":
            page.keyboard.press(button)


def tap_answer(page) -> None:
    """The same with a finger."""
    captions = shown(page)
    if len(captions) == 2:
        page.locator(f"[data-value={'left' if '良' in captions[0] else 'right'}]").tap()
        return
    good = "良" in captions[0]
    for question, value in zip(
        ("fluency", "adequacy", "hallucination"), (5, 4, "no") if good else (2, 1, "yes"), strict=True
    ):
        page.locator(f"button[data-question={question}][data-value='{value}']").tap()


def downloaded(page, path: Path, click) -> Path:
    with page.expect_download() as download:
        click()
    assert download.value.suggested_filename == "answers_1.json"
    download.value.save_as(path)
    return path


def check_winner(key: dict, path: Path) -> None:
    answers, warnings = read_answers([path], key)
    assert warnings == [f"rater 2: no file; {len(key['raters']['2']['order'])} items without this rater's answer"]
    result = report(key, answers, 100)
    pair = result["preferences"]["pairs"][0]
    assert pair["systems"] == [GOOD, POOR] and pair["win_rate"] == 1 and pair["answers"]["wins"] == 4
    ratings = result["ratings"]["systems"]
    assert [ratings[GOOD][q]["mean"] for q in ("fluency", "adequacy", "hallucination")] == [5, 4, 0]
    assert [ratings[POOR][q]["mean"] for q in ("fluency", "adequacy", "hallucination")] == [2, 1, 1]
    assert result["raters"]["1"]["seconds_per_rating"] >= 0


def test_a_whole_page_by_keyboard(page, tmp_path):
    key, folder = export(tmp_path / "a")
    page.goto((folder / "rater_1.html").as_uri())
    page.locator("#start").press("Enter")
    for place in range(1, 13):
        assert count(page) == f"{place} / 12"
        press_answer(page)
        assert answered(page) == place
        page.keyboard.press("Enter")
    assert page.locator("#end").is_visible() and page.locator("#all-answered").is_visible()
    page.keyboard.press("Backspace")
    assert count(page) == "12 / 12" and page.locator("#item").is_visible()
    page.keyboard.press("Enter")
    check_winner(key, downloaded(page, tmp_path / "x.json", lambda: page.locator("#end .download").press("Enter")))
    assert page.locator("#downloaded").is_visible()
    assert [url for url in page.requests_made if not url.startswith(("data:", "blob:"))] == []


def test_keys_correct_skip_and_move(page, tmp_path):
    _, folder = export(tmp_path / "a")
    page.goto((folder / "rater_1.html").as_uri())
    page.keyboard.press("ArrowLeft")  # no item on the screen yet
    assert answered(page) == 0
    page.click("#start")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("=")
    assert page.locator("[aria-pressed=true]:visible").get_attribute("data-value") == "tie"
    page.keyboard.press("Control+ArrowRight")
    assert page.locator("[aria-pressed=true]:visible").get_attribute("data-value") == "tie"
    for _ in range(4):
        page.keyboard.press("Enter")
    assert count(page) == "5 / 12" and answered(page) == 1
    assert page.locator("#skip-label").is_visible()
    page.keyboard.press("3")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("2")  # fluency again
    page.keyboard.press("7")
    page.keyboard.press("y")
    pressed = page.locator("[aria-pressed=true]:visible")
    assert [(b.get_attribute("data-question"), b.get_attribute("data-value")) for b in pressed.all()] == [
        ("fluency", "2"),
        ("hallucination", "yes"),
    ]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("4")
    assert answered(page) == 2 and page.locator("#next-label").is_visible()
    # On a button with the focus Enter chooses first and continues after that.
    page.locator("button[data-question=fluency][data-value='1']").focus()
    page.keyboard.press("Enter")
    assert count(page) == "5 / 12"
    assert page.locator("button[data-question=fluency][data-value='1']").get_attribute("aria-pressed") == "true"
    page.keyboard.press("Enter")
    assert count(page) == "6 / 12"
    for _ in range(9):
        page.keyboard.press("Enter")
    assert page.locator("#some-open").inner_text().startswith("10 ")
    page.click("#to-open")
    assert count(page) == "2 / 12"


def test_a_whole_page_by_touch_on_a_phone(browser, tmp_path):
    key, folder = export(tmp_path / "a", good="良い説明。" + "赤い屋根の家の前に白い犬が座っている" * 3)
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, locale="ja-JP"
    )
    page = context.new_page()
    page.goto((folder / "rater_1.html").as_uri())
    assert page.locator("html").get_attribute("lang") == "ja"
    assert page.locator("#start").inner_text() == "同意して始める"
    page.locator("#start").tap()
    for place in range(1, 13):
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        for button in page.locator("main button:visible, footer button:visible, header button:visible").all():
            box = button.bounding_box()
            assert box["height"] >= 44 and box["width"] >= 44
        assert page.locator("#picture").evaluate("image => image.complete && image.naturalWidth > 0")
        tap_answer(page)
        assert answered(page) == place
        page.locator("#next").tap()
    check_winner(key, downloaded(page, tmp_path / "x.json", page.locator("#end .download").tap))
    context.close()


def test_a_reload_keeps_answers_and_place(page, tmp_path):
    _, folder = export(tmp_path / "a")
    page.goto((folder / "rater_1.html").as_uri())
    page.click("#start")
    for _ in range(5):
        press_answer(page)
        page.keyboard.press("Enter")
    page.reload()
    assert count(page) == "6 / 12" and answered(page) == 5
    page.keyboard.press("Backspace")
    assert page.locator("[aria-pressed=true]:visible").count() == 3
    # The page of another rater, in the same browser, begins empty.
    page.goto((folder / "rater_2.html").as_uri())
    assert count(page) == "0 / 12" and answered(page) == 0


def test_a_saved_file_continues_elsewhere(page, browser, tmp_path):
    key, folder = export(tmp_path / "a")
    address = (folder / "rater_1.html").as_uri()
    page.goto(address)
    page.click("#start")
    for _ in range(7):
        press_answer(page)
        page.keyboard.press("Enter")
    page.click("#saving summary")
    early = downloaded(page, tmp_path / "early.json", lambda: page.click("#saving .download"))

    context = browser.new_context(locale="en-GB")
    other = context.new_page()
    other.goto(address)
    other.click("#saving summary")
    (tmp_path / "wrong.json").write_text('{"format": "vlmcap-human-answers/1", "fingerprint": "0"}')
    other.set_input_files("#load", tmp_path / "wrong.json")
    other.locator("#load-error").wait_for(state="visible")  # the file is read in the background
    other.set_input_files("#load", early)
    other.wait_for_function("state.place === 7")
    assert not other.locator("#load-error").is_visible() and answered(other) == 7
    for _ in range(5):
        press_answer(other)
        other.keyboard.press("Enter")
    late = downloaded(other, tmp_path / "late.json", lambda: other.click("#end .download"))
    check_winner(key, late)
    assert "continues" in read_answers([early, late], key)[1][0]
    context.close()


def test_a_browser_that_keeps_nothing_says_so_and_warns(browser, tmp_path):
    key, folder = export(tmp_path / "a")
    context = browser.new_context(locale="en-GB")
    context.add_init_script(
        "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"
    )
    page, dialogs = context.new_page(), []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.type), dialog.accept()))
    page.goto((folder / "rater_1.html").as_uri())
    page.click("#start")
    page.click("#saving summary")
    assert page.locator("#not-stored").is_visible() and not page.locator("#stored").is_visible()
    page.click("#saving summary")
    page.reload()
    assert dialogs == []  # nothing answered, nothing to lose
    page.click("#start")
    for _ in range(12):
        press_answer(page)
        page.keyboard.press("Enter")
    check_winner(key, downloaded(page, tmp_path / "x.json", lambda: page.click("#end .download")))
    page.reload()
    assert dialogs == []  # downloaded
    page.click("#start")
    press_answer(page)
    page.reload()
    assert dialogs == ["beforeunload"] and answered(page) == 0
    context.close()


def test_leaving_with_everything_answered_and_nothing_downloaded_warns(browser, tmp_path):
    _, folder = export(tmp_path / "a")
    context = browser.new_context()
    page, dialogs = context.new_page(), []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.type), dialog.accept()))
    page.goto((folder / "rater_1.html").as_uri())
    page.click("#start")
    for place in range(12):
        press_answer(page)
        page.keyboard.press("Enter")
        if place == 5:
            page.reload()
    assert dialogs == []  # kept in the browser: pausing asks nothing
    page.reload()
    assert dialogs == ["beforeunload"]
    assert json.loads(page.locator("#text").input_value())["answers"].keys() == {
        item["id"] for item in page_data(folder / "rater_1.html")["items"]
    }
    context.close()


def test_both_languages(page, tmp_path):
    _, folder = export(tmp_path / "a")
    page.goto((folder / "rater_1.html").as_uri())
    assert page.locator("h1:visible").inner_text() == "Judging captions of pictures"
    page.click("#language")
    assert page.locator("html").get_attribute("lang") == "ja"
    assert page.locator("h1:visible").inner_text() == "画像の説明文の評価"
    page.click("#start")
    assert page.locator("#item .caption:visible").first.get_attribute("lang") == "ja"
    assert "Which text" not in page.locator("main").inner_text()
    page.reload()
    assert page.locator("html").get_attribute("lang") == "ja"


def test_hostile_captions_are_text(page, tmp_path):
    nasty = "</script><script>window.taken = 1</script><img src=x onerror='window.taken = 1'>{{ 7*7 }}\u2028&amp;"
    _, folder = export(tmp_path / "a", count=1, good=nasty, poor="<b>bold</b>")
    page.goto((folder / "rater_1.html").as_uri())
    page.click("#start")
    seen = set(page.locator("#preference .caption").all_text_contents())
    page.keyboard.press("Enter")
    seen.add(page.locator("#rating .caption").text_content())
    assert seen == {nasty, "<b>bold</b>"}
    assert page.evaluate("window.taken") is None and page.locator("main b:has-text('bold')").count() == 0
    assert page.locator("img").count() == 1
    assert [url for url in page.requests_made if not url.startswith("data:")] == []


def test_an_empty_caption_is_said_to_be_empty(page, tmp_path):
    _, folder = export(tmp_path / "a", count=1, poor="")
    page.goto((folder / "rater_1.html").as_uri())
    page.click("#start")
    assert sorted(shown(page)) == ["(empty)", "良い説明0"]


@pytest.mark.parametrize(("none", "left"), [("ratings_per_image", "preference"), ("pairs_per_image", "rating")])
def test_a_page_with_one_kind_of_question(page, tmp_path, none, left):
    rows = rows_of(tmp_path / "rows", 2)
    texts = {GOOD: {"0": "良い", "1": "良いね"}, POOR: {"0": "悪い", "1": "悪いね"}}
    write_export(draw(texts, list(rows), 2, 1, **{none: 0}), rows, tmp_path / "out")
    page.goto((tmp_path / "out" / "rater_1.html").as_uri())
    page.click("#start")
    while page.locator("#item").is_visible():
        assert page.locator(f"#{left}").is_visible()
        press_answer(page)
        page.keyboard.press("Enter")
    assert page.locator("#all-answered").is_visible() and page.locator("#preference, #rating").count() == 1
