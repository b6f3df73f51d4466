"""The models that can be trained, by their names."""

from .llava_next_model import LlavaNextReference
from .qwen_model import Qwen2_5_VLReference
from .reference_model import ReferenceModel

REFERENCES: dict[str, ReferenceModel] = {one.name: one for one in (LlavaNextReference(), Qwen2_5_VLReference())}
