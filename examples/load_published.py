from transformers import AutoModelForImageTextToText, AutoProcessor

name, commit = "your-name/llava-v1.6-mistral-7b-hivtp", "0000000000000000000000000000000000000000"
model = AutoModelForImageTextToText.from_pretrained(name, revision=commit, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, revision=commit, trust_remote_code=True)
