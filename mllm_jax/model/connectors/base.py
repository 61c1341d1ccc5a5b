"""The base of connector configs: how many visual tokens a connector makes, and what they cost."""

from typing import NamedTuple

from mllm_jax.common.settings import Config


class ImageCounts(NamedTuple):
    """Sizes of a connector's input."""

    patches: float
    images: float = 0.0  # for connectors with queries
    instruction_tokens: float = 0.0  # of all images together, for connectors that read instructions


class ConnectorConfig(Config):
    """A connector makes one visual token of every merge x merge patches, or `queries` of every image.

    merge: side in patches of the square that becomes a visual token. 1: every patch is one.
    queries: visual tokens of an image, whatever its size. 0: they are made of squares of patches.
    reads_instructions: whether the visual tokens of an image depend on a text.
    """

    merge = 1
    queries = 0
    reads_instructions = False

    @property
    def patches_per_token(self) -> int:
        return self.merge**2

    def num_tokens(self, patches: float, images: float) -> float:
        """Returns the number of visual tokens of images with this many patches together."""
        return images * self.queries if self.queries else patches / self.patches_per_token

    def weight_rows(self, path: str, counts: ImageCounts) -> float:
        """Returns the number of rows that the weight at `path` multiplies, such as "layers/mlp/up/w"."""
        del path
        return self.num_tokens(counts.patches, counts.images)

    def attention_flops(self, counts: ImageCounts) -> float:
        """Returns the FLOPs of the connector's attention, forward. Here: it has none."""
        del counts
        return 0.0
