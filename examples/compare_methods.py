import torch
from PIL import Image

from hivtp_hf import HIVTPLlavaForConditionalGeneration, HIVTPLlavaProcessor

stock = "llava-hf/llava-1.5-7b-hf"
model = HIVTPLlavaForConditionalGeneration.from_pretrained(stock, device_map="auto")
processor = HIVTPLlavaProcessor.from_pretrained(stock)
image = Image.open("photo.jpg")
for method in ("hivtp", "hiprune", "gprune", "vflowopt", "cls_attention", "random", "uniform"):
    pruning = {"method": method, "retention_ratio": 2 / 9}
    model.config.pruning_config = processor.pruning_config = pruning
    inputs = processor(images=image, text="<image>\nWhat is shown?", return_tensors="pt").to(model.device)
    with torch.no_grad():
        kept = model.get_image_features(inputs.pixel_values).kept_indices[0]
    print(method, len(kept), kept[:8].tolist())
