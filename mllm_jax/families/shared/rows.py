"""Rows that several weight tables share; see weights/table.py."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

from mllm_jax.model.decoder import DecoderConfig, LayerKind
from mllm_jax.nn.stack import segments
from mllm_jax.weights.table import Row

# A tied head is not a leaf of its own, but files may contain it as a copy of the embedding.
TIES = {"decoder/head/w": "decoder/embed"}
# Buffers in older files: position ids and rotary tables.
BUFFERS = (r"(.*\.)?position_ids", r".*\.(inv_freq|cos_cached|sin_cached)")
# Renames tensors in files of models that transformers saved without a head.
BARE = ((r"^(?=(embed_tokens|tok_embeddings|layers|norm)\.)", "model."),)
# All experts of a layer in one tensor, the layout of transformers 5 in memory.
FUSED_GATE_UP = {"pattern": "e (two f) d -> e two d f", "sizes": {"two": 2}}
FUSED_DOWN = {"pattern": "e d f -> e f d"}


def linear(ours: str, theirs: str, pattern: str, bias: str | None = None) -> list[Row]:
    """Rows of a linear layer, [out, in] in torch. `bias` is the pattern of its bias. None: no bias."""
    rows = [Row(f"{ours}/w", f"{theirs}.weight", pattern)]
    return rows if bias is None else [*rows, Row(f"{ours}/b", f"{theirs}.bias", bias)]


def layer_norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]


def separate_qkv(theirs: str) -> list[Row]:
    """Rows of queries, keys and values in separate tensors, with optional biases."""
    return [
        row
        for name in "qkv"
        for row in linear(f"attention/{name}", f"{theirs}.{name}_proj", "(n h) d -> d n h", "(n h) -> n h")
    ]


def plain_layer(theirs: str, norms: tuple[str, str], mlp: str) -> list[Row]:
    """Rows of a layer with biases, LayerNorms and an MLP without a gate.

    Args:
      theirs: name of the layer.
      norms: names of the norms before attention and before the MLP.
      mlp: prefix of the names of the MLP's two linear layers, which end in 1 and 2.
    """
    return [
        *layer_norm("norm1", f"{theirs}.{norms[0]}"),
        *layer_norm("norm2", f"{theirs}.{norms[1]}"),
        *separate_qkv(f"{theirs}.self_attn"),
        *linear("attention/out", f"{theirs}.self_attn.out_proj", "d (n h) -> n h d", ""),
        *linear("mlp/up", f"{mlp}1", "f d -> d f", ""),
        *linear("mlp/down", f"{mlp}2", "d f -> f d", ""),
    ]


def gated_mlp(ours: str, theirs: str) -> list[Row]:
    """Rows of a gated MLP, with optional biases."""
    return [
        *linear(f"{ours}/gate", f"{theirs}.gate_proj", "f d -> d f", ""),
        *linear(f"{ours}/up", f"{theirs}.up_proj", "f d -> d f", ""),
        *linear(f"{ours}/down", f"{theirs}.down_proj", "d f -> f d", ""),
    ]


def experts_one_by_one(ours: str, theirs: str) -> list[Row]:
    """Rows of experts in separate tensors. The joint layout of transformers 5 in memory is read too."""
    gate_up, down = f"{theirs}.{{e}}.{{half}}_proj.weight", f"{theirs}.{{e}}.down_proj.weight"
    fused_gate_up, fused_down = {"theirs": f"{theirs}.gate_up_proj"}, {"theirs": f"{theirs}.down_proj"}
    halves: Mapping = {"half": ("gate", "up")}
    return [
        Row(f"{ours}/experts_gate_up/w", gate_up, "f d -> d f", {}, halves, others=[fused_gate_up | FUSED_GATE_UP]),
        Row(f"{ours}/experts_down/w", down, "d f -> f d", others=[fused_down | FUSED_DOWN]),
    ]


def joint_qkv(config: DecoderConfig, theirs: str, pattern: str, bias: str | None = None) -> list[Row]:
    """Rows of queries, keys and values concatenated in one tensor along the pattern's axis `n`.

    With 4 heads and 2 key-value heads, `n` has 8 entries: queries are 0 to 3, keys 4 and 5, values 6 and 7.
    """
    heads, kv_heads = config.attention.heads, config.attention.kv_heads
    count, firsts = heads + 2 * kv_heads, {"q": 0, "k": heads, "v": heads + kv_heads}
    return [
        row._replace(part=("n", first, count))
        for name, first in firsts.items()
        for row in linear(f"attention/{name}", theirs, pattern, bias)
    ]


def joint_gate_up(ours: str, theirs: str, mlp: int, bias: str | None = None) -> list[Row]:
    """Rows of the gate and up projections of a gated MLP of width `mlp`, concatenated in one tensor."""
    return [
        row._replace(part=("f", first, 2 * mlp))
        for name, first in {"gate": 0, "up": mlp}.items()
        for row in linear(f"{ours}/{name}", theirs, "f d -> d f", bias)
    ]


def layers(config: DecoderConfig, rows: Callable[[LayerKind], Iterable[Row]]) -> list[Row]:
    """Rows of all layers of a decoder, see `stacked`."""
    return stacked("decoder", config.kinds, rows)


def stacked(part: str, kinds: tuple[Hashable, ...], rows: Callable[[Any], Iterable[Row]]) -> list[Row]:
    """Rows of all layers of a part of the model.

    Args:
      part: first part of our names, as in "decoder/...".
      kinds: kind of every layer.
      rows: returns the rows of a layer of a given kind: our names without the path of layers, their names with `{n}` in
        place of the layer's number.
    """
    return [
        row._replace(ours=f"{part}/{name}/{row.ours}", values={**row.values, "n": numbers})
        for segment in segments(kinds)
        for name, numbers, kind in segment.slots()
        for row in rows(kind)
    ]


def decoder(
    config: DecoderConfig,
    prefix: str = "model",
    head: str = "lm_head.weight",
    experts: list[Row] | None = None,
    others: Iterable[Row] = (),
) -> list[Row]:
    """Rows of a decoder with Llama's tensor names, which most families use.

    Args:
      prefix: prefix of all tensor names except the head's.
      head: tensor name of the head.
      experts: rows of a layer's experts, named as in `layers`. None: one tensor per expert.
      others: rows of a layer, named as in `layers`, that replace the usual rows of the same leaves.
    """
    layer = f"{prefix}.layers.{{n}}"
    expert_rows = experts_one_by_one("mlp", f"{layer}.mlp.experts") if experts is None else experts
    norms = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    if config.use_post_norm:
        norms |= {"post_norm1": norms["norm2"], "norm2": "pre_feedforward_layernorm"}
        norms |= {"post_norm2": "post_feedforward_layernorm"}

    def rows(kind: LayerKind) -> list[Row]:
        attention = f"{layer}.self_attn"
        usual = [
            *(row for ours, name in norms.items() for row in layer_norm(ours, f"{layer}.{name}")),
            *separate_qkv(attention),
            *linear("attention/out", f"{attention}.o_proj", "d (n h) -> n h d", ""),
            Row("attention/q_norm/scale", f"{attention}.q_norm.weight"),
            Row("attention/k_norm/scale", f"{attention}.k_norm.weight"),
            *(
                [Row("mlp/router/w", f"{layer}.mlp.gate.weight", "e d -> d e"), *expert_rows]
                if kind.experts
                else gated_mlp("mlp", f"{layer}.mlp")
            ),
        ]
        replaced = {row.ours: row for row in others}
        return [replaced.get(row.ours, row) for row in usual]

    return [
        Row("decoder/embed", f"{prefix}.embed_tokens.weight"),
        *layers(config, rows),
        *layer_norm("decoder/norm", f"{prefix}.norm"),
        Row("decoder/head/w", head),
    ]
