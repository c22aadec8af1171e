"""The comparison page in a real browser: order, filters, keys, state in the address, and captions that attack it."""

import json
import shutil

import datasets
import pytest
from PIL import Image

from tests.reporting.conftest import HOSTILE
from vlmcap.evaluation.caption_files import read_predictions, read_references
from vlmcap.reporting.compare import write_comparison
from vlmcap.reporting.gallery import disagreement, select_images, similarity
from vlmcap.reporting.runs import read_runs

NAMES = ("good", "twin", "weak", "wild")


@pytest.fixture(scope="module")
def references(scored_runs):
    return scored_runs["good"].parent / "references.jsonl"


@pytest.fixture(scope="module")
def url(scored_runs, references, tmp_path_factory):
    runs = read_runs([scored_runs[name] for name in NAMES])
    return write_comparison(runs, tmp_path_factory.mktemp("page"), references=references)["html"].as_uri()


@pytest.fixture(scope="module")
def scores(scored_runs):
    """Image id -> CIDEr-D of the four systems."""
    columns = [json.loads((scored_runs[name] / "metrics.json").read_text())["per_image"] for name in NAMES]
    by_run = [dict(zip(c["image_id"], c["cider_d"], strict=True)) for c in columns]
    return {image: [run[image] for run in by_run] for image in by_run[0]}


@pytest.fixture(scope="module")
def captions(scored_runs):
    return [read_predictions(scored_runs[name] / "predictions.jsonl") for name in NAMES]


def shown(page) -> list[str]:
    return page.locator(".card:visible").evaluate_all("cards => cards.map(card => card.dataset.id)")


def focused(page) -> str | None:
    return page.evaluate("document.activeElement.dataset.id")


def test_similarity_and_disagreement_by_hand():
    assert similarity("赤い犬", "赤い犬") == 1 and similarity("", "") == 1
    assert similarity("犬", "猫") == 0
    # Bigrams ^a ab b$ and ^a ac c$: one of three is shared.
    assert similarity("ab", "ac") == pytest.approx(1 / 3)
    assert similarity("Ａ Ｂ", "AB") == 1
    assert disagreement(["ab", "ac", "ab"]) == pytest.approx(1 - (1 / 3 + 1 + 1 / 3) / 3)
    assert disagreement(["ab"]) == disagreement([]) == 0


def test_a_selection_holds_the_most_disputed_images_and_a_seeded_draw():
    apart = {str(number): number / 100 for number in range(100)}
    everything, sentence = select_images(apart, 100, seed=0)
    assert everything == list(apart) and sentence == "All 100 images are shown."
    chosen, sentence = select_images(apart, 20, seed=0)
    assert len(set(chosen)) == 20 and {str(number) for number in range(90, 100)} <= set(chosen)
    assert chosen == sorted(chosen, key=int) == select_images(apart, 20, seed=0)[0] != select_images(apart, 20, 1)[0]
    assert sentence.startswith(
        "20 of 100 images are shown: the 10 with the greatest disagreement and 10 drawn at random"
    )


def test_the_page_shows_what_the_documents_say(page, url, captions, scores, references):
    page.goto(url)
    card = page.locator('.card[data-id="3"]')
    assert card.locator(".caption").all_text_contents() == [run["3"] for run in captions]
    assert card.locator(".score").all_text_contents() == [f"{score:.2f}" for score in scores["3"]]
    assert card.locator(".references li").all_text_contents() == read_references(references)["3"]
    assert card.locator(".caption").first.get_attribute("lang") == "ja"
    assert page.locator(".scores tbody tr").count() == page.locator(".systems tbody tr").count() == 4
    assert page.locator("figure svg").count() == 2, "scores and curves; all systems are of one size"
    assert page.locator('.card[data-id="8"] .captions .empty').text_content() == "(empty)"
    assert page.evaluate("""() => { const ids = [...document.querySelectorAll("[id]")].map(e => e.id);
        return ids.length === new Set(ids).size }""")
    assert page.requests_made == []


def test_images_are_sorted_by_disagreement_worst_score_and_id(page, url, captions, scores):
    page.goto(url)
    apart = {image: disagreement([run[image] for run in captions]) for image in scores}
    assert [apart[image] for image in shown(page)] == sorted(apart.values(), reverse=True)
    page.select_option("#sort", "worst")
    means = [sum(scores[image]) / 4 for image in shown(page)]
    assert means == pytest.approx(sorted(means)) and len(means) == 40
    page.select_option("#system", "weak")
    worst = [scores[image][2] for image in shown(page)]
    assert worst == sorted(worst) and worst[0] < worst[-1]
    page.select_option("#sort", "id")
    assert shown(page) == [str(number) for number in range(1, 41)]


def test_images_are_filtered_by_text_score_and_flag(page, url, captions, scores, references):
    page.goto(f"{url}#sort=id")
    words = ("犬", "公園")
    page.fill("#text", "犬　公園")  # all words; any white space parts them
    truth = read_references(references)
    texts = {image: "\n".join([*truth[image], *(run[image] for run in captions)]) for image in scores}
    expected = [image for image, text in texts.items() if all(word in text for word in words)]
    assert shown(page) == expected and 0 < len(expected) < 40
    assert page.inner_text("#status") == f"{len(expected)} of 40 images, by image id"

    page.fill("#text", "")
    page.select_option("#system", "good")
    page.fill("#min", "0.5")
    page.fill("#max", "3")
    expected = [image for image, (good, *_) in scores.items() if 0.5 <= good <= 3]
    assert shown(page) == expected and 0 < len(expected) < 40

    page.fill("#min", "")
    page.fill("#max", "")
    page.check("#flagged")
    assert shown(page) == []
    assert page.inner_text("#status") == "No image fits all of these filters."
    page.select_option("#system", "wild")
    assert shown(page) == ["7", "8"]
    assert page.locator('.card[data-id="8"] .flag').all_inner_texts() == ["empty", "<b>short"]


def test_the_keyboard_is_enough(page, url):
    page.goto(url)
    order = shown(page)
    page.keyboard.press("j")
    assert focused(page) == order[0]
    page.keyboard.press("j")
    page.keyboard.press("ArrowRight")
    assert focused(page) == order[2]
    page.keyboard.press("k")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("k")  # stays at the first
    assert focused(page) == order[0]
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"

    page.keyboard.press("s")
    assert page.input_value("#sort") == "worst" and focused(page) == shown(page)[0]
    page.keyboard.press("s")
    page.keyboard.press("s")
    assert page.input_value("#sort") == "disagreement" and shown(page) == order

    page.keyboard.press("/")
    page.keyboard.type("js?")  # letters are text here
    assert page.input_value("#text") == "js?" and not page.locator("#help").is_visible()
    page.fill("#text", "")
    page.keyboard.press("Escape")
    assert focused(page) == order[0]

    page.keyboard.press("f")
    assert shown(page) and set(shown(page)) == {"7", "8"}
    page.keyboard.press("f")

    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.keyboard.press("?")
    page.uncheck("#keys")
    page.click("#close-help")
    page.keyboard.press("s")
    assert page.input_value("#sort") == "disagreement"


def test_tab_leads_through_the_page_and_out_of_it(page, url):
    """Every control is reached, the list is one stop, and focus leaves the document at its end."""
    page.goto(url)
    stops = []
    for _ in range(30):
        page.keyboard.press("Tab")
        stops.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        if stops[-1].startswith("card"):
            break
    assert stops == [
        *("scroll", "scroll", "", "text", "sort", "system", "min", "max", "flagged", "open-help"),
        "card bare",
    ]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement === document.body")


def test_the_address_keeps_the_state(page, url):
    page.goto(url)
    page.select_option("#system", "weak")
    page.select_option("#sort", "id")
    page.fill("#text", "犬")
    page.fill("#max", "4.5")
    page.keyboard.press("Escape")
    page.locator("#text").press("Escape")
    page.keyboard.press("j")
    image, order, address = focused(page), shown(page), page.url
    assert f"image={image}" in address and "sort=id" in address

    page.goto("about:blank")
    page.goto(address)
    assert shown(page) == order and focused(page) == image and page.url == address
    assert [page.input_value(f"#{name}") for name in ("system", "text", "max")] == ["weak", "犬", "4.5"]
    page.evaluate("location.hash = 'sort=worst'")
    page.wait_for_function("document.getElementById('sort').value === 'worst'")
    assert len(shown(page)) == 40 and page.input_value("#system") == ""
    page.goto(f"{url}#sort=nonsense&system=nobody&image=999&min=x")
    page.reload()
    assert len(shown(page)) == 40 and page.input_value("#sort") == "disagreement"


def test_hostile_captions_are_text(page, url):
    page.goto(f"{url}#sort=id")
    caption = page.locator('.card[data-id="7"] .caption').last
    assert caption.text_content() == HOSTILE
    assert caption.locator("bdi").count() == 1
    assert page.locator(".caption img, .caption script, body > img").count() == 0
    assert page.locator(".card").count() == 40
    page.fill("#text", "<img src=x onerror")
    assert shown(page) == ["7"]
    # An alert or a request would have come by the next frame.
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
    assert page.requests_made == []


def test_hostile_names_and_references_are_text(page, scored_runs, tmp_path):
    name = "</option></select><script>alert(3)</script>\"'"
    lines = [{"image_id": image, "captions": [HOSTILE]} for image in range(1, 41)]
    (tmp_path / "references.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = read_runs([f"{name}={scored_runs['good']}", f"<svg onload=alert(4)>={scored_runs['weak']}"])
    html = write_comparison(runs, tmp_path / "out", references=tmp_path / "references.jsonl")["html"]
    page.goto(html.as_uri())
    page.select_option("#system", index=1)
    assert page.locator("#system option").nth(1).inner_text() == name
    page.reload()
    assert page.input_value("#system") == name
    assert page.locator(".references bdi").first.text_content() == HOSTILE
    assert page.requests_made == []


def test_pictures_come_from_a_folder_and_one_may_be_missing(page, scored_runs, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "images").mkdir()
    rows = [{"image_id": n, "file_name": f"{n}.jpg", "captions": [f"犬が{n}匹"]} for n in range(1, 41)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data" / "test.parquet")
    for n in range(1, 40):
        Image.new("RGB", (1200, 300 + n), (n, 100, 100)).save(tmp_path / "images" / f"{n}.jpg")
    options = {"dataset": str(tmp_path / "data"), "split": "test", "max_gallery_images": 40}
    runs = read_runs([scored_runs["good"]])
    html = write_comparison(runs, tmp_path / "out", image_dir=str(tmp_path / "images"), **options)["html"]
    page.goto(html.as_uri())
    assert page.locator(".card img").count() == 39 and page.locator('.card[data-id="40"] img').count() == 0
    page.locator('.card[data-id="5"]').scroll_into_view_if_needed()
    picture = page.locator('.card[data-id="5"] img')
    page.wait_for_function("image => image.complete", arg=picture.element_handle())
    assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [400, 102]
    assert page.locator('.card[data-id="5"] .references li').all_inner_texts() == ["犬が5匹"]
    assert page.requests_made == []

    # Without the folder there are references and no pictures; with no dataset neither, and the page says so.
    page.goto(write_comparison(runs, tmp_path / "two", **options)["html"].as_uri())
    assert page.locator(".card img").count() == 0 and page.locator(".references li").count() == 40
    assert "Pictures are not shown" in page.inner_text("body")
    page.goto(write_comparison(runs, tmp_path / "three", max_gallery_images=10)["html"].as_uri())
    assert "10 of 40 images are shown" in page.inner_text("body")
    assert "References are not shown" in page.inner_text("body")
    assert page.locator(".card").count() == 10


def test_a_run_without_predictions_still_has_scores(page, scored_runs, tmp_path):
    for name in ("good", "weak"):
        shutil.copytree(scored_runs[name], tmp_path / name)
    (tmp_path / "weak" / "predictions.jsonl").unlink()
    page.goto(write_comparison(read_runs([tmp_path / "good", tmp_path / "weak"]), tmp_path / "out")["html"].as_uri())
    assert "Captions of weak are not shown" in page.inner_text("body")
    card = page.locator(".card").first
    assert card.locator(".captions li").count() == 2 and card.locator(".empty").inner_text() == "(not shown)"


@pytest.mark.parametrize("width, scheme", [(390, "light"), (1280, "dark")])
def test_nothing_is_wider_than_the_window(browser, url, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(url)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 23, 21)"
    assert dark == (scheme == "dark")
    context.close()


@pytest.mark.parametrize("width, fits", [(390, False), (1280, True)])
def test_tables_with_long_names_stay_in_the_window(page, scored_runs, tmp_path, width, fits):
    """A desktop shows them whole; on a telephone they scroll in boxes of their own."""
    for name in ("good", "weak"):
        shutil.copytree(scored_runs[name], tmp_path / name)
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        owners = {"encoder": "google/vit-base-patch16-224-in21k", "decoder": "meta-llama/Llama-3.2-1B-Instruct"}
        metrics["model"]["parts"] = {place: {"id": id_, "revision": "0" * 40} for place, id_ in owners.items()}
        metrics["model"] |= {"adapter": f"outputs/sft_vit_llama_food_of_the_{name}_run/adapter"}
        metrics["saw"] = dict.fromkeys(("STAIR", "YJ", "COCO"), "train and validation")
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    runs = read_runs([f"the model that was trained for the longest time={tmp_path / 'good'}", tmp_path / "weak"])
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(write_comparison(runs, tmp_path / "out")["html"].as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.locator(".scroll").evaluate_all("boxes => boxes.map(box => [box.scrollWidth, box.clientWidth])")
    assert [inner <= outer for inner, outer in boxes] == [fits, fits]
    assert page.locator(".scroll").last.evaluate("box => (box.scrollLeft = 50, box.scrollLeft)") == (0 if fits else 50)
