from PIL import Image

import hivtp_hf

checkpoint = "examples/shapes_vqa/shapes-llava-next"
model = hivtp_hf.HIVTPLlavaNextForConditionalGeneration.from_pretrained(checkpoint)
processor = hivtp_hf.HIVTPLlavaNextProcessor.from_pretrained(checkpoint)
image = Image.open("examples/shapes_vqa/scene.png")  # about 30 of your own, with a question each, in earnest
samples = [(image, "What colour is the square?"), (image, "How many triangles are there?")]
tuning = hivtp_hf.tune(model, processor, samples, ratio=1 / 9, method="hivtp", trials=12)
model.config.pruning_config = processor.pruning_config = tuning.settings
print(tuning.settings)
