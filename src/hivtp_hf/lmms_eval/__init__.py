"""Models for lmms-eval, which finds them by the entry point that `manifests` answers. Nothing here travels with checkpoints."""
