"""Benchmarks of hivtp_hf, run from a clone. `benchmarks/README.md` says how and what for."""
