"""Models for lmms-eval, which finds them by the entry point that `manifests` answers."""
