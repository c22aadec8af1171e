"""From a GGUF file to a folder of transformers: the miniature Llama, stored as llama.cpp stores a SmolLM2."""

import importlib.util
import json

import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoTokenizer, LlamaForCausalLM

from vlmcap.models.smollm2 import convert_gguf, fetch_smollm2
from vlmcap.models.vit_llama import VitLlamaArguments, build_vit_llama
from vlmcap.models.weights import ModelError

# What llama.cpp calls the parts of a layer.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path, folder, without=None) -> None:
    """The model and the tokenizer in `folder` as a GGUF file in float32, its tokenizer declared as a SmolLM's.

    The head's weight is that of the embeddings.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)

    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.eos_token_id)

    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name in ("lm_head.weight", without):
            continue
        if name.startswith("model.layers."):
            _, _, number, rest = name.removesuffix(".weight").split(".", 3)
            heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
            if rest in heads:  # llama.cpp pairs neighbours in a head where transformers pairs halves
                shape = heads[rest], 2, values.shape[0] // heads[rest] // 2, values.shape[1]
                values = values.reshape(shape).swapaxes(1, 2).reshape(values.shape).copy()
            name = f"blk.{number}.{NAMES[rest]}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def converted(repo_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", repo_root / "recipes/miniatures/llama")
    convert_gguf(folder / "tiny.gguf", folder / "tiny")
    return folder / "tiny"


def test_a_file_without_a_weight_is_refused(repo_root, tmp_path):
    write_gguf(tmp_path / "part.gguf", repo_root / "recipes/miniatures/llama", without="model.norm.weight")
    with pytest.raises(ModelError, match="part.gguf has no weights for model.norm.weight of a LlamaForCausalLM"):
        convert_gguf(tmp_path / "part.gguf", tmp_path / "out")


def test_weights_come_back(converted, repo_root):
    there, back = (
        LlamaForCausalLM.from_pretrained(folder) for folder in (repo_root / "recipes/miniatures/llama", converted)
    )
    assert back.dtype == torch.float16 and back.config.tie_word_embeddings
    theirs, ours = there.state_dict(), back.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name].half(), ours[name]) for name in theirs)
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(there.float()(ids).logits, back.float()(ids).logits)


def test_tokenizer_splits_numbers_into_digits_and_knows_its_ends(converted, repo_root):
    before = AutoTokenizer.from_pretrained(repo_root / "recipes/miniatures/llama")
    after = AutoTokenizer.from_pretrained(converted)
    title = "Red Circle over Blue Square"
    assert after(title)["input_ids"] == before(title, add_special_tokens=False)["input_ids"]
    assert after.decode(after("22 Plums, 375 g")["input_ids"]) == "22 Plums, 375 g"
    pieces = after.tokenize("In 1987")
    assert [piece for piece in pieces if piece.isdigit()] == ["1", "9", "8", "7"]
    assert (after.bos_token, after.eos_token) == (before.bos_token, before.eos_token)
    assert after.pad_token == after.eos_token and after.model_max_length == 512


def test_the_recipe_puts_a_vit_in_front(converted, repo_root):
    vit = str(repo_root / "recipes/miniatures/vit")
    model, processor = build_vit_llama(VitLlamaArguments(vit, decoder_name_or_path=str(converted)), seed=0)
    config = model.generation_config
    assert (config.bos_token_id, config.eos_token_id) == (0, 1) and processor.tokenizer.padding_side == "right"
    size = model.encoder.config.image_size
    ids = model.generate(pixel_values=torch.rand(2, 3, size, size), max_new_tokens=4)
    assert ids.shape[0] == 2 and 1 <= ids.shape[1] <= 4


def test_what_is_missing_is_said_before_anything_is_fetched(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="exists: delete it"):
        fetch_smollm2(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"no such format")
    with pytest.raises(ModelError, match="x.gguf cannot be loaded"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"\[smollm2\]"):
        fetch_smollm2(tmp_path / "out")
    assert not (tmp_path / "out").exists()
