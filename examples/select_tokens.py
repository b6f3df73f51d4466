import torch

from hivtp_hf import VisualTokenPruningConfig, select_hivtp

scores = torch.rand(5, 24, 24)  # importance of every cell of five tiles, from anywhere
valid = torch.ones(5, 24, 24, dtype=torch.bool)
kept = select_hivtp(scores, valid, VisualTokenPruningConfig())
print(kept.sum((1, 2)))  # 288 cells of each tile
