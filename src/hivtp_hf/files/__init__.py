"""Files and folders that appear whole or not at all. Never travels with checkpoints."""

from .staged_folders import staged_folder
from .whole_files import write_whole

__all__ = ["staged_folder", "write_whole"]
