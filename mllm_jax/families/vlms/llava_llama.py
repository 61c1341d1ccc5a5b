"""LLaVA 1.0, 1.5 and NeXT (arXiv 2304.08485, 2310.03744) in their authors' files (haotian-liu/LLaVA).

Tensor names follow these files; the decoder's are those of its own family. config.json names the vision tower, whose
weights only NeXT's files contain; otherwise `mllm_jax.load_pretrained` reads them from the tower's own files. The image
token is IMAGE, which is not in the vocabulary. The format of transformers is in families/vlms/llava.py.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mllm_jax.common.fields import FieldError, Json, nullable, only, read, word
from mllm_jax.data.pipeline.spec import ProcessorSpec
from mllm_jax.families.decoders import by_model_type, llama, mistral
from mllm_jax.families.shared.rows import linear
from mllm_jax.families.shared.suggestions import unsupported
from mllm_jax.families.towers.in_vlms import CLIP
from mllm_jax.families.vlms import llava
from mllm_jax.model.connectors.mlp import MlpConnectorConfig
from mllm_jax.model.decoder import DecoderConfig
from mllm_jax.model.vlm import InputRules, ModelConfig, VisionTokenIds
from mllm_jax.weights.table import Row

IMAGE = -200  # llava/constants.py
DECODERS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}  # by model_type
ARCHITECTURES = {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM"}
TOWERS = {"clip-vit-large-patch14": CLIP.sizes["l14"], "clip-vit-large-patch14-336": CLIP.sizes["l14-336"]}


def _size(tower: str, layers: int, decoder: DecoderConfig, inputs: InputRules) -> ModelConfig:
    return ModelConfig(
        replace(TOWERS[tower], features=(-2,)),
        MlpConnectorConfig(layers, newline=bool(inputs.pinpoints)),
        decoder,
        VisionTokenIds(IMAGE),
        family=f"llava_{decoder.family}",
        inputs=inputs,
    )


_L14, _L14_336 = TOWERS
_CROP, _SQUARE, _TILES = InputRules(), InputRules(square=True), InputRules(pinpoints=llava.PINPOINTS)
SIZES = {
    "1.0-7b": _size(_L14, 1, llama.SIZES["7b"], _CROP),
    "1.0-13b": _size(_L14, 1, llama.SIZES["13b"], _CROP),
    "1.5-7b": _size(_L14_336, 2, llama.SIZES["vicuna-7b"], _SQUARE),
    "1.5-13b": _size(_L14_336, 2, llama.SIZES["vicuna-13b"], _SQUARE),
    "next-vicuna-7b": _size(_L14_336, 2, llama.SIZES["vicuna-7b"], _TILES),
    "next-vicuna-13b": _size(_L14_336, 2, llama.SIZES["vicuna-13b"], _TILES),
    "next-mistral-7b": _size(_L14_336, 2, mistral.SIZES["7b-v0.2"], _TILES),
    "next-34b": _size(_L14_336, 2, llama.SIZES["yi-34b"], _TILES),
}


FIELDS = {
    "mm_vision_tower": word(),
    "mm_vision_select_feature": only("patch"),
    "mm_vision_select_layer": llava.feature_layers(-2),
    "mm_projector_type": word("linear"),
    "mm_patch_merge_type": word("flat"),
    "image_aspect_ratio": nullable(word(None)),
    "image_grid_pinpoints": nullable(llava.GRID),
}


def _content(message: str) -> str:
    """Returns jinja2 code that prints the content of a message, a string or a list of parts."""
    content, part = f"{message}.content", "{{ item.text if item.type == 'text' else '<image>\n' }}"
    parts = f"{{% for item in {content} %}}{part}{{% endfor %}}"
    return f"{{% if {content} is string %}}{{{{ {content} }}}}{{% else %}}{parts}{{% endif %}}"


def _template(first: str, question: str, answer: str, prompt: str) -> str:
    """Returns a chat template in jinja2.

    Args:
      first: text before all turns.
      question, answer: texts of a user's and an assistant's turn, with CONTENT in place of the message.
      prompt: text that starts an answer.
    """
    content = _content("message")
    return (
        f"{first}{{% for message in messages %}}{{% if message.role == 'user' %}}{question.replace('CONTENT', content)}"
        f"{{% elif message.role == 'assistant' %}}{answer.replace('CONTENT', content)}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


def _system(default: str) -> str:
    """Returns jinja2 code that prints the system message, or `default` if the conversation has none."""
    return f"{{% if messages[0].role == 'system' %}}{_content('messages[0]')}{{% else %}}{default}{{% endif %}}"


_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_SYS = f"<<SYS>>\n{_content('messages[0]')}{{{{ '\n<</SYS>>\n\n' }}}}"
_START, _END = "<|im_start|>", "<|im_end|>"
CHATS = {  # (template, end of a turn. None: end of text) by name in llava/conversation.py
    "vicuna_v1": (
        _template(f"{_system(_VICUNA)} ", "USER: CONTENT ", "ASSISTANT: CONTENT{{ eos_token }}", "ASSISTANT:"),
        None,
    ),
    "mistral_instruct": (
        _template(
            "",
            f"[INST] {{% if loop.index0 == 1 and messages[0].role == 'system' %}}{_SYS}{{% endif %}}CONTENT [/INST]",
            " CONTENT {{ eos_token }}",
            "",
        ),
        None,
    ),
    "chatml_direct": (
        _template(
            f"{_START}system\n{_system('Answer the questions.')}{_END}",
            f"{_START}user\nCONTENT{_END}",
            f"{_START}assistant\nCONTENT{_END}",
            f"{_START}assistant\n",
        ),
        _END,
    ),
}
_YI = llama.SIZES["yi-34b"].vocab


TOWER = "model.vision_tower.vision_tower.vision_model."


class LlavaLlama(llava.Llava):
    name = "LLaVA"
    architectures = {f"llava_{decoder}": architecture for decoder, architecture in ARCHITECTURES.items()}
    sizes = SIZES
    # The tower's own files also contain the text tower.
    ignore = (r"text_model\..*", r"(text|visual)_projection\.weight", "logit_scale")
    rename = ((r"^vision_model\.", TOWER),)
    modules = ()
    spec = replace(llava.SPEC, image_id=IMAGE, framed=True)

    def from_hf(self, config: Json) -> ModelConfig:
        """Reads a config.json of model_type "llava_llama", "llava_mistral" or, in old files, "llava"."""
        fields = read(config, FIELDS)
        tower, kind = fields["mm_vision_tower"].rstrip("/").rpartition("/")[2], fields["mm_projector_type"]
        if tower not in TOWERS:
            raise unsupported("mm_vision_tower", fields["mm_vision_tower"], TOWERS)
        layers = re.fullmatch(r"mlp([1-9])x_gelu", kind)
        if layers is None and kind != "linear":
            raise FieldError("mm_projector_type", 'must be "linear" or "mlp2x_gelu".', kind)
        newline, aspect = "unpad" in fields["mm_patch_merge_type"], fields["image_aspect_ratio"]
        if newline != (aspect == "anyres"):
            raise ValueError(
                f"mm_patch_merge_type={fields['mm_patch_merge_type']}, image_aspect_ratio={aspect}: "
                "spatial_unpad and anyres require each other. Set both or neither."
            )
        encoder, decoder = TOWERS[tower], DECODERS[config["model_type"]]
        if newline and not fields["image_grid_pinpoints"]:
            raise FieldError("image_grid_pinpoints", "is missing. Add it to the file.")
        # Pinpoints in these files are (width, height).
        pinpoints = llava.pinpoints_from_hf(fields["image_grid_pinpoints"]) if newline else ()
        return ModelConfig(
            replace(encoder, features=llava.features_from_hf(fields["mm_vision_select_layer"], encoder.layers)),
            MlpConnectorConfig(1 if layers is None else int(layers[1]), newline=newline),
            by_model_type.decoder_from_hf({**config, "model_type": decoder}),
            VisionTokenIds(IMAGE),
            family=f"llava_{decoder}",
            inputs=InputRules(tuple((height, width) for width, height in pinpoints), square=aspect == "pad"),
        )

    def fields_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        encoder, connector, decoder = config.encoder, config.connector, by_model_type.decoder_to_hf(config.decoder)
        names = (name for name, vit in TOWERS.items() if replace(vit, features=encoder.features) == encoder)
        tower = next(names, None)
        if tower is None or decoder["model_type"] not in ARCHITECTURES:
            raise ValueError(
                f"LLaVA's own config.json supports only the towers {', '.join(TOWERS)} and the decoders "
                f"{', '.join(ARCHITECTURES)}. Choose one of each; this model has others: {config}"
            )
        tiles = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
        tiles |= {"image_grid_pinpoints": [[width, height] for height, width in config.inputs.pinpoints]}
        return {
            **decoder,
            "model_type": f"llava_{decoder['model_type']}",
            "mm_hidden_size": encoder.width,
            "mm_projector_type": "linear" if connector.layers == 1 else f"mlp{connector.layers}x_gelu",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": llava.features_to_hf(encoder.features),
            "mm_vision_tower": f"openai/{tower}",
            "unfreeze_mm_vision_tower": True,  # files contain the tower's weights
            "use_mm_proj": True,
            **(tiles if connector.newline else {"image_aspect_ratio": "pad"} if config.inputs.square else {}),
        }

    def tower_source(self, config: Json, names: Iterable[str]) -> str | None:
        return None if any("vision_tower." in name for name in names) else config["mm_vision_tower"]

    def processor_spec(self, config: ModelConfig) -> ProcessorSpec:
        """Returns the processor spec with the chat template of the decoder, which config.json lacks.

        A chat_template.jinja in the folder overrides it, for example for LLaVA on Llama 2 Chat.
        """
        if config.decoder.family == "mistral":
            template, end = CHATS["mistral_instruct"]
        else:
            template, end = CHATS["chatml_direct" if config.decoder.vocab == _YI else "vicuna_v1"]
        return replace(super().processor_spec(config), template=template, end_of_turn=end)

    def weights(self, config: ModelConfig) -> list[Row]:
        layers, theirs = config.connector.layers, "model.mm_projector"
        names = [theirs] if layers == 1 else [f"{theirs}.{2 * i}" for i in range(layers)]  # odd indices are GELUs
        return [
            *CLIP.rows(config.encoder, TOWER),
            *(row for i, name in enumerate(names) for row in linear(f"connector/linear{i}", name, "o i -> i o", "")),
            Row("connector/newline", "model.image_newline"),
            *by_model_type.whole_weights(config.decoder, ""),
        ]
