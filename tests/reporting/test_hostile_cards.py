"""Names, licences, settings and notes from anywhere: a card shows them, and they change nothing else in it."""

import ast
import copy
import json
import re
from functools import cache

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from tests.reporting.documents import PARTS, adapter_document, audit_document, family_document, language_document
from vlmcap.markdown import code_span, fenced, markdown_escape, visible
from vlmcap.reporting.card_metadata import eval_result_entries
from vlmcap.reporting.cards import render_adapter_card, write_adapter_card
from vlmcap.reporting.tables import latex_escape

HOSTILE = {
    "YAML": "x\n---\nlicense: mit\n...\n!!python/object/apply:os.system ['touch /tmp/x']: & * {a: b} # c",
    "YAML, quotes": "'\": - [\t?",
    "heading": "# Results\n\n## Licence\n\nfree",
    "underlined heading": "a\n===",
    "list": "- [x] done\n1. two",
    "table": "a | b | c\n|---|---|\n| 1 | 2 |",
    "code": "` `` ``` code\n```\n# out",
    "tildes": "~~~\ngone\n~~~",
    "link": "[free](javascript:alert(1)) ![x](https://evil.example/x.png) [a]: https://evil.example",
    "HTML": "</script><img src=x onerror=alert(1)><!-- <details> &amp; &#60;b&#62;",
    "bidi": "abc\u202egpj.exe\u202c\u2066x\u2069\u200b\ufeff",
    "control": "\x1b[2J\x1b]0;title\x07\x00\x85\u2028",
    "Jinja": "{{ 7*7 }}{% include 'captioner.md.j2' %}{# x #}",
    "Python": '"); import os; os.system("touch /tmp/x")  #',
    "Python, lines": '"\nimport os\n"""',
    "special tokens": "<|im_start|>system<|image_pad|> </s> [SEP]",
    "surrogate": "a\ud800b",
    "emphasis": "**bold** _it_ *it* ~~gone~~ __x__",
    "credentials": "https://user:hf_abcdefghijklmnopqrst@evil.example/data",
    "long": "ａ" * 3000,
}
HARMLESS = "harmless"


def poisoned(text: str, recipe: str) -> dict:
    """A metrics document with `text` wherever a document holds text that came from elsewhere."""
    documents = {"sft_qwen2vl_jp": adapter_document, "several prompts": language_document}
    metrics = copy.deepcopy(documents[recipe]() if recipe in documents else family_document(recipe))
    for one in metrics.get("languages", {}).values():
        for run in (one, one.get("base", {})):
            run |= {"prompt": text, "signatures": dict.fromkeys(run.get("signatures", ()), text)}
    for run in (metrics, metrics["base"]):
        run["model"] |= {"id": text, "revision": text, "dtype": text, "quantization": text}
        if "parts" in run["model"]:
            run["model"]["parts"] = {place: {"id": text, "revision": text} for place in run["model"]["parts"]}
        run["dataset"] |= {"id": text, "revision": text, "split": text, "license": text}
        run["saw"] = {"STAIR": text, "YJ": text, "COCO": text, "note": text}
        run["hardware"] = run["hardware"] | {"device": text, "cpu": text}
        run["decoding"] |= {"avoid_words": [text], text: text}
        run["signatures"] = dict.fromkeys(run["signatures"], text)
        run |= {"versions": {text: text}, "commit": text, "created": text, "notices": [text]}
        if run["prompt"] is not None:
            run["prompt"] = text
    metrics["model"] |= {"adapter": text, "adapter_revision": text}
    training = metrics["training"]
    training["dataset"] |= {"id": text, "revision": text, "split": text}
    training["config"] = {text: text, "list": [text], "dict": {text: text}}
    training["hardware"] = training["hardware"] | {"device": text, "cpu": text}
    if "best" in training:
        training |= {"best": training["best"] | {"metric": text}, "validation_split": text}
    return metrics


def audit_of(metrics: dict, text: str) -> dict:
    audit = audit_document(metrics)
    audit["settings"]["lexicon"]["name"] = audit["settings"]["persons"]["name"] = text
    return audit


def body(card: str) -> str:
    return ModelCard(card).text


def structure(card: str) -> list[tuple]:
    """Blocks, links, pictures and HTML of the card, without the words."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body(card))
    inline = [child for token in tokens for child in token.children or []]
    kept = [child for child in inline if child.type in ("link_open", "image", "html_inline", "em_open", "s_open")]
    blocks = [(token.type, token.tag, token.content if token.type == "html_block" else "") for token in tokens]
    return blocks + [(child.type, child.attrs.get("href"), child.content) for child in kept]


@cache
def cards(text: str, recipe: str) -> str:
    metrics = poisoned(text, recipe)
    return render_adapter_card(metrics, "user/adapter", audit_of(metrics, text))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("recipe", ["sft_qwen2vl_jp", "several prompts", *PARTS])
def test_a_hostile_document_makes_the_same_card(recipe, text):
    card = cards(text, recipe)
    assert structure(card) == structure(cards(HARMLESS, recipe))
    card.encode()
    unseen = [char for char in body(card) if not (char.isprintable() or char == "\n")]
    assert not unseen and "hf_abcdef" not in card and "user:" not in card
    # The metadata are those of a harmless card, except for the words.
    data, harmless = (yaml.safe_load(c.split("\n---\n")[0]) for c in (card, cards(HARMLESS, recipe)))
    assert data.keys() == harmless.keys() and "base_model" not in data and "datasets" not in data
    assert {k: v for k, v in data.items() if k != "model-index"} == {
        k: v for k, v in harmless.items() if k != "model-index"
    }
    (result,) = data["model-index"][0]["results"]
    if "hf_" not in text:
        assert result["dataset"]["split"] == text and result["dataset"]["revision"] == text
        assert {metric["args"]["signature"] if "args" in metric else text for metric in result["metrics"]} == {text}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("recipe", ["sft_qwen2vl_jp", "several prompts", *PARTS])
def test_the_code_of_a_hostile_card_is_the_code_of_a_harmless_one(recipe, text):
    """The same statements, with other strings in them."""

    def statements(card: str) -> list[str]:
        trees = [ast.parse(code) for code in re.findall(r"^```python\n(.*?)^```$", card, re.S | re.M)]
        for node in (node for tree in trees for node in ast.walk(tree)):
            if isinstance(node, ast.Constant):
                node.value = type(node.value).__name__
        return list(map(ast.dump, trees))

    def strings(card: str) -> set[str]:
        (code, *_) = re.findall(r"^```python\n(.*?)^```$", card, re.S | re.M)
        return {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}

    assert statements(cards(text, recipe)) == statements(cards(HARMLESS, recipe)) != []
    if recipe not in PARTS and "hf_" not in text:
        assert text in strings(cards(text, recipe))  # the prompt, to the letter


def test_a_card_is_written_whole_and_the_hub_s_entries_stay_yaml(tmp_path):
    metrics = poisoned(HOSTILE["YAML"], "sft_qwen2vl_jp")
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    card = write_adapter_card(tmp_path)
    assert card.read_text(encoding="utf-8") == render_adapter_card(metrics)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "README.md"}
    metrics["dataset"]["id"] = "user/data"
    assert {entry.dataset_revision for entry in eval_result_entries(metrics)} == {HOSTILE["YAML"]}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_escapes_show_the_text(text):
    """Rendered, each says what `visible` says, as one run of text or one code span, in prose and in a table's cell."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    shown = visible(text).strip()

    def inline(markdown: str) -> list[str]:
        children = [child for token in parser.parse(markdown) for child in token.children or []]
        assert {child.type for child in children} <= {"text", "text_special", "code_inline"}, children
        return "".join(child.content for child in children)

    assert inline(f"x {markdown_escape(text)}") == f"x {shown}"
    cell = markdown_escape(text)
    assert inline(f"| a | b |\n|---|---|\n| x | {cell} |") == f"abx{shown}"
    assert inline(f"x {code_span(text)}").removeprefix("x ").strip() == shown


def test_code_shows_spaces():
    parser = MarkdownIt("commonmark")
    for text in (" a ", "a ", " ` ", "   "):
        (code,) = [child for token in parser.parse(code_span(text)) for child in token.children or []]
        assert (code.type, code.content.strip()) == ("code_inline", text.strip()) and len(code.content) >= len(text)
    assert fenced("犬の絵\u3000を\t見る\u200b") == "```text\n犬の絵 を 見る\\u200b\n```"


def test_latex_keeps_to_its_cell():
    assert latex_escape("a\n\nb\\\\c & d\u202e\x1b") == (
        r"a b\textbackslash{}\textbackslash{}c \& d\textbackslash{}u202e\textbackslash{}u001b"
    )
