"""What is kept of a stream of stock's, for oracles."""

import torch


def kept_rows(stock, pruned, output):
    """Of every image the rows of a stock stream that stay. Averages, which are a method's like its choice, are our model's own.

    Args:
        stock: of every image (num_stock, hidden).
        pruned: of every image what the pruned model makes of it, (num_retained, hidden).
        output: of its `get_image_features`.
    """
    averages = output.is_average or [torch.zeros_like(kept, dtype=torch.bool) for kept in output.kept_indices]
    return [
        torch.where(is_average[:, None], own, packed[kept])
        for packed, own, kept, is_average in zip(stock, pruned, output.kept_indices, averages, strict=True)
    ]
