"""Files and folders that appear whole or not at all. Never travels with checkpoints."""

from .staged_folders import staged_folder
from .whole_files import read_json, write_json, write_whole

__all__ = ["read_json", "staged_folder", "write_json", "write_whole"]
