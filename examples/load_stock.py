from PIL import Image

from hivtp_hf import HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextProcessor

stock = "llava-hf/llava-v1.6-mistral-7b-hf"
pruning = {"retention_ratio": 0.5}
model = HIVTPLlavaNextForConditionalGeneration.from_pretrained(stock, pruning_config=pruning, device_map="auto")
processor = HIVTPLlavaNextProcessor.from_pretrained(stock, pruning_config=model.config.pruning_config)
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=Image.open("photo.jpg"), text=prompt, return_tensors="pt").to(model.device)
print(processor.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
