"""Sarashina2.2-Vision (SB Intuitions): code in the model's repository, a chat template, transformers 4.57.1; gated.

Experimental: it has never run with the real weights.
"""

from loading import about, device_and_dtype, inputs_of, load_whole, open_png, search_settings
from protocol import serve


def load(header):
    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor

    pinned = {"revision": header["revision"], "trust_remote_code": header["trust_remote_code"]}
    device, dtype = device_and_dtype()
    processor = AutoProcessor.from_pretrained(header["model"], **pinned)
    model = load_whole(AutoModelForCausalLM, header["model"], torch_dtype=dtype, **pinned).to(device)
    search = search_settings(header["decoding"], model, processor.tokenizer)

    @torch.inference_mode()
    def caption(png, prompt):
        image = open_png(png)
        message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}
        text = processor.apply_chat_template([message], add_generation_prompt=True)
        encoded = processor(text=[text], images=[image], padding=True, return_tensors="pt")
        inputs = inputs_of(encoded, device, dtype)
        output = model.generate(**inputs, **search)
        return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]

    return caption, about(model)


if __name__ == "__main__":
    serve(load)
