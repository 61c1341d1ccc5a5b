"""InternVL 1.5 to 3 (arXiv 2404.16821, 2412.05271, 2504.10479) in OpenGVLab's files, of model_type "internvl_chat".

Tensor names follow the published safetensors files; the decoder's are those of its own family after "language_model.".
The format of transformers is in families/vlms/internvl.py.
"""

import json
from dataclasses import replace
from typing import Any

from mllm_jax.common.fields import FieldError, count, flag, inside, nullable, number, only, read, section, word
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.data.vision.tiles import Tiles
from mllm_jax.families.decoders import by_model_type, internlm2, llama, qwen2
from mllm_jax.families.shared.rows import layer_norm, linear
from mllm_jax.families.shared.suggestions import unsupported
from mllm_jax.families.towers.in_vlms import INTERN
from mllm_jax.families.towers.tower import Tower, block, joint_attention, patches, plain_mlp
from mllm_jax.families.vlms import internvl
from mllm_jax.families.vlms.internvl import features_of, merge_of
from mllm_jax.families.vlms.llava import feature_layers, features_to_hf
from mllm_jax.model.connectors.pixel_shuffle import PixelShuffleConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.vlm import InputRules, ModelConfig, VisionTokenIds
from mllm_jax.weights.table import Row

DECODERS = ("llama", "internlm2", "phi3", "qwen2")  # supported by OpenGVLab's code
ARCHITECTURES = {kind: by_model_type.TEXT[kind].architectures[kind] for kind in DECODERS}
AFTER_IMAGE = 7  # training appends nine tokens to the vocabulary; the third is <IMG_CONTEXT>


def _rows(encoder: VitConfig, prefix: str) -> list[Row]:
    layer = f"{prefix}encoder.layers.{{n}}"
    return [
        Row("encoder/class_token", f"{prefix}embeddings.class_embedding", "1 1 d -> d"),
        *patches(encoder, f"{prefix}embeddings.patch_embedding"),
        Row("encoder/position_embed", f"{prefix}embeddings.position_embedding", "1 p d -> p d"),
        *joint_attention(f"{layer}.attn.qkv"),
        Row("encoder/layers/attention/q_norm/scale", f"{layer}.attn.q_norm.weight"),
        Row("encoder/layers/attention/k_norm/scale", f"{layer}.attn.k_norm.weight"),
        *block(layer, "attn.proj", ("norm1", "norm2")),
        *plain_mlp(f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"),
        Row("encoder/layers/scale1", f"{layer}.ls1"),
        Row("encoder/layers/scale2", f"{layer}.ls2"),
    ]


TOWER = Tower(
    "intern_vit_6b",  # also the model_type of the 300M
    INTERN.sizes["6b-224"],
    _rows,
    said={
        "qkv_bias": ("qkv_bias", None),
        "qk_normalization": ("qk_norm", None),
        "norm_type": ("norm", {"layer_norm": "layer", "rms_norm": "rms"}),
        "initializer_factor": ("layer_scale", None),
    },
)


def _size(tower: str, decoder: DecoderConfig, vocab: int, chat: str) -> ModelConfig:
    return ModelConfig(
        INTERN.sizes[tower],
        PixelShuffleConfig(),
        replace(decoder, vocab=vocab, tie_embeddings=False),
        VisionTokenIds(vocab - AFTER_IMAGE),
        family="internvl_chat",
        inputs=InputRules(tiles=(1, 12), chat=chat),
    )


# Vocabulary sizes with the nine tokens that training adds; Yi's vocabulary already has two of them.
_INTERNLM2, _QWEN2, _QWEN2_5, _YI, _LLAMA3 = 92553, 151655, 151674, 64007, 128265
SIZES = {
    "1.5-26b": _size("6b", internlm2.SIZES["20b"], _INTERNLM2, "internlm2-chat"),
    "2-1b": _size("300m", qwen2.SIZES["0.5b"], _QWEN2, "Hermes-2"),
    "2-2b": _size("300m", internlm2.SIZES["1.8b"], _INTERNLM2, "internlm2-chat"),
    "2-8b": _size("300m", internlm2.SIZES["7b"], _INTERNLM2, "internlm2-chat"),
    "2-26b": _size("6b", internlm2.SIZES["20b"], _INTERNLM2, "internlm2-chat"),
    "2-40b": _size("6b", llama.SIZES["yi-34b"], _YI, "Hermes-2"),
    "2-76b": _size("6b", llama.SIZES["3-70b"], _LLAMA3, "internlm2-chat"),
    "2.5-1b": _size("300m", qwen2.SIZES["2.5-0.5b"], _QWEN2_5, "internvl2_5"),
    "2.5-2b": _size("300m", internlm2.SIZES["1.8b"], _INTERNLM2, "internvl2_5"),
    "2.5-4b": _size("300m", qwen2.SIZES["2.5-3b"], _QWEN2_5, "internvl2_5"),
    "2.5-8b": _size("300m", internlm2.SIZES["7b"], _INTERNLM2, "internvl2_5"),
    "2.5-26b": _size("6b", internlm2.SIZES["20b"], _INTERNLM2, "internvl2_5"),
    "2.5-38b": _size("6b", qwen2.SIZES["2.5-32b"], _QWEN2_5, "internvl2_5"),
    "2.5-78b": _size("6b", qwen2.SIZES["2.5-72b"], _QWEN2_5, "internvl2_5"),
    **{
        name: replace(config, family="internvl_chat", inputs=InputRules(tiles=(1, 12), chat="internvl2_5"))
        for name, config in internvl.SIZES.items()
    },
}


FIELDS = {
    "llm_config": section(),
    "vision_config": section(),
    "ps_version": word("v1"),
    "dynamic_image_size": flag(False),
    "use_thumbnail": flag(False),
    "pad2square": only(False),
    "use_backbone_lora": only(0),
    "use_llm_lora": only(0),
    "select_layer": feature_layers(-1),
    "force_image_size": nullable(count(None)),
    "downsample_ratio": number(0.5, 0.01, 1),
    "img_context_token_id": nullable(count(None, low=0)),
    "min_dynamic_patch": count(1, high=1000),
    "max_dynamic_patch": count(6, high=1000),
    "template": nullable(word(""), ""),
}


_SYSTEM_1_5 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


def _template(first: str, system: str, head: str, tail: str, end: str) -> str:
    """Returns a chat template in jinja2.

    Args:
      first: text before all turns.
      system: system message of a conversation without one.
      head, tail: texts before and after the role at the start of each turn.
      end: text at the end of each turn.
    """
    start, answer = f"{head}{{{{ message.role }}}}{tail}", f"{head}assistant{tail}"
    return (
        f"{first}{{% if messages[0].role != 'system' %}}{head}system{tail}{system}{end}{{% endif %}}"
        f"{{% for message in messages %}}{start}"
        "{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for item in message.content %}"
        "{{ item.text if item.type == 'text' else '<IMG_CONTEXT>\n' }}"
        f"{{% endfor %}}{{% endif %}}{{{{ '{end}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{answer}' }}}}{{% endif %}}"
    )


_CHATML, _PHI = ("<|im_start|>", "\n"), ("<|", "|>\n")
CHATS = {  # (template, end of a turn) by `template` in config.json
    "Hermes-2": (_template("", _SYSTEM_1_5, *_CHATML, "<|im_end|>"), "<|im_end|>"),
    "internlm2-chat": (_template("{{ bos_token }}", _SYSTEM_1_5, *_CHATML, "<|im_end|>"), "<|im_end|>"),
    "phi3-chat": (_template("", _SYSTEM_1_5, *_PHI, "<|end|>"), "<|end|>"),
    "internvl2_5": (_template("{{ bos_token }}", _SYSTEM_2_5, *_CHATML, "<|im_end|>\n"), "<|im_end|>"),
}


class InternvlChat(internvl.Internvl):
    name = "InternVL"
    architectures = {"internvl_chat": "InternVLChatModel"}
    sizes = SIZES
    rename = ()
    modules = ()
    spec = replace(internvl.SPEC, video_token=internvl.SPEC.image_token)  # the tokenizer has no video token

    def from_hf(self, config: dict) -> ModelConfig:
        """Reads a config.json. Raises ValueError for an unsupported value.

        Published files do not contain the image token: it is `vocab - AFTER_IMAGE`. Files that we write set it in
        `img_context_token_id`.
        """
        fields = read(config, FIELDS)
        for name, required in (("ps_version", "v2"), ("dynamic_image_size", True), ("use_thumbnail", True)):
            if fields[name] != required:
                raise FieldError(name, f"must be {json.dumps(required)}, as in InternVL 1.5 and later.", fields[name])
        with inside("vision_config"):
            encoder = features_of(TOWER.from_hf(fields["vision_config"]), fields["select_layer"])
        with inside("llm_config"):
            decoder = by_model_type.decoder_from_hf(fields["llm_config"])
        side = encoder.position_grid * encoder.patch_size
        if fields["force_image_size"] not in (None, side):
            raise FieldError("force_image_size", f"must be the tower's {side}.", fields["force_image_size"])
        image, tiles = fields["img_context_token_id"], (fields["min_dynamic_patch"], fields["max_dynamic_patch"])
        return ModelConfig(
            encoder,
            PixelShuffleConfig(merge_of(fields)),
            decoder,
            VisionTokenIds(decoder.vocab - AFTER_IMAGE if image is None else image),
            family="internvl_chat",
            inputs=InputRules(tiles=tiles, chat=fields["template"]),
        )

    def fields_to_hf(self, config: ModelConfig) -> dict:
        encoder, decoder = config.encoder, by_model_type.decoder_to_hf(config.decoder)
        if decoder["model_type"] not in ARCHITECTURES:
            raise ValueError(
                f"decoder model_type={decoder['model_type']!r}: not supported in OpenGVLab's files. "
                f"Choose one of {', '.join(ARCHITECTURES)}."
            )
        low, high = config.inputs.tiles
        return {
            "model_type": "internvl_chat",
            "downsample_ratio": 1 / config.connector.merge,
            "dynamic_image_size": True,
            "force_image_size": encoder.position_grid * encoder.patch_size,
            "img_context_token_id": config.tokens.image,
            "llm_config": {"architectures": [ARCHITECTURES[decoder["model_type"]]], **decoder},
            "max_dynamic_patch": high,
            "min_dynamic_patch": low,
            "pad2square": False,
            "ps_version": "v2",
            "select_layer": features_to_hf(encoder.features) if encoder.features else -1,
            "template": config.inputs.chat,
            "tie_word_embeddings": config.decoder.tie_embeddings,
            "use_backbone_lora": 0,
            "use_llm_lora": 0,
            "use_thumbnail": True,
            "vision_config": {"architectures": ["InternVisionModel"], **TOWER.to_hf(encoder)},
        }

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        tiles = config.inputs.tiles or (1, 12)
        return super().to_hf(replace(config, inputs=replace(config.inputs, tiles=tiles)))

    def weights(self, config: ModelConfig) -> list[Row]:
        return [
            *TOWER.rows(config.encoder, "vision_model."),
            *layer_norm("connector/norm", "mlp1.0"),
            *linear("connector/mlp/up", "mlp1.1", "o i -> i o", ""),
            *linear("connector/mlp/down", "mlp1.3", "o i -> i o", ""),
            *by_model_type.whole_weights(config.decoder, "language_model."),
        ]

    def rule(self, config: ModelConfig) -> Tiles:
        return Tiles(config.encoder.side, *config.inputs.tiles)  # from config.json

    def processor_spec(self, config: ModelConfig) -> ProcessorSpec:
        """Returns the processor spec with the model's chat template. Raises ValueError for an unknown template."""
        if config.inputs.chat not in CHATS:
            raise unsupported("template", config.inputs.chat, CHATS)
        template, end = CHATS[config.inputs.chat]
        return replace(super().processor_spec(config), template=template, end_of_turn=end)
