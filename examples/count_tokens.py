from hivtp_hf import TokenLayout, VisualTokenPruningConfig

layout = TokenLayout.from_image_size(480, 640, VisualTokenPruningConfig(retention_ratio=2 / 9))
print(layout.num_stock, layout.num_retained, layout.num_newlines)  # 2340 548 36
