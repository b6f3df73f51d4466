"""`Look`: one pass of a vision encoder over some images, with all that pruning methods read from it."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .evidence import EncoderFacts, Evidence, VisualEvidence, evidence_to_read
from .features import choose_and_merge, cut_and_merge_features, gather_evidence, importance_of_images
from .layout import TokenLayout
from .settings import VisualTokenPruningConfig


@dataclass(frozen=True)
class Look:
    """What `model.look` returns: features and attention of some images, and what any method makes of them.

    Settings that are asked about must read no other layers than the look had.

    Attributes:
        base: the base model that looked.
        arguments: of its call, by name.
        features: of every image the stock features as stock packs them, (num_stock, hidden).
        received: of the layers that were looked at, the attention that cells receive, float32 (cells of all images,), in the
            order of views.
        class_attention: the same of what the class token attends to; empty where the encoder has none.
        encoder: the vision encoder's depth, and the layer whose output is the visual feature.
        keys: of the layers that settings read the keys of cells, heads averaged, float32 (cells of all images, size).
        further_streams: by the names of `Family.streams` what else has a row for every token, such as DeepStack features: a
            list of layers, each of every image (num_stock, hidden); None for families without such.
        attention_rows: what some tokens attend to, the same by layer; by the settings that read it, as these say which tokens.
        grey_levels: uint8 (cells of all images, pixels of a cell), or None where no settings read pixels.
        encoded: of every view what the encoder says of its cells before the projector, (cells, hidden); None where the family
            does not tell.
    """

    base: Any
    arguments: Mapping[str, Any]
    features: Sequence[Tensor]
    received: Mapping[int, Tensor]
    class_attention: Mapping[int, Tensor]
    encoder: EncoderFacts
    attention_rows: Mapping[VisualTokenPruningConfig, Mapping[int, Tensor]]
    grey_levels: Tensor | None
    keys: Mapping[int, Tensor]
    further_streams: Mapping[str, Any] | None = None
    encoded: Sequence[Tensor] | None = None

    def layouts(self, pruning: Any = None) -> list[TokenLayout]:
        """How the tokens of every image lie, under some settings or under the model's own."""
        settings = self._settings(pruning)
        sizes = self.base.family.image_sizes(self.base, self.arguments)
        return [self.base.family.layout(self.base, size, settings, self.arguments) for size in sizes]

    def evidence(self, pruning: Any = None, layouts: Sequence[TokenLayout] | None = None) -> VisualEvidence:
        """What the method of some settings may look at: the scores that it reads, and no others, as some average over all.

        Args:
            pruning: the settings; the model's own unless given.
            layouts: of every image under these settings, where they are known.

        Raises:
            ValueError: where the settings read what was not looked at.
        """
        settings = self._settings(pruning)
        kinds = evidence_to_read(settings, self.base.provided_evidence) or frozenset()
        layers = settings.scored_layers(self.encoder)
        read = {
            Evidence.RECEIVED_ATTENTION: self.received,
            Evidence.CLASS_ATTENTION: self.class_attention,
            Evidence.KEYS: self.keys,
        }
        missing = [layer for kind, scores in read.items() for layer in layers if kind in kinds and layer not in scores]
        rows = self.attention_rows.get(settings, {}) if Evidence.ATTENTION_ROWS in kinds else {}
        if Evidence.ATTENTION_ROWS in kinds and not rows:
            missing = list(layers)
        if missing:
            raise ValueError(
                f"the method {settings.method!r} reads the encoder layers {list(layers)}, and {missing} were not looked at. "
                "Give `prunings` or `layers` to `look`."
            )
        layouts = self.layouts(settings) if layouts is None else layouts
        received, class_attention, keys = (
            {layer: scores[layer] for layer in layers if kind in kinds} for kind, scores in read.items()
        )
        grey_levels = self.grey_levels if Evidence.PIXELS in kinds else None
        encoded, projector = None, None
        if Evidence.ENCODED in kinds:
            encoded, projector = self.encoded, functools.partial(self.base.family.project, self.base)
        return gather_evidence(
            self.features, layouts, received, class_attention, self.encoder, rows, grey_levels, encoded, keys, projector
        )

    def kept(self, pruning: Any = None, layouts: Sequence[TokenLayout] | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """What a method keeps of every image: features (num_retained, hidden), and int64 positions in the packed sequence.

        Of a method that merges, some features are averages.
        """
        evidence = self.evidence(pruning, layouts)
        kept, merged = choose_and_merge(evidence)
        return cut_and_merge_features(evidence, kept, merged), kept

    def importance(self, pruning: Any = None, layouts: Sequence[TokenLayout] | None = None) -> Tensor | None:
        """The scores by which a method ranks, float (cells of all images,) in the order of views; None where it does not."""
        of_images = importance_of_images(self.evidence(pruning, layouts))
        return None if of_images is None else torch.cat(of_images)

    def _settings(self, pruning: Any) -> VisualTokenPruningConfig:
        return self.base.config.pruning_config if pruning is None else VisualTokenPruningConfig.coerce(pruning)
