import torch

from hivtp_hf import PruningMethod, VisualTokenPruningConfig, register_method


@register_method
class TopRows(PruningMethod):
    name = "top_rows"
    rule = "the first cells in raster order"

    def select(self, evidence, pruning):  # what a method may look at, for all views of one shape at once
        cells = evidence.valid.flatten(1)
        totals = torch.tensor(evidence.totals, device=cells.device)
        return (cells & (cells.cumsum(1) <= totals[:, None])).view_as(evidence.valid)


print(VisualTokenPruningConfig(method="top_rows", retention_ratio=0.25))
