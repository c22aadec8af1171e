"""Weights and adapters from strangers: what is loaded is safetensors that fit, and nothing in them is run."""

import ast
import json
import os
import pickle
import runpy
import shutil
import struct
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, LlamaForCausalLM, ViTModel, set_seed

from vlmcap.captioning.predictions import model_record
from vlmcap.models import blip, vit_gpt2, vit_llama
from vlmcap.models.load import (
    ModelArguments,
    ModelError,
    chat_prompt,
    check_adapter_of,
    load_adapter,
    load_model,
    load_part,
    load_processor,
    lora_config,
    resolve_revision,
)
from vlmcap.models.weights import load_weights, loading, read_adapter

MINIATURES = Path(__file__).parents[2] / "recipes/miniatures"
BASE = str(MINIATURES / "qwen2_vl")
WEIGHTS = "adapter_model.safetensors"
A_TENSOR = "base_model.model.model.language_model.layers.7.mlp.up_proj.lora_A.weight"


class Touch:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """The file that planted code would leave. Nothing asks at the terminal either."""
    path = tmp_path / "mark"

    def asked(*_):
        raise AssertionError("asked at the terminal whether code may run")

    monkeypatch.setattr("builtins.input", asked)
    yield path
    assert not path.exists()


def test_the_planted_pickle_works(tmp_path):
    """Else the tests below would show nothing."""
    pickle.loads(pickle.dumps(Touch(tmp_path / "pickled")))
    torch.save({"weight": Touch(tmp_path / "saved")}, tmp_path / "model.bin")
    torch.load(tmp_path / "model.bin", weights_only=False)
    assert (tmp_path / "pickled").exists() and (tmp_path / "saved").exists()


def load_vit(folder: str) -> None:
    load_part(ViTModel, "vit", folder, None, add_pooling_layer=False)


def load_gpt2(folder: str) -> None:
    load_part(GPT2LMHeadModel, "gpt2", folder, None, new="cross", add_cross_attention=True)


def load_llama(folder: str) -> None:
    load_part(LlamaForCausalLM, "llama", folder, None)


def load_qwen(folder: str) -> None:
    load_model(folder, load_in_4bit=False)


BASES = {"qwen2_vl": load_qwen, "blip": blip.load_blip, "vit": load_vit, "gpt2": load_gpt2, "llama": load_llama}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """Kind of model -> folder of an adapter, or of a whole model, of the miniatures; as the recipes save them."""
    folder = tmp_path_factory.mktemp("trained")
    set_seed(0)
    model = load_model(BASE, load_in_4bit=False)
    get_peft_model(model, lora_config(model, ModelArguments(BASE, lora_r=2))).save_pretrained(folder / "qwen2_vl")
    load_processor(BASE).save_pretrained(folder / "qwen2_vl")

    args = blip.BlipArguments(str(MINIATURES / "blip"), lora_r=2)
    model, processor = blip.load_blip(args.model_name_or_path)
    processor = blip.learn_vietnamese(processor, ["Một quả bóng đỏ.", "Một ngôi sao xanh."], 5)
    blip.add_lora(model, processor, args).save_pretrained(folder / "blip")
    processor.save_pretrained(folder / "blip")

    parts = {"encoder_name_or_path": str(MINIATURES / "vit")}
    args = vit_llama.VitLlamaArguments(**parts, decoder_name_or_path=str(MINIATURES / "llama"), lora_r=2)
    model, processor = vit_llama.build_vit_llama(args, seed=0)
    vit_llama.add_lora(model, args).save_pretrained(folder / "vit_llama")
    processor.save_pretrained(folder / "vit_llama")

    args = vit_gpt2.VitGpt2Arguments(**parts, decoder_name_or_path=str(MINIATURES / "gpt2"))
    model, processor = vit_gpt2.build_vit_gpt2(args, seed=0)
    model.save_pretrained(folder / "vit_gpt2")
    processor.save_pretrained(folder / "vit_gpt2")
    return {path.name: path for path in folder.iterdir()}


ADAPTERS = {
    "qwen2_vl": lambda folder: load_adapter(load_model(BASE, load_in_4bit=False), folder),
    "blip": blip.load_blip_adapter,
    "vit_llama": vit_llama.load_vit_llama,
}


@pytest.fixture
def copy(trained, tmp_path):
    """copy("blip"): a copy of what was trained that may be changed; copy("gpt2", MINIATURES) of a base."""

    def copy(kind: str, source: Path | None = None) -> Path:
        return Path(shutil.copytree(source / kind if source else trained[kind], tmp_path / "stranger" / kind))

    return copy


def bin_alone(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Touch(mark)}, folder / "pytorch_model.bin")


def harmless_bin_alone(folder: Path, _: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def index_of_a_bin(folder: Path, _: Path) -> None:
    """transformers 5.23 loads this with use_safetensors=True."""
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "model.bin")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_that_leads_out(folder: Path, _: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    names = load_file(folder.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def another_index(folder: Path, _: Path) -> None:
    """transformers 5.23 takes the name of the weights from config.json."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "pytorch_model.bin")}
    (folder / "x.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text()) | {"transformers_weights": "x.safetensors.index.json"}
    (folder / "config.json").write_text(json.dumps(config))


def adapter_inside(folder: Path, mark: Path) -> None:
    """By default, transformers would load another base, and then the pickle."""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x/y"}))
    torch.save({"weight": Touch(mark)}, folder / "adapter_model.bin")


def stored_in_4_bits(folder: Path, _: Path) -> None:
    stored = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    config = json.loads((folder / "config.json").read_text()) | stored
    (folder / "config.json").write_text(json.dumps(config))


def truncated(folder: Path, _: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def not_whole(folder: Path, _: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    matrices = sorted(name for name, tensor in weights.items() if tensor.ndim == 2)
    del weights[next(name for name in matrices if "attn" in name or "attention" in name)]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def another_shape(folder: Path, _: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(n for n, t in sorted(weights.items()) if t.ndim == 2 and ("attn" in n or "attention" in n))
    weights[name] = torch.cat([weights[name], weights[name]])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


BASE_FAULTS = {
    bin_alone: "has no weights in safetensors, and others are not loaded",
    harmless_bin_alone: "has no weights in safetensors, and others are not loaded",
    index_of_a_bin: r"is in 'model.bin', but must be in a \.safetensors file",
    index_that_leads_out: r"is in '\.\./model.safetensors', but must be in a \.safetensors file",
    another_index: r"names other weights \(transformers_weights\)",
    adapter_inside: "is an adapter",
    stored_in_4_bits: "is stored in 4 bits already: set load_in_4bit: true, or give the model",
    truncated: "cannot be loaded",
    not_whole: "has no weights for",
    another_shape: "has other shapes for",
}


@pytest.mark.parametrize("spoil", BASE_FAULTS, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("kind", [*BASES, "vit_gpt2"])
def test_bases_come_whole_from_safetensors_alone(kind, spoil, copy, mark, fault):
    folder = copy(kind, None if kind == "vit_gpt2" else MINIATURES)
    spoil(folder, mark)
    with fault(f"{kind}: {spoil.__name__}"), pytest.raises(ModelError, match=BASE_FAULTS[spoil]) as raised:
        BASES.get(kind, vit_gpt2.load_vit_gpt2)(str(folder))
    assert str(folder) in str(raised.value)


def test_a_base_that_is_stored_in_other_bits_than_asked_for(copy, fault):
    folder = copy("qwen2_vl", MINIATURES)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with fault("a GPTQ base in 4 bits"), pytest.raises(ModelError, match="stored quantised already .'gptq'., and not"):
        load_model(str(folder), load_in_4bit=True)


@pytest.mark.parametrize("kind", ["vit", "gpt2", "llama"])
def test_an_adapter_is_not_part_of_a_model(kind, copy, fault):
    """Its folder holds no config.json: transformers reports an unrecognised model, or a gated one."""
    folder = copy(kind, MINIATURES)
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x/y"}))
    with (
        fault(f"an adapter as {kind}"),
        pytest.raises(ModelError, match="is an adapter .* give its base as the model"),
    ):
        BASES[kind](str(folder))


@pytest.mark.parametrize("spoil", [not_whole, another_shape], ids=lambda spoil: spoil.__name__)
def test_a_4bit_base_comes_whole(spoil, copy, mark, fault):
    folder = copy("qwen2_vl", MINIATURES)
    spoil(folder, mark)
    with fault(f"4-bit: {spoil.__name__}"), pytest.raises(ModelError, match=BASE_FAULTS[spoil]):
        load_model(str(folder), load_in_4bit=True)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_come_from_safetensors_alone(kind, copy, mark, fault):
    folder = copy(kind)
    torch.save({"weight": Touch(mark)}, folder / "adapter_model.bin")
    torch.save({"weight": Touch(mark)}, folder / "training_args.bin")
    with fault(f"{kind}: a pickle beside the adapter"):
        ADAPTERS[kind](str(folder))
    (folder / WEIGHTS).unlink()
    with fault(f"{kind}: an adapter in a pickle"), pytest.raises(ModelError, match="no weights in safetensors"):
        ADAPTERS[kind](str(folder))


def load_whole_qwen(folder: str) -> None:
    load_processor(folder)
    load_qwen(folder)


def load_adapter_and_processor(folder: str) -> None:
    load_processor(folder)
    ADAPTERS["qwen2_vl"](folder)


# What loads a folder and each of these files in it; the base is one of the miniatures, the others are trained.
CONFIGURATIONS = ["config.json", "tokenizer_config.json", "processor_config.json"]
WHOLE = {
    "qwen2_vl": load_whole_qwen,
    "blip": blip.load_blip,
    "qwen2_vl adapter": load_adapter_and_processor,
    "blip adapter": blip.load_blip_adapter,
    "vit_llama adapter": vit_llama.load_vit_llama,
    "vit_gpt2 whole": vit_gpt2.load_vit_gpt2,
}
PARTS = {"vit": load_vit, "gpt2": load_gpt2, "llama": load_llama}  # of which their configuration alone is read


@pytest.mark.parametrize(
    ("kind", "file"), [(k, f) for k in WHOLE for f in CONFIGURATIONS] + [(k, "config.json") for k in PARTS]
)
def test_code_of_a_repository_is_not_run(kind, file, copy, mark, fault):
    """Known types are loaded by transformers' own classes; an unknown one is refused. Nobody is asked."""
    name, _, trained = kind.partition(" ")
    folder = copy(name, None if trained else MINIATURES)
    (folder / "planted.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    path = folder / file
    names = "AutoConfig AutoModel AutoModelForCausalLM AutoModelForImageTextToText AutoProcessor AutoImageProcessor"
    references = dict.fromkeys(names.split(), "planted.Planted") | {"AutoTokenizer": ["planted.Planted", None]}
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(document | {"auto_map": references}))
    with fault(f"{kind}: code in {file}"):
        try:
            (WHOLE | PARTS)[kind](str(folder))
        except ModelError as error:
            assert "needs code of its own repository, which is not run" in str(error)


# Adapters from strangers


def test_what_was_trained_fits(trained):
    """Nothing is refused of what the recipes save, and every tensor arrives."""
    model = ADAPTERS["qwen2_vl"](str(trained["qwen2_vl"]))
    saved = load_file(trained["qwen2_vl"] / WEIGHTS)
    state = {name.replace(".default", "").replace("modules_to_save.", ""): t for name, t in model.state_dict().items()}
    assert len(saved) == 90 and all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    for kind in ("blip", "vit_llama"):
        ADAPTERS[kind](str(trained[kind]))


SLOW = r"(\w+)*model(\w+)*x"
CONFIGS = {
    "another kind": ({"peft_type": "IA3"}, "peft_type is 'IA3', and only LORA is loaded"),
    "no kind": ({"peft_type": None}, "peft_type is None"),
    "kind that is no text": ({"peft_type": ["LORA"]}, r"peft_type is \['LORA'\]"),
    "base not stated": ({"base_model_name_or_path": None}, "base_model_name_or_path is None, but must be a text"),
    "slow expression for targets": ({"target_modules": SLOW}, "target_modules must be a list of names, no regular"),
    "slow expression in a list": ({"target_modules": [SLOW]}, "target_modules must be a list of names"),
    "slow expression to exclude": ({"exclude_modules": SLOW}, "exclude_modules must be a list of names, or names"),
    "slow layers pattern": ({"layers_pattern": SLOW}, "layers_pattern must be names"),
    "slow rank pattern": ({"rank_pattern": {SLOW: 4}}, "rank_pattern must be names with ranks"),
    "slow alpha pattern": ({"alpha_pattern": {SLOW: 4}}, "alpha_pattern must be names with numbers"),
    "too many targets": ({"target_modules": [f"m{i}" for i in range(1025)]}, "target_modules must be a list"),
    "no targets": ({"target_modules": []}, r"target_modules is \[\], but must be"),
    "unknown target": (
        {"target_modules": ["q_proj", "query"]},
        "target_modules names query, which a Qwen2VL.* does not",
    ),
    "unknown trained module": ({"modules_to_save": ["score"]}, "modules_to_save names score, which"),
    "rank 0": ({"r": 0}, "r must be a whole number from 1 to 512, but is 0"),
    "rank of gigabytes": ({"r": 10**9}, "r must be a whole number from 1 to 512, but is 1000000000"),
    "rank in words": ({"r": "8"}, "r must be a whole number"),
    "rank true": ({"r": True}, "r must be a whole number"),
    "rank with a fraction": ({"r": 8.0}, "r must be a whole number"),
    "scale in words": ({"lora_alpha": "16"}, "lora_alpha must be a number, but is '16'"),
    "scale true": ({"lora_alpha": True}, "lora_alpha must be a number, but is True"),
    "rsLoRA in words": ({"use_rslora": "yes"}, "use_rslora must be true or false, but is 'yes'"),
    "initialised by 1": ({"init_lora_weights": 1}, "init_lora_weights must be true, false or gaussian, but is 1"),
    "a name with a line feed": ({"modules_to_save": ["merger\n"]}, "modules_to_save must be a list of names"),
    "rank of another module": ({"rank_pattern": {"up_proj": 3}}, "is .2, 160., but .3, 160. is needed"),
    "scale beyond bounds": ({"lora_alpha": 10**300}, "lora_alpha must be a number"),
    "dropout 7": ({"lora_dropout": 7}, "lora_dropout must be a number from 0 to 1"),
    "module to import": ({"megatron_config": {"a": 1}, "megatron_core": "planted"}, "megatron_config .*not supported"),
    "layers multiplied": ({"layer_replication": [[0, 10000]]}, "layer_replication .*not supported"),
    "DoRA": ({"use_dora": True}, "use_dora is True, which is not supported"),
    "LoRA biases": ({"lora_bias": True}, "lora_bias is True, which is not supported"),
    "biases of the base": ({"bias": "all"}, "bias must be none, but is 'all'"),
    "base rewritten (PiSSA)": ({"init_lora_weights": "pissa"}, "init_lora_weights must be true, false or gaussian"),
    "base rewritten (LoftQ)": ({"loftq_config": {"loftq_bits": 4}}, "loftq_config .*not supported"),
    "parameters by name": ({"target_parameters": ["weight"]}, "target_parameters .*not supported"),
    "rows beyond the vocabulary": ({"trainable_token_indices": [10**6]}, "names row 1000000, but a"),
    "negative rows": ({"trainable_token_indices": [-1]}, "trainable_token_indices must be numbers of rows"),
    "a classifier": ({"task_type": "SEQ_CLS"}, "task_type must be CAUSAL_LM or null"),
    "layers in words": ({"layers_to_transform": ["1"]}, "layers_to_transform must be numbers"),
    "layers that are not there": ({"layers_to_transform": [6, 99]}, "tensor .*layers.2.* belongs nowhere"),
    "a key of the future": ({"use_magic": "yes"}, "use_magic is 'yes', which is not supported"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_from_strangers(name, copy, mark, fault, monkeypatch):
    change, message = CONFIGS[name]
    folder = copy("qwen2_vl")
    (folder / "planted.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    monkeypatch.syspath_prepend(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with fault(name), pytest.raises(ModelError, match=message):
        check_adapter_of(read_adapter(str(folder)), BASE)


def test_what_only_describes_is_not_followed(copy, mark, monkeypatch):
    folder = copy("qwen2_vl")
    (folder / "planted.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    monkeypatch.syspath_prepend(folder)
    path = folder / "adapter_config.json"
    harmless = {"auto_mapping": {"base_model_class": "Planted", "parent_library": "planted"}, "use_magic": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | harmless | {"megatron_core": "planted"}))
    check_adapter_of(read_adapter(str(folder)), BASE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[1, 2]", "must be a JSON object"),
        (b'{"r": 1, "r": 2}', "occurs twice"),
        (b'{"peft_type": "LORA", "lora_alpha": NaN}', "not a finite number"),
        ("{}".encode("utf-16"), "cannot be read"),
        (b" " * (2**20 + 1), "has 1,048,577 bytes; at most 1,048,576 are read"),
    ],
    ids=["empty", "nested", "list", "a key twice", "NaN", "UTF-16", "large"],
)
def test_configurations_that_are_none(content, message, copy, fault):
    folder = copy("qwen2_vl")
    (folder / "adapter_config.json").write_bytes(content)
    with fault("a configuration that is none"), pytest.raises(ModelError, match=f"adapter_config.json.*{message}"):
        read_adapter(str(folder))


def changed(change):
    def spoil(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return spoil


def cast(tensors: dict, dtype: torch.dtype) -> None:
    tensors[A_TENSOR] = tensors[A_TENSOR].to(dtype)


def header_changed(change):
    """The tensors' entries of the header go through `change`; the data stay."""

    def spoil(path: Path) -> None:
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return spoil


def overlapping(header: dict) -> None:
    names = [name for name in header if name.endswith("up_proj.lora_A.weight")]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]


TENSORS = {
    "a tensor is missing": (changed(lambda t: t.pop(A_TENSOR)), f"it has no tensor {A_TENSOR}"),
    "one too many": (changed(lambda t: t.update(x=torch.zeros(1))), "its tensor x belongs nowhere"),
    "base weights among them": (
        changed(lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)})),
        "tensor base_model.model.lm_head.weight belongs nowhere",
    ),
    "transposed": (
        changed(lambda t: t.update({A_TENSOR: t[A_TENSOR].T.contiguous()})),
        r"layers.7.mlp.up_proj.lora_A.weight is \(160, 2\), but \(2, 160\) is needed",
    ),
    "another rank": (
        changed(lambda t: t.update({A_TENSOR: torch.zeros(4, 160)})),
        r"up_proj.lora_A.weight is \(4, 160\), but \(2, 160\) is needed",
    ),
    "float64": (changed(lambda t: cast(t, torch.float64)), f"{A_TENSOR} is F64, and must be one of F32"),
    "whole numbers": (changed(lambda t: cast(t, torch.int8)), f"{A_TENSOR} is I8, and must be one of F32"),
    "overlapping": (header_changed(overlapping), "damaged or no safetensors file"),
    "type that does not fit the bytes": (header_changed(lambda h: h[A_TENSOR].update(dtype="F64")), "damaged"),
    "shape that does not fit the bytes": (header_changed(lambda h: h[A_TENSOR].update(shape=[9, 9])), "damaged"),
    "shape that overflows": (header_changed(lambda h: h[A_TENSOR].update(shape=[2**40, 2**40])), "damaged"),
    "bytes that nothing names": (lambda p: p.write_bytes(p.read_bytes() + b"x" * 64), "damaged"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-1000]), "damaged"),
    "header truncated": (lambda p: p.write_bytes(p.read_bytes()[:100]), "damaged"),
    "header of 4 EiB": (lambda p: p.write_bytes(struct.pack("<Q", 2**62) + p.read_bytes()[8:]), "damaged"),
    "header that is no JSON": (lambda p: p.write_bytes(struct.pack("<Q", 8) + b"\x80\x04garba"), "damaged"),
    "empty": (lambda p: p.write_bytes(b""), "damaged"),
    "a pickle by that name": (lambda p: torch.save({"a": Touch(p.parents[2] / "mark")}, p), "damaged"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_from_strangers(name, copy, mark, fault):
    spoil, message = TENSORS[name]
    folder = copy("qwen2_vl")
    spoil(folder / WEIGHTS)
    with fault(name), pytest.raises(ModelError, match=message):
        check_adapter_of(read_adapter(str(folder)), BASE)


@pytest.mark.parametrize("kind", ["blip", "vit_llama"])
@pytest.mark.parametrize("name", ["a tensor is missing", "one too many", "transposed", "rank"])
def test_adapters_of_the_relatives(kind, name, copy, fault):
    """BLIP's trained rows and the projection in front of the Llama are compared like LoRA's matrices."""
    folder = copy(kind)
    special = {"blip": "trainable_tokens", "vit_llama": "image_projection.weight"}[kind]
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        key = next(key for key in file.keys() if special in key or "token_adapter" in key)  # noqa: SIM118
    if name == "a tensor is missing":
        changed(lambda t: t.pop(key))(folder / WEIGHTS)
    elif name == "one too many":
        changed(lambda t: t.update({f"{key}.more": torch.zeros(1)}))(folder / WEIGHTS)
    elif name == "transposed":
        changed(lambda t: t.update({key: t[key][:-1].contiguous()}))(folder / WEIGHTS)
    else:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 3}))
        key = "lora_A"
    with fault(f"{kind}: {name}"), pytest.raises(ModelError, match=f"does not fit .*{key}"):
        ADAPTERS[kind](str(folder))


def test_a_weights_file_beyond_the_limit_is_not_opened(copy, fault, monkeypatch):
    folder = copy("qwen2_vl")
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(9 * 2**30)  # sparse: it takes no room
    with fault("9 GiB of weights"), pytest.raises(ModelError, match=r"has 9,663,676,416 bytes; at most 8,589,934,592"):
        read_adapter(str(folder))


@pytest.fixture
def on_hub(hub, copy):
    """Base and adapter on the Hub, user/base and user/adapter; the adapter says so. Returns the API and the folder."""
    api = HfApi()
    for name, folder in (("user/base", BASE), ("user/adapter", None)):
        api.create_repo(name)
        if folder:
            commit = api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns="README.md").oid
    folder = copy("qwen2_vl")
    path = folder / "adapter_config.json"
    stated = {"base_model_name_or_path": "user/base", "revision": commit}
    path.write_text(json.dumps(json.loads(path.read_text()) | stated))
    api.upload_folder(repo_id="user/adapter", folder_path=folder, ignore_patterns="README.md")
    return api, folder


def test_an_adapter_names_its_base_and_its_commit(on_hub, fault):
    api, folder = on_hub
    first = api.model_info("user/base").sha
    second = api.upload_file(path_or_fileobj=b"# Card", path_in_repo="README.md", repo_id="user/base").oid
    found = read_adapter("user/adapter")
    assert found.revision == api.model_info("user/adapter").sha and found.config.revision == first
    check_adapter_of(found, "user/base", first)
    model = load_model("user/base", first, load_in_4bit=False)
    assert lora_config(model, ModelArguments("user/base", first)).revision == first
    load_adapter(model, "user/adapter", base_revision=first)
    with fault("another commit of the base"), pytest.raises(ModelError, match=f"give --model_revision {first}"):
        check_adapter_of(found, "user/base", second)
    api.create_repo("user/other")
    api.upload_folder(repo_id="user/other", folder_path=BASE)
    with fault("another base"), pytest.raises(ModelError, match="was trained on user/base, and not on user/other"):
        check_adapter_of(found, "user/other", None)
    with pytest.warns(UserWarning, match="was trained on user/base; whether .*qwen2_vl is that model"):
        check_adapter_of(found, BASE)


def test_a_model_keeps_its_attention(copy):
    """Beside it is a skeleton of it, made of its configuration, whose attention is another."""
    model = load_model(str(BASE), load_in_4bit=False)
    before = {
        name: part.config._attn_implementation for name, part in model.named_modules() if hasattr(part, "config")
    }
    assert "sdpa" in before.values()
    loaded = load_adapter(model, str(copy("qwen2_vl")))
    assert {name: part.config._attn_implementation for name, part in model.named_modules() if name in before} == before
    assert loaded.get_base_model() is model


def test_an_adapter_in_the_cache_is_read_and_recorded(on_hub, monkeypatch, fault):
    commit = read_adapter("user/adapter").revision
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with fault("no network, and the adapter in the cache"):
        found = read_adapter("user/adapter", commit)
        base = load_model(str(BASE), load_in_4bit=False)
        assert model_record(base, "a/b", None, "user/adapter", found.revision)["adapter_revision"] == commit


def test_a_failed_download_is_not_a_pickle(fault):
    with fault("a weights file that cannot be read"), pytest.raises(ModelError, match="cannot be loaded: .*denied"):
        with loading("a/b"):
            raise PermissionError(13, "Permission denied", "/m/model.safetensors")


def test_a_package_that_a_model_needs_and_is_not_there_is_said_in_a_line():
    with pytest.raises(ModelError, match=r"loaded \(ImportError\): AProcessor requires the timm library$"):
        with loading("a/b"):
            raise ImportError("\nAProcessor requires the timm library\nand so on")


def test_conversions_are_off_for_the_call_alone(monkeypatch, tmp_path):
    """The variable is as it was after a load that worked and after one that failed; while it runs, it is set."""
    name = "DISABLE_SAFETENSORS_CONVERSION"
    seen = []

    class Kind:
        @staticmethod
        def from_pretrained(*args, **options):
            seen.append(os.environ[name])
            raise OSError("stop here")

    (tmp_path / "config.json").write_text("{}")
    for before in (None, "0"):
        monkeypatch.delenv(name, raising=False)
        if before:
            monkeypatch.setenv(name, before)
        load_gpt2(str(MINIATURES / "gpt2"))
        assert os.environ.get(name) == before
        with pytest.raises(ModelError, match="stop here"):
            load_weights(Kind, str(tmp_path), None)
        assert os.environ.get(name) == before
    assert seen == ["1", "1"]


def test_pickles_on_the_hub(on_hub, fault, mark, tmp_path):
    api, folder = on_hub
    torch.save({"weight": Touch(mark)}, tmp_path / "weights.bin")
    for name, safe, pickled in (
        ("user/base", "model.safetensors", "pytorch_model.bin"),
        ("user/adapter", WEIGHTS, "adapter_model.bin"),
    ):
        api.upload_file(path_or_fileobj=tmp_path / "weights.bin", path_in_repo=pickled, repo_id=name)
        api.delete_file(safe, name)
    with fault("a base in pickles on the Hub"):
        with pytest.raises(ModelError, match="user/base has no weights in safetensors"):
            resolve_revision("user/base", None)
        with pytest.raises(ModelError, match="user/base has no weights in safetensors"):
            load_model("user/base", load_in_4bit=False)
        with pytest.raises(ModelError, match="user/base has no weights in safetensors"):
            load_model("user/base", "main", load_in_4bit=False)  # by this name transformers looks for conversions
    with fault("an adapter in pickles on the Hub"), pytest.raises(ModelError, match="user/adapter has no weights in"):
        read_adapter("user/adapter")


def test_a_conversion_by_the_hubs_bot_is_loaded(hub, on_hub, fault, capsys):
    """Weights alone may be new in it: who can open a pull request is anybody."""
    api, _ = on_hub
    weights = hub.blobs.read(hub.repos["models", "user/base"].at("main").files["model.safetensors"])
    api.upload_file(path_or_fileobj=b"a pickle", path_in_repo="pytorch_model.bin", repo_id="user/base")
    pickled = api.delete_file("model.safetensors", "user/base").oid
    requests = hub.repos["models", "user/base"].requests

    def converts(author: str, **files: bytes) -> str:
        added = [CommitOperationAdd(path, data) for path, data in {"model.safetensors": weights, **files}.items()]
        commit = api.create_commit("user/base", added, commit_message="Adding safetensors", create_pr=True).oid
        requests[-1]["author"]["name"] = author
        return commit

    converts("somebody")
    converts("SFconvertbot", **{"config.json": b"{}"})
    converts("SFconvertbot", **{"pytorch_model.bin": b"another pickle"})
    converts("SFconvertbot", **{"modeling.py": b"import os"})
    converts("SFconvertbot")
    requests[-1]["status"] = "closed"
    with fault("conversions by others, or of something else"):
        for revision in (None, "main"):
            with pytest.raises(ModelError, match="user/base has no weights in safetensors"):
                resolve_revision("user/base", revision)
    converted = converts("SFconvertbot")
    api.upload_file(path_or_fileobj=b"# Card", path_in_repo="README.md", repo_id="user/base")
    main = api.model_info("user/base").sha
    with fault("pickles that the Hub's bot has converted"):
        assert resolve_revision("user/base", None) == converted
        said = capsys.readouterr().err
        assert f"user/base: {main} has pickles alone" in said and f"conversion to safetensors is {converted}" in said
        assert load_model("user/base", converted, load_in_4bit=False).num_parameters()
    with fault("pickles, asked for by their commit"), pytest.raises(ModelError, match="has no weights in safetensors"):
        load_model("user/base", pickled, load_in_4bit=False)
    hub.fail(method="GET", path="/discussions", status=403)
    with fault("closed discussions"), pytest.raises(ModelError, match="user/base has no weights in safetensors"):
        resolve_revision("user/base", None)
    hub.fail(method="GET", path="/discussions", status=500, times=99)
    with fault("a Hub that fails"), pytest.raises(ModelError, match="could not be asked for it"):
        resolve_revision("user/base", None)


def test_what_the_hub_says_is_told_apart(hub, fault, capsys, monkeypatch):
    HfApi().create_repo("user/base")
    commit = HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="user/base").oid
    assert resolve_revision("user/base", None) == commit
    assert f"user/base: no revision is given; the main branch is at {commit}" in capsys.readouterr().err
    assert resolve_revision("user/base", "main") == resolve_revision("user/base", commit) == commit
    assert not capsys.readouterr().err
    for load in (resolve_revision, read_adapter):
        with (
            fault("no such repository"),
            pytest.raises(ModelError, match="user/none is not a folder, and the Hub does not"),
        ):
            load("user/none", None)
        with fault("no such revision"), pytest.raises(ModelError, match="not at revision v9"):
            load("user/base", "v9")
        with fault("no name of a repository"), pytest.raises(ModelError, match="is not a folder, and the Hub does"):
            load("a/b/c", None)
    with pytest.raises(ModelError, match="user/base is not an adapter: it has no adapter_config.json"):
        read_adapter("user/base")
    hub.fail(method="GET", path="/api/models/", status=429, times=99)
    with (
        fault("too many requests"),
        pytest.raises(ModelError, match="could not be asked for it .*try again later"),
    ):
        resolve_revision("user/base", None)
    hub.faults.clear()
    gone = HfApi(endpoint="http://127.0.0.1:9")
    monkeypatch.setattr("vlmcap.models.load.HfApi", lambda: gone)
    with fault("the Hub is away"), pytest.raises(ModelError, match="could not be asked for it .*try again later"):
        resolve_revision("user/base", None)


def test_the_script_refuses_before_it_loads(copy, run_script, fault, tmp_path):
    folder = copy("qwen2_vl")
    changed(lambda t: t.pop(A_TENSOR))(folder / WEIGHTS)
    options = ["--dataset", "nowhere", "--output", tmp_path / "predictions.jsonl"]
    with fault("--adapter of a stranger"):
        done = run_script("infer_baseline.py", "--model", BASE, "--adapter", folder, *options, expect=1)
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: adapter ") and last.endswith(f"it has no tensor {A_TENSOR}")
        assert "Loading weights" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch planted') }}",
        "{% include '/etc/passwd' %}",
        "{% for",
    ],
)
def test_chat_templates_run_in_a_sandbox(template, copy, fault):
    folder = copy("qwen2_vl")
    (folder / "chat_template.jinja").write_text(template)
    processor = load_processor(str(folder))
    with fault("a chat template that reaches for Python"), pytest.raises(ModelError) as raised:
        chat_prompt(processor, "Describe this image.")
    assert str(raised.value).startswith(f"the chat template of {folder} fails: ")


TABLE = """\
# Kept.
models:
  one:
    id: user/base        # kept
    revision: null       # kept too
  coded:
    id: user/coded
    revision: null
    remote_code: true
  gone:
    id: user/gone
    revision: null
"""


pin_revisions = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts/pin_revisions.py"))["pin_revisions"]


def test_pins_are_written_into_the_file(hub, tmp_path):
    for name in ("user/base", "user/coded"):
        HfApi().create_repo(name)
    commit = HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="user/base").oid
    table, recipe = tmp_path / "table.yaml", tmp_path / "recipe.yaml"
    table.write_text(TABLE)
    recipe.write_text("encoder_name_or_path: user/base\nencoder_revision: null # why\ndecoder_revision: null\n")
    said = [*pin_revisions(table), *pin_revisions(recipe)]
    assert table.read_text() == TABLE.replace("revision: null       # kept", f"revision: {commit}       # kept")
    assert recipe.read_text() == (
        f"encoder_name_or_path: user/base\nencoder_revision: {commit} # why\ndecoder_revision: null\n"
    )
    assert said[0] == said[-1] == f"user/base: {commit}" and said[1].startswith("user/coded: runs its own code")
    assert said[2].startswith("user/gone: user/gone is not a folder, and the Hub does not have it")
    with pytest.raises(ModelError, match="table.yaml cannot be read as YAML"):
        table.write_text("models: {")
        pin_revisions(table)


def test_models_of_the_configurations_are_pinned(hub, repo_root, tmp_path):
    """Except for those whose own code nobody has read, and BLIP, whose main branch is not a commit to load."""
    shutil.copytree(repo_root / "recipes/configs", tmp_path / "configs")
    said = {line.split(": ")[0]: line for path in tmp_path.rglob("*.yaml") for line in pin_revisions(path)}
    left = {name for name, line in said.items() if "runs its own code" not in line}
    assert left == {"Salesforce/blip-image-captioning-base"} and len(said) == 5


MODELS = {"AutoModel", "BlipForConditionalGeneration", "ViTModel", "VisionEncoderDecoderModel", "LlavaGpt2ForCausalLM"}


FORBIDDEN = {"weights_only": False, "use_safetensors": False, "trust_remote_code": True}


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            yield node, owner.id if isinstance(owner, ast.Name) else "", node.func.attr


@pytest.mark.parametrize("folder", ["recipes", "scripts"])
def test_no_code_goes_round_it(repo_root, folder):
    """No pickle is read, no YAML loaded unsafely, no Auto class left to ask whether code may run."""
    wrong = []
    for path in sorted((repo_root / folder).rglob("*.py")):
        for node, owner, name in calls(ast.parse(path.read_text(encoding="utf-8"))):
            given = {keyword.arg or getattr(keyword.value, "id", None) for keyword in node.keywords}
            unsafe = (owner, name) in {("pickle", "load"), ("pickle", "loads"), ("yaml", "unsafe_load")}
            unsafe |= any(
                isinstance(keyword.value, ast.Constant) and FORBIDDEN.get(keyword.arg, ...) is keyword.value.value
                for keyword in node.keywords
            )
            unsafe |= (owner, name) == ("torch", "load") and "weights_only" not in given
            if name == "from_pretrained":
                unsafe |= owner.startswith("Auto") and not {"trust_remote_code", "pinned"} & given
                unsafe |= owner in MODELS and "use_safetensors" not in given
            if unsafe:
                wrong.append(f"{path.relative_to(repo_root)}:{node.lineno} {owner}.{name}")
    assert not wrong
