"""What constrained decoding promises, on captions of random models: no output ever breaks it."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from vlmcap.captioning.constraints import ConstraintError, constraints, japanese_characters

PROMPT = 3  # tokens before the caption
LENGTH = 10


@pytest.fixture(scope="module")
def byte_level(miniature_dir):
    """457 pieces: a byte for almost every Japanese character's thirds, so that most pieces are no whole character."""
    return AutoTokenizer.from_pretrained(miniature_dir)


@pytest.fixture(scope="module")
def qwen2vl(qwen2vl_dir):
    return AutoTokenizer.from_pretrained(qwen2vl_dir)


@pytest.fixture(scope="module")
def sentencepiece():
    """Pieces as SentencePiece writes them, with byte fallback."""
    specials = ["<unk>", "<s>", "</s>"]
    words = ["▁", "▁猫", "猫", "が", "いる", "彼", "女", "女の", "▁a", "dog", "▁この", "车", "は", "。", "赤い", "犬"]
    vocabulary = {piece: i for i, piece in enumerate([*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def random_model(tokenizer, seed: int, spare: int = 7) -> Qwen2ForCausalLM:
    """A tiny language model with steep random preferences and, as Qwen2-VL, more logits than tokens."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + spare,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    return model


def captions(tokenizer, model, seed: int, rows: int = 4, num_beams: int = 3, sample: bool = True, **asked):
    """Generated token ids and texts of random prompts."""
    torch.manual_seed(seed)
    config = GenerationConfig(
        num_beams=num_beams,
        do_sample=sample,
        max_new_tokens=LENGTH,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    prompt = torch.randint(3, 200, (rows, PROMPT))
    limits = constraints(tokenizer, PROMPT, **asked)
    with torch.no_grad():
        output = model.generate(prompt, generation_config=config, logits_processor=limits)[:, PROMPT:]
    return output, tokenizer.batch_decode(output, skip_special_tokens=True)


# Random models tried with each; a step over the 151,936 logits of Qwen2-VL takes a thousand times one over 457.
TOKENIZERS = {"byte_level": range(3), "sentencepiece": range(3), "qwen2vl": range(1)}
SEARCHES = ({"num_beams": 3}, {"num_beams": 3, "sample": False}, {"num_beams": 1})


@pytest.mark.parametrize("search", SEARCHES, ids=["beam sample", "beams", "sample"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_japanese_only_lets_nothing_else_through(name, search, request):
    tokenizer = request.getfixturevalue(name)
    free, said = set(), set()
    for seed in TOKENIZERS[name]:
        model = random_model(tokenizer, seed)
        free |= {character for text in captions(tokenizer, model, seed, **search)[1] for character in text}
        _, texts = captions(tokenizer, model, seed, japanese_only=True, max_new_tokens=LENGTH, **search)
        said |= {character for text in texts for character in text.strip(" ")}
    assert said <= japanese_characters()
    assert len(said) > 5 and free - japanese_characters()


def test_a_caption_may_be_cut_inside_a_character_only_where_its_length_is_not_known(byte_level):
    """The reason for max_new_tokens: without it the last character may be half a one, and nothing else is wrong."""
    texts = [
        text
        for seed in range(6)
        for text in captions(byte_level, random_model(byte_level, seed), seed, japanese_only=True)[1]
    ]
    assert any(text.endswith("\ufffd") for text in texts)
    assert {character for text in texts for character in text.rstrip("\ufffd")} <= japanese_characters()


@pytest.mark.parametrize("japanese_only", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_caption_holds_an_avoided_word(name, japanese_only, request):
    """The words are cut out of what the same model writes without the constraint."""
    tokenizer = request.getfixturevalue(name)
    asked = {"japanese_only": japanese_only, "max_new_tokens": LENGTH}
    broken = 0
    for seed in TOKENIZERS[name]:
        model = random_model(tokenizer, seed)
        _, before = captions(tokenizer, model, seed, **asked)
        whole = [text.replace("\ufffd", " ") for text in before]
        words = {text[i : i + 2] for text in whole for i in range(0, len(text) - 1, 2)}
        words = sorted(word for word in words if not any(c.isspace() for c in word))[:40]
        _, after = captions(tokenizer, model, seed, **asked, avoid_words=words)
        assert not [word for text in after for word in words if word in text]
        broken += sum(word in text for text in before for word in words)
    assert broken


def test_a_word_is_avoided_however_it_is_cut(byte_level, sentencepiece):
    """Forced along the word byte by byte, piece by piece and with a special token inside it."""
    fallback = {byte: sentencepiece.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)}
    by_bytes = [fallback[byte] for byte in "彼女".encode()]
    pieces = sentencepiece.convert_tokens_to_ids(["彼", "女", "女の"])
    (limit,) = constraints(sentencepiece, 1, avoid_words=["彼女", "犬"])

    def barred(*written: int) -> set[int]:
        scores = limit(torch.tensor([[5, *written]]), torch.zeros(1, len(sentencepiece)))
        return set(scores[0].isinf().nonzero().flatten().tolist())

    dog = sentencepiece.convert_tokens_to_ids("犬")
    assert barred() == {dog}
    assert barred(pieces[0]) == {dog, pieces[1], pieces[2]}
    assert barred(pieces[0], sentencepiece.bos_token_id) == barred(pieces[0])
    assert barred(*by_bytes[:5]) == {dog, by_bytes[5]}
    assert barred(pieces[0], *by_bytes[3:5]) == {dog, by_bytes[5]}
    assert barred(pieces[1]) == barred(pieces[0], pieces[1]) == {dog}

    ids = byte_level("彼女", add_special_tokens=False).input_ids
    (limit,) = constraints(byte_level, 0, avoid_words=["彼女"])
    scores = limit(torch.tensor([ids[:-1]]), torch.zeros(1, len(byte_level)))
    assert scores[0, ids[-1]].isinf() and scores.isinf().sum() < 5


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_of_the_caption_is_repeated(byte_level, size):
    def repeats(output):
        rows = [[t for t in row.tolist() if t != byte_level.pad_token_id] for row in output]
        ngrams = [[tuple(row[i : i + size]) for i in range(len(row) - size + 1)] for row in rows]
        return sum(len(row) - len(set(row)) for row in ngrams)

    model = random_model(byte_level, 1)
    torch.nn.init.normal_(model.lm_head.weight, std=4.0)
    before, _ = captions(byte_level, model, 0, rows=16, sample=False)
    after, _ = captions(byte_level, model, 0, rows=16, sample=False, no_repeat_ngram_size=size)
    assert repeats(before) > 0 and repeats(after) == 0


def test_words_of_the_prompt_may_be_said(byte_level):
    (limit,) = constraints(byte_level, 3, no_repeat_ngram_size=2)
    scores = torch.zeros(1, len(byte_level))
    assert not limit(torch.tensor([[10, 11, 12, 10]]), scores).isinf().any()
    after = limit(torch.tensor([[10, 11, 12, 10, 11, 10]]), scores)
    assert after.isinf().nonzero().tolist() == [[0, 11]]


@pytest.mark.parametrize("size", [2, 3])
def test_all_together_end_in_whole_characters(byte_level, size):
    """Even where a repetition would be the only way to complete a character."""
    asked = {"japanese_only": True, "no_repeat_ngram_size": size, "max_new_tokens": LENGTH}
    for seed in range(5):
        model = random_model(byte_level, seed)
        _, texts = captions(byte_level, model, seed, avoid_words=["赤い", "の", "緑"], **asked)
        assert {character for text in texts for character in text.strip(" ")} <= japanese_characters()
        assert not [text for text in texts if "赤い" in text or "の" in text or "緑" in text]


def test_a_trained_model_still_speaks(miniature_dir, byte_level):
    """Nothing but what was asked is taken away: Japanese written by hand passes, character by character."""
    text = "赤い丸が左に、緑の四角が右にあります。"
    ids = byte_level(text, add_special_tokens=False).input_ids + [byte_level.eos_token_id]
    (limit,) = constraints(byte_level, 0, japanese_only=True, avoid_words=["彼女"], max_new_tokens=len(ids))
    for place, token in enumerate(ids):
        scores = limit(torch.tensor([ids[:place]], dtype=torch.long), torch.zeros(1, len(byte_level)))
        assert not scores[0, token].isinf(), byte_level.decode(ids[:place])


def test_japanese_is_what_japanese_captions_are_written_with():
    assert japanese_characters() >= set("赤い猫とコーヒーを、２人で3杯飲む。々〆ヶ「」！？ー髙剝")
    assert not japanese_characters() & set("aZé한这车发 \n　")


def test_a_caption_ends_with_the_token_that_generation_ends_with(byte_level):
    """Gemma 3's turns end with another token than its tokenizer names; half a character is completed first."""
    other, begun = 20, byte_level("馬", add_special_tokens=False).input_ids[:1]
    assert byte_level.decode(begun) == "\ufffd"

    def blocked(written: list[int], **asked) -> torch.Tensor:
        (limit,) = constraints(byte_level, 0, japanese_only=True, **asked)
        return limit(torch.tensor([written], dtype=torch.long), torch.zeros(1, len(byte_level)))[0].isinf()

    assert blocked([])[other] and not blocked([])[byte_level.eos_token_id]
    assert not blocked([], eos_token_id=[other])[other] and not blocked([], eos_token_id=other)[other]
    ended = blocked([other], eos_token_id=other)
    assert set((~ended).nonzero().flatten().tolist()) == {other, byte_level.pad_token_id}
    assert blocked(begun, eos_token_id=other)[other]


def test_what_cannot_be_kept_is_refused(byte_level):
    assert not constraints(byte_level, 3)
    with pytest.raises(ConstraintError, match="'' is empty"):
        constraints(byte_level, 3, avoid_words=["猫", ""])
    with pytest.raises(ConstraintError, match="holds white space"):
        constraints(byte_level, 3, avoid_words=["New York"])
    with pytest.raises(ConstraintError, match="leave no character"):
        constraints(byte_level, 3, japanese_only=True, avoid_words=[f"x{c}" for c in japanese_characters()])
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"猫": 0}, unk_token="猫")))
    with pytest.raises(ConstraintError, match="neither byte-level nor SentencePiece"):
        constraints(words, 3, japanese_only=True)
