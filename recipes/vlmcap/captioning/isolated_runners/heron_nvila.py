"""Heron-NVILA-Lite (Turing), the repository for transformers (-hf): code in the model's repository, a chat template.

Experimental: it has never run with the real weights. The steps follow the model's card, which asks for transformers
4.57.1.
"""

from loading import about, device_and_dtype, inputs_of, load_whole, open_png, search_settings
from protocol import serve


def load(header):
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    pinned = {"revision": header["revision"], "trust_remote_code": header["trust_remote_code"]}
    device, dtype = device_and_dtype()
    processor = AutoProcessor.from_pretrained(header["model"], **pinned)
    model = load_whole(AutoModelForImageTextToText, header["model"], torch_dtype=dtype, **pinned).to(device)
    search = search_settings(header["decoding"], model, processor.tokenizer)

    @torch.inference_mode()
    def caption(png, prompt):
        talk = [{"role": "user", "content": f"<image>\n{prompt}"}]
        text = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
        inputs = inputs_of(processor(text=text, images=[open_png(png)], return_tensors="pt"), device, dtype)
        output = model.generate(**inputs, **search)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return caption, about(model)


if __name__ == "__main__":
    serve(load)
