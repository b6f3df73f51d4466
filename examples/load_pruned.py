from transformers import pipeline

commit = "0000000000000000000000000000000000000000"  # the one whose code you have read
pipe = pipeline("image-text-to-text", model="your-name/qwen2.5-vl-7b-hivtp", revision=commit, trust_remote_code=True)
chat = [
    {"role": "user", "content": [{"type": "image", "image": "photo.jpg"}, {"type": "text", "text": "What is shown?"}]},
]
print(pipe(text=chat, max_new_tokens=50, return_full_text=False)[0]["generated_text"])
