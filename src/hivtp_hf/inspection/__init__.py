"""What a checkpoint's settings mean for images of some sizes. Never travels with checkpoints."""

from .checkpoint_report import EXAMPLE_SIZES, CheckpointReport, SizeReport, inspect_checkpoint
from .language_model_cost import kv_cache_bytes, prefill_flops

__all__ = ["EXAMPLE_SIZES", "CheckpointReport", "SizeReport", "inspect_checkpoint", "kv_cache_bytes", "prefill_flops"]
