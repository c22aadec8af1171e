"""Japanese Stable VLM (Stability AI): code in the model's repository, transformers 4.45; gated.

Experimental: it has never run with the real weights. The format of the prompt is that of the card's task "caption".
"""

from loading import about, device_and_dtype, inputs_of, load_whole, open_png, response, search_settings
from protocol import serve

START = "以下は、タスクを説明する指示と、文脈のある入力の組み合わせです。要求を適切に満たす応答を書きなさい。"
FORMAT = START + "\n\n### 指示: \n{}\n\n### 応答: \n"


def load(header):
    import torch
    from transformers import AutoImageProcessor, AutoModelForVision2Seq, AutoTokenizer

    name = header["model"]
    pinned = {"revision": header["revision"], "trust_remote_code": header["trust_remote_code"]}
    device, dtype = device_and_dtype()
    pictures = AutoImageProcessor.from_pretrained(name, **pinned)
    tokenizer = AutoTokenizer.from_pretrained(name, **pinned)
    model = load_whole(AutoModelForVision2Seq, name, torch_dtype=dtype, **pinned).to(device)
    search = search_settings(header["decoding"], model, tokenizer)

    @torch.inference_mode()
    def caption(png, prompt):
        tokens = tokenizer(FORMAT.format(prompt), add_special_tokens=False, return_tensors="pt")
        encoded = {**pictures(images=open_png(png), return_tensors="pt"), **tokens}
        output = model.generate(**inputs_of(encoded, device, dtype), **search)
        return response(tokenizer.decode(output[0], skip_special_tokens=True), START)

    return caption, about(model)


if __name__ == "__main__":
    serve(load)
