"""What pruning saves in time and memory, and how far from its limit. `python -m benchmarks.speed --help`.

The results of committed runs lie in this folder, named by date and environment.
"""

import os

# Read when torch is loaded: its profiler, which counts memory on CPUs, else announces every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
