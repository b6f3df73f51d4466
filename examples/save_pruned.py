from hivtp_hf import HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextProcessor

stock = "llava-hf/llava-v1.6-mistral-7b-hf"
pruning = {"retention_ratio": 2 / 9}
for part in (HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextProcessor):
    part.from_pretrained(stock, pruning_config=pruning).save_pretrained("llava-v1.6-mistral-7b-hivtp")
