from PIL import Image

from hivtp_hf import HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextProcessor

checkpoint = "examples/shapes_vqa/shapes-llava-next"
model = HIVTPLlavaNextForConditionalGeneration.from_pretrained(checkpoint)
processor = HIVTPLlavaNextProcessor.from_pretrained(checkpoint)
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the square?"}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
image = Image.open("examples/shapes_vqa/scene.png")
for ratio in (1.0, 1 / 2, 2 / 9):
    inputs = processor(images=image, text=prompt, return_tensors="pt", retention_ratio=ratio)
    length = inputs.input_ids.shape[1]
    output = model.generate(**inputs, max_new_tokens=5)[0, length:]
    print(length, "tokens:", processor.decode(output, skip_special_tokens=True))
