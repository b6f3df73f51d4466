import torch
from PIL import Image

from hivtp_hf import HIVTPLlavaNextForConditionalGeneration, HIVTPLlavaNextProcessor
from hivtp_hf.figures import draw_kept_cells

stock = "llava-hf/llava-v1.6-mistral-7b-hf"
model = HIVTPLlavaNextForConditionalGeneration.from_pretrained(stock)
processor = HIVTPLlavaNextProcessor.from_pretrained(stock)
image = Image.open("photo.jpg")
inputs = processor(images=image, text="<image>", return_tensors="pt")
with torch.no_grad():
    features = model.model.get_image_features(inputs.pixel_values, inputs.image_sizes)
layout = processor.token_layout(image.height, image.width)
kept = features.kept_indices[0]  # ascending positions in the stock model's sequence, newlines included
print(layout.cells(kept)[:3])  # tile, row, column of the first kept cells
print(layout.pixel_boxes(kept)[:3])  # left, top, right, bottom in pixels of the photograph
draw_kept_cells(image, layout, kept).save("kept.png")
