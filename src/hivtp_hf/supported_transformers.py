"""Refuses transformers releases that would load these classes wrongly.

Remote code meets whatever release is installed. Weights saved by 5.6 or later load into an older one with a random vision
tower and no error, so the import itself must fail.
"""

import transformers

OLDEST_TRANSFORMERS = (5, 6)


def check_transformers_version(version: str) -> None:
    """ImportError for releases before 5.6, naming the installed one and the oldest that works."""
    major_minor = tuple(int(part) for part in version.split(".")[:2])
    if major_minor < OLDEST_TRANSFORMERS:
        raise ImportError(
            f"HIVTP checkpoints need transformers {'.'.join(map(str, OLDEST_TRANSFORMERS))} or later; {version} is installed. "
            'Run `pip install --upgrade "transformers>=5.6,<6"`.'
        )


check_transformers_version(transformers.__version__)
