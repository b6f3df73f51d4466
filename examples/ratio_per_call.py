from PIL import Image

from hivtp_hf import HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextProcessor

stock = "llava-hf/llava-v1.6-mistral-7b-hf"
model = HIVTPLlavaNextForConditionalGeneration.from_pretrained(stock, device_map="auto")
processor = HIVTPLlavaNextProcessor.from_pretrained(stock)
image = Image.open("photo.jpg")
for budget in ({"retention_ratio": 0.5}, {"retention_ratio": 1 / 9}, {"token_budget": 300}):
    inputs = processor(images=image, text="<image>\nWhat is shown?", return_tensors="pt", **budget).to(model.device)
    output = model.generate(**inputs, max_new_tokens=20)
    print(budget, inputs.input_ids.shape[1], "tokens:", processor.decode(output[0], skip_special_tokens=True))
