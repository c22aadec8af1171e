"""Asagi (MIL-UT): LLaVA with code in the model's repository, transformers 4.45.

Never run with the real weights. The format of the prompt and the two-step tokenisation are those of the model's card.
Unverified: that `generate` returns the prompt before the caption (it is cut off by its text, as the card does).
"""

from loading import about, device_and_dtype, open_png, search_settings
from protocol import serve

FORMAT = (
    "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。\n\n### 指示:\n<image>\n{}\n\n### 応答:\n"
)


def load(header):
    import torch
    from transformers import AutoModel, AutoProcessor

    pinned = {"revision": header["revision"], "trust_remote_code": header["trust_remote_code"]}
    device, dtype = device_and_dtype()
    processor = AutoProcessor.from_pretrained(header["model"], **pinned)
    model = AutoModel.from_pretrained(header["model"], torch_dtype=dtype, use_safetensors=True, **pinned)
    model = model.to(device).eval()

    @torch.inference_mode()
    def caption(png, prompt):
        text = FORMAT.format(prompt)
        inputs = processor(text=text, images=open_png(png), return_tensors="pt")
        tokens = processor.tokenizer(text, return_tensors="pt")
        output = model.generate(
            pixel_values=inputs["pixel_values"].to(device, dtype),
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
            **search_settings(header["decoding"]),
        )
        return processor.batch_decode(output, skip_special_tokens=True)[0].split("### 応答:")[-1].strip()

    return caption, about(model)


if __name__ == "__main__":
    serve(load)
