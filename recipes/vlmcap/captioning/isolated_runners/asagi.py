"""Asagi (MIL-UT): LLaVA with code in the model's repository, transformers 4.45.

Experimental: it has never run with the real weights. The format of the prompt and the two-step tokenisation are those
of the model's card.
"""

from loading import about, device_and_dtype, inputs_of, load_whole, open_png, response, search_settings
from protocol import serve

START = "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。"
FORMAT = START + "\n\n### 指示:\n<image>\n{}\n\n### 応答:\n"


def load(header):
    import torch
    from transformers import AutoModel, AutoProcessor

    pinned = {"revision": header["revision"], "trust_remote_code": header["trust_remote_code"]}
    device, dtype = device_and_dtype()
    processor = AutoProcessor.from_pretrained(header["model"], **pinned)
    model = load_whole(AutoModel, header["model"], torch_dtype=dtype, **pinned).to(device)
    search = search_settings(header["decoding"], model, processor.tokenizer)

    @torch.inference_mode()
    def caption(png, prompt):
        text = FORMAT.format(prompt)
        pixels = processor(text=text, images=open_png(png), return_tensors="pt")["pixel_values"]
        # The tokens are the tokenizer's, as on the card, and not the processor's.
        encoded = {**processor.tokenizer(text, return_tensors="pt"), "pixel_values": pixels}
        output = model.generate(**inputs_of(encoded, device, dtype), **search)
        return response(processor.batch_decode(output, skip_special_tokens=True)[0], START)

    return caption, about(model)


if __name__ == "__main__":
    serve(load)
