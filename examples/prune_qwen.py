from PIL import Image

from hivtp_hf import HIVTPQwen2_5_VLForConditionalGeneration, HIVTPQwen2_5_VLProcessor

stock = "Qwen/Qwen2.5-VL-7B-Instruct"
pruning = {"method": "hivtp", "token_budget": 300}  # at most 300 tokens for any photograph
model = HIVTPQwen2_5_VLForConditionalGeneration.from_pretrained(stock, pruning_config=pruning, device_map="auto")
processor = HIVTPQwen2_5_VLProcessor.from_pretrained(stock, pruning_config=pruning)
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=Image.open("photo.jpg"), text=prompt, return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=20)
print(inputs.input_ids.shape[1], "tokens:", processor.decode(output[0], skip_special_tokens=True))
