"""The interface of a family of published models; `FAMILIES` in `mllm_jax/families/__init__.py` lists all of them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from mllm_jax.common.fields import Json
from mllm_jax.common.trees import differences, in_words
from mllm_jax.data.pipeline.hf_inputs import Arrays, Supply
from mllm_jax.data.pipeline.spec import SEEING, ProcessorSpec
from mllm_jax.data.vision.resize import Rule, Whole
from mllm_jax.families.shared import rows
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.dual_encoder import DualConfig
from mllm_jax.model.vlm import ModelConfig
from mllm_jax.weights.table import Row

# Fields of a ModelConfig that no config.json contains: runtime, additions of training, and the family's name.
NOT_WRITTEN = ("runtime", "family", "value", "lora")
Renames = tuple[tuple[str, str], ...]


class Family(ABC):
    """Published models that share a config.json format and tensor names.

    Loading, saving, adapters, processors and the list of models use a family only through this interface. A subclass
    sets the attributes, implements `from_hf`, `fields_to_hf` and `weights`, and overrides the other methods where its
    models differ from the defaults. A family that reads images also sets `input_names` and implements `visuals`.

    name: name of the models in error messages.
    architectures: class name in transformers (or in the authors' code) by model_type of config.json.
    sizes: configs of the published sizes by name.
    ignore: regular expressions of tensors in files that the model does not use, beside buffers and tied heads.
    rename: (regular expression, replacement) pairs that map former tensor names to those of `weights`.
    modules: pairs that map the names of `weights` to transformers' module names, where they differ.
    input_names: names of the vision arrays of its Hugging Face processor.
    spec: settings of its processor that no config.json contains.
    """

    name: str
    architectures: Mapping[str, str]
    sizes: Mapping[str, ModelConfig | DualConfig]
    ignore: tuple[str, ...] = ()
    rename: Renames = ()
    modules: Renames = ()
    input_names: tuple[str, ...] = ()
    spec: ProcessorSpec = SEEING

    def config(self, size: str) -> Any:
        """Returns the config of a published size. Raises ValueError for a size that is not in `sizes`."""
        if size not in self.sizes:
            raise ValueError(f"{self.name} has no size {size!r}. Choose one of {', '.join(self.sizes)}.")
        return self.sizes[size]

    @abstractmethod
    def from_hf(self, config: Json) -> Any:
        """Reads a config.json whose model_type is in `architectures`. Raises ValueError for an unsupported value."""

    @abstractmethod
    def fields_to_hf(self, config: Any) -> dict[str, Any]:
        """Returns the config.json of a model, with its model_type and without "architectures"."""

    def to_hf(self, config: Any) -> dict[str, Any]:
        """Returns the config.json of a model. Raises ValueError if `from_hf` would not read the same model from it."""
        fields = self.fields_to_hf(config)
        fields = {"architectures": [self.architectures[fields["model_type"]]], **fields}
        check_read_back(self.name, config, self.from_hf(fields))
        return fields

    @abstractmethod
    def weights(self, config: Any) -> list[Row]:
        """Returns the weight table of a model; see `mllm_jax/weights/table.py`."""

    def tower_source(self, config: Json, names: Iterable[str]) -> str | None:
        """Returns the published model that contains the vision tower's weights. None: the model's own files do.

        Args:
          config: config.json.
          names: names of the tensors in the model's files.
        """
        return None

    def module_name(self, name: str) -> str:
        """Returns transformers' module name from a present or former tensor name in files."""
        for old, new in (*self.rename, *self.modules):
            name = re.sub(old, new, name)
        return name

    def visuals(self, config: Any, arrays: Arrays) -> Supply:
        """Returns the images and videos in the arrays of `input_names`, by their placeholder token."""
        raise NotImplementedError(f"{self.name} reads no images. Pass only text.")

    def rule(self, config: Any) -> Rule | None:
        """Returns the default resizing or tiling of images. None: images keep nearly their own size."""
        return None

    def video_rule(self, config: Any) -> Whole | None:
        """Returns the default resizing of video frames. None: frames keep nearly their own size."""
        return None

    def processor_spec(self, config: ModelConfig) -> ProcessorSpec:
        """Returns the processor spec of a model that reads images."""
        encoder, attention = config.encoder, config.decoder and config.decoder.attention
        sections = getattr(attention, "rope_theta", None) and getattr(attention, "rope_sections", (0,))[1:]
        return replace(
            self.spec,
            rule=self.rule(config),
            video_rule=self.video_rule(config),
            patch=encoder.patch_size,
            temporal_patch=encoder.temporal_patch_size,
            merge=config.merge,
            queries=config.queries,
            instruction_positions=config.connector.positions if config.reads_instructions else 0,
            num_prefix_tokens=config.num_prefix_tokens,
            shown=config.shown,
            mean=encoder.pixel_mean,
            std=encoder.pixel_std,
            position_rate=config.inputs.position_rate,
            on_a_grid=any(sections or ()),
            prefix=config.prefix,
            mixes=config.inputs.most_tiles > 0,
        )


class DecoderFamily(Family):
    """Text-only models, whose decoders may also be parts of multimodal models (`decoders/by_model_type.py`).

    decoders: decoders of the published sizes by name.
    """

    decoders: Mapping[str, DecoderConfig]
    rename = rows.BARE

    @cached_property
    def sizes(self) -> dict[str, ModelConfig]:
        return {name: self._model(decoder, self.model_type(decoder)) for name, decoder in self.decoders.items()}

    @staticmethod
    def _model(decoder: DecoderConfig, model_type: str) -> ModelConfig:
        return ModelConfig(None, None, decoder, family=model_type)

    def model_type(self, decoder: DecoderConfig) -> str:
        """Returns the model_type of a decoder's config.json. A family with several model_types overrides this."""
        (model_type,) = self.architectures
        return model_type

    @abstractmethod
    def decoder_from_hf(self, text: Json) -> DecoderConfig:
        """Reads a config.json or text_config, with its model_type. Raises ValueError for an unsupported value."""

    @abstractmethod
    def decoder_to_hf(self, decoder: DecoderConfig) -> dict[str, Any]:
        """Returns the text config of a decoder, without its model_type; the inverse of `decoder_from_hf`."""

    def decoder_weights(self, decoder: DecoderConfig, prefix: str = "model", head: str = "lm_head.weight") -> list[Row]:
        """Returns the weight table of a decoder.

        Args:
          prefix: prefix of all tensor names except the head's.
          head: tensor name of the head.
        """
        return rows.decoder(decoder, prefix, head)

    def from_hf(self, config: Json) -> ModelConfig:
        return self._model(self.decoder_from_hf(config), config["model_type"])

    def fields_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        fields = self.decoder_to_hf(config.decoder)
        return {"model_type": self.model_type(config.decoder), **fields}

    def weights(self, config: ModelConfig) -> list[Row]:
        return self.decoder_weights(config.decoder)


def check_read_back(name: str, written: Any, read: Any, path: str = "") -> None:
    """Raises ValueError, listing the fields that differ, if a saved config would load differently.

    Args:
      name: family or tower, for the message.
      written, read: the saved and the loaded config, of one type. Fields in NOT_WRITTEN are not compared.
      path: path of both in the model.
    """
    pairs = [(field, ours, theirs) for field, theirs, ours in differences(read, written, path=path)]
    changes = [(field, *map(in_words, values)) for field, *values in pairs if field.split(".")[0] not in NOT_WRITTEN]
    if changes:
        raise ValueError(
            f"{name}'s config.json cannot represent this model: saving "
            f"{', '.join(f'{field}={ours}' for field, ours, _ in changes)} would load as "
            f"{', '.join(f'{field}={theirs}' for field, _, theirs in changes)}. "
            f"Change these fields: {', '.join(field for field, *_ in changes)}."
        )
