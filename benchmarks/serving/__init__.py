"""Requests a second of `vllm serve`, stock beside pruned: python -m benchmarks.serving --help"""
