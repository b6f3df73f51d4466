from hivtp_hf import HIVTPLlavaNextConfig, HIVTPLlavaNextProcessor

stock, mine = "llava-hf/llava-v1.6-mistral-7b-hf", "your-name/llava-v1.6-mistral-7b-hivtp"
config = HIVTPLlavaNextConfig.from_base_model(stock, pruning_config={"retention_ratio": 0.25})
config.push_to_hub(mine)
HIVTPLlavaNextProcessor.from_pretrained(stock, pruning_config=config.pruning_config).push_to_hub(mine)
