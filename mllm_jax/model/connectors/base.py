"""The base of connector configs: how many visual tokens a connector makes, and what they cost."""

from mllm_jax.common.settings import Config


class ConnectorConfig(Config):
    """A connector makes one visual token of every merge x merge patches, or `queries` of every image.

    merge: side of the square of patches that becomes a visual token. 1: every patch is one.
    queries: visual tokens of an image, whatever its size. 0: they are made of squares of patches.
    """

    merge = 1
    queries = 0

    @property
    def patches_per_token(self) -> int:
        return self.merge**2

    def num_tokens(self, patches: float, images: float) -> float:
        """Returns the number of visual tokens of images with this many patches together."""
        return images * self.queries if self.queries else patches / self.patches_per_token

    def weight_rows(self, path: str, patches: float, images: float) -> float:
        """Returns the number of rows that the weight at `path` multiplies, such as "layers/mlp/up/w"."""
        del path
        return self.num_tokens(patches, images)

    def attention_flops(self, patches: float, images: float) -> float:
        """Returns the FLOPs of the connector's attention, forward. Here: it has none."""
        del patches, images
        return 0.0
