"""Japanese Stable VLM (Stability AI): code in the model's repository, transformers 4.45; gated.

Never run with the real weights. The format of the prompt is that of the card's task "caption". Unverified: that
`generate` returns the caption without the prompt.
"""

from loading import about, device_and_dtype, open_png, search_settings
from protocol import serve

FORMAT = (
    "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。要求を適切に満たす応答を書きなさい。"
    "\n\n### 指示: \n{}\n\n### 応答: \n"
)


def load(header):
    import torch
    from transformers import AutoImageProcessor, AutoModelForVision2Seq, AutoTokenizer

    name = header["model"]
    pinned = {"revision": header["revision"], "trust_remote_code": header["trust_remote_code"]}
    device, dtype = device_and_dtype()
    pictures = AutoImageProcessor.from_pretrained(name, **pinned)
    tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
    model = AutoModelForVision2Seq.from_pretrained(name, torch_dtype=dtype, use_safetensors=True, **pinned)
    model = model.to(device).eval()

    @torch.inference_mode()
    def caption(png, prompt):
        inputs = pictures(images=open_png(png), return_tensors="pt")
        inputs.update(tokenizer(FORMAT.format(prompt), add_special_tokens=False, return_tensors="pt"))
        output = model.generate(**inputs.to(device, dtype), **search_settings(header["decoding"]))
        return tokenizer.decode(output[0], skip_special_tokens=True).split("### 応答:")[-1].strip()

    return caption, about(model)


if __name__ == "__main__":
    serve(load)
