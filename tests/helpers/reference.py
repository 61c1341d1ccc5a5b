"""Random tiny transformers models and prompts: numbers that we did not make, and how ours are compared with them."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import mllm_jax
from mllm_jax.common.trees import flatten
from mllm_jax.families import FAMILIES
from mllm_jax.weights.table import expand

IMAGE, VIDEO, START, END = 150, 151, 152, 153
NOTHING = "(?!)"  # a pattern that no name has


def tiny_qwen3_vl(seed: int = 0, tie: bool = False, experts: bool = False):
    """A random Qwen3-VL in fp32; what its init leaves at zero or one is perturbed, or parity would prove little."""
    kind = "Qwen3VLMoe" if experts else "Qwen3VL"
    moe = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48) if experts else {}
    config = getattr(transformers, f"{kind}Config")(
        text_config=dict(
            **moe,
            vocab_size=200,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=tie,
            rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[6, 5, 5], mrope_interleaved=True),
        ),
        vision_config=dict(
            depth=4,
            hidden_size=48,
            intermediate_size=100,
            num_heads=4,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=64,
            num_position_embeddings=36,
            deepstack_visual_indexes=[0, 2],
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tie,
    )
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval().float()
    perturb(model)
    return config, model


def perturb(model):
    """Norms and zeros get noise, matrices are scaled up."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.abs().max() < 1e-6 or "norm" in name.lower():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(3.0)  # away from the near-linear regime of 0.02


def assert_parity(record_property, family, found, expected):
    """Asserts that outputs equal transformers' in fp32, and records the error for docs/models.md."""
    found = np.asarray(found)
    record_property("parity", f"{family} {np.abs(found - expected).max()}")
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def as_internlm2(tensors, config):
    """Tensors of a Llama under InternLM2's names, with wqkv [(K (G q, k, v) H) D] as its published code reads it."""
    renamed, heads, head_dim = {}, config.num_key_value_heads, config.head_dim
    names = {"o_proj": "attention.wo", "gate_proj": "feed_forward.w1", "up_proj": "feed_forward.w3"}
    names |= {"down_proj": "feed_forward.w2", "input_layernorm": "attention_norm"}
    names |= {"post_attention_layernorm": "ffn_norm"}
    for name, tensor in tensors.items():
        *place, stem, _ = name.split(".")
        layer = ".".join(place[:3])
        if stem in names:
            renamed[f"{layer}.{names[stem]}.weight"] = tensor
        elif stem == "q_proj":
            q, k, v = (tensors[name.replace("q_proj", other)] for other in ("q_proj", "k_proj", "v_proj"))
            groups = [x.reshape(heads, -1, head_dim, x.shape[1]) for x in (q, k, v)]
            renamed[f"{layer}.attention.wqkv.weight"] = torch.cat(groups, dim=1).reshape(-1, q.shape[1])
    plain = {"lm_head": "output", "model.embed_tokens": "model.tok_embeddings", "model.norm": "model.norm"}
    renamed |= {f"{new}.weight": tensors[f"{old}.weight"] for old, new in plain.items()}
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


@cache
def loss_of(model):
    """Compiled once for all tests of a model: (params, batch) -> (mean loss, logits), gradients."""

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params, batch):
        logits = model.apply({"params": params}, batch).logits
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(batch.targets)[..., None], -1)[..., 0]
        return jnp.sum(nll * batch.weight) / jnp.maximum(jnp.sum(batch.weight), 1), logits

    return loss


def assert_step(record_property, vlm, model, batches, folder, forward=None, unused: str = NOTHING):
    """Logits equal transformers', and of the last batch the loss and the gradient of every tensor.

    Args:
      vlm: ours, read from files of `model`.
      batches: Hugging Face's inputs with labels, in arrays.
      folder, unused: see `assert_gradients`.
      forward: how `model` is called, where the inputs alone do not do.
    """
    for inputs in batches:
        model.zero_grad()
        theirs = (forward or type(model).__call__)(model, **to_torch(inputs))
        (loss, logits), found = loss_of(vlm.model)(vlm.params, mllm_jax.from_hf_inputs(vlm.config, inputs))
        real, wanted = inputs["attention_mask"] == 1, theirs.logits.detach().numpy()
        assert np.abs(wanted[real]).max() > 0.5
        assert_parity(record_property, vlm.config.family, np.asarray(logits)[real], wanted[real])
    theirs.loss.backward()
    np.testing.assert_allclose(loss, theirs.loss.item(), rtol=1e-5)
    assert_gradients(vlm, model, found, folder, unused)


def assert_gradients(vlm, model, found, folder, unused: str = NOTHING):
    """The gradient of every tensor equals what `model` holds as gradients.

    Args:
      found: gradients, like the parameters of `vlm`.
      folder: an empty one: theirs are written there as if they were weights, and so get the names of files.
      unused: pattern of names of tensors that may have no gradient.
    """
    weights = {id(weight): weight for weight in model.state_dict(keep_vars=True).values() if weight.is_floating_point()}
    kept = [weight.detach().clone() for weight in weights.values()]
    with torch.no_grad():
        for weight in weights.values():
            weight.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
        model.save_pretrained(folder)
        for weight, before in zip(weights.values(), kept):
            weight.copy_(before)
    found, wanted = (flatten(tree) for tree in (found, mllm_jax.load_pretrained(folder).params))
    for name, entry in expand(FAMILIES[vlm.config.family].weights(vlm.config), vlm.params).items():
        for part in entry.parts:
            got, want = (np.asarray(tree[part.path])[part.index] for tree in (found, wanted))
            scale = np.linalg.norm(want)
            # A key's bias adds the same to all scores of a query, so that its gradient is zero but for rounding.
            floor = 1e-5 if re.search(r"(k_proj|key)\.bias$", name) or part.path.endswith("attention/k/b") else 0
            assert scale > 0 or re.search(unused, name), name
            assert np.linalg.norm(got - want) <= max(1e-3 * scale, floor), name


def assert_export(vlm, model, inputs, folder, forward=None):
    """transformers loads what is saved to an empty folder: the same tensors to the bit, the same logits."""
    mllm_jax.save_pretrained(vlm, folder)
    again, info = type(model).from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, own = again.eval().state_dict(), model.state_dict()
    assert ours.keys() == own.keys() and all(torch.equal(ours[name], own[name]) for name in own)
    with torch.no_grad():
        found, wanted = ((forward or type(model).__call__)(each, **to_torch(inputs)) for each in (again, model))
    np.testing.assert_array_equal(found.logits, wanted.logits)
    assert mllm_jax.load_pretrained(folder).config == vlm.config


def published(tensors) -> dict:
    """Tensors of a Qwen3-VL as files of published weights have them: experts are transposed there."""
    transposed = (".experts.gate_up_proj", ".experts.down_proj")
    return {
        name: tensor.transpose(1, 2).contiguous() if name.endswith(transposed) else tensor
        for name, tensor in tensors.items()
    }


def prompt(rng, *parts):
    """A row of inputs. Parts: n text tokens, ("image", h, w), ("video", t, h, w) or ("clip", t, h, w), whose temporal
    patches are one run of tokens; grids in patches."""
    ids, kinds, pixels = [], [], {"image": [], "video": []}
    grids = {"image": [], "video": []}

    def add(tokens, kind=0):
        ids.extend(tokens)
        kinds.extend([kind] * len(tokens))

    for part in parts:
        if isinstance(part, int):
            add(rng.integers(5, 149, part).tolist())
            continue
        kind, (t, h, w) = part[0], ((1, *part[1:]) if part[0] == "image" else part[1:])
        token, number, arrays = (IMAGE, 1, "image") if kind == "image" else (VIDEO, 2, "video")
        grids[arrays].append((t, h, w))
        pixels[arrays].append(rng.standard_normal((t * h * w, 3 * 2 * 4 * 4)).astype(np.float32))
        runs, patches = (1, t) if kind == "clip" else (t, 1)
        for _ in range(runs):
            if kind == "video":
                add(rng.integers(5, 149, 2).tolist())
            add([START])
            add([token] * (patches * h * w // 4), number)
            add([END])
    return ids, kinds, pixels, grids


def batch_of(prompts, side: str = "right", labels: bool = False) -> dict[str, np.ndarray]:
    """Pads rows of `prompt` into one dict of Hugging Face's inputs."""
    length = max(len(ids) for ids, *_ in prompts)

    def pad(row, value):
        fill = [value] * (length - len(row))
        return fill + row if side == "left" else row + fill

    inputs = {
        "input_ids": np.array([pad(ids, 0) for ids, *_ in prompts]),
        "attention_mask": np.array([pad([1] * len(ids), 0) for ids, *_ in prompts]),
        "mm_token_type_ids": np.array([pad(kinds, 0) for _, kinds, *_ in prompts], np.int32),
    }
    for kind, pixel_name, grid_name in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        grids = [grid for *_, all_grids in prompts for grid in all_grids[kind]]
        if grids:
            inputs[grid_name] = np.array(grids)
            inputs[pixel_name] = np.concatenate([p for _, _, pixels, _ in prompts for p in pixels[kind]])
    if labels:
        text = (inputs["attention_mask"] == 1) & (inputs["mm_token_type_ids"] == 0)
        inputs["labels"] = np.where(text, inputs["input_ids"], -100)
    return inputs


def to_torch(inputs):
    return {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
