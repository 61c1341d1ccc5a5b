"""Writes docs/models.md: every published family, and what the tests found of it.

    python -m pytest -n 2 --junitxml report.xml
    python benchmarks/models.py report.xml > docs/models.md

Tests that compare a family with transformers, or train it, leave a property `parity` ("FAMILY ERROR", the largest
absolute difference of logits, features or embeddings, in fp32 on random tiny weights) or `trains` ("FAMILY") there.
"""

import xml.etree.ElementTree as ElementTree
from collections import defaultdict

from mllm_jax.common.cli import Parser
from mllm_jax.families import FAMILIES
from mllm_jax.families.__main__ import generates, image_tokens, published
from mllm_jax.model.vlm import count_params

HEIGHT, WIDTH = 768, 1024
HEAD = f"""# Models

This page lists all families, their errors against transformers, and the fields of config.json that are read.

Every family reads and writes its published weights, tensor by tensor, bit for bit. `benchmarks/models.py` makes the
table from a run of the tests: the error is the largest absolute difference from transformers of logits (of features for
a tower, of embeddings for a dual encoder), in fp32 on random tiny weights. Visual tokens are those of an image of
{WIDTH} x {HEIGHT} pixels, for the smallest and the largest size. `python -m mllm_jax.families` lists all sizes, and
`docs/weights.md` the files and layouts.

| family | sizes | parameters | visual tokens | error | trained in a test | generates |
|---|---|---|---|---|---|---|"""

FOOT = """
## Fields of config.json
Each family lists the fields that it reads, with transformers' defaults (`mllm_jax/common/fields.py`). A field that is
missing, has another type or is out of range is an error: `config.json: text_config.hidden_size=null: must be an integer
of at least 1 ...`. Absent and null differ where they do in transformers: Mistral without `sliding_window` has windows
of 4,096 tokens, with null it has none. At most 1,024 layers and 1,024 experts are read. Other fields are ignored.

Rotary positions are read as transformers 5 fills in `rope_parameters`: `rope_scaling` takes precedence over
`rope_parameters`, and fields inside them over `rope_theta` and `partial_rotary_factor` beside them. Only
`original_max_position_embeddings` beside them takes precedence over the one inside. `type` is the old name of
`rope_type`. Kinds:

| rope_type | fields |
|---|---|
| default |  |
| linear, dynamic | factor |
| llama3 | factor, low_freq_factor, high_freq_factor, original_max_position_embeddings |
| yarn | those of longrope except the lists; beta_fast, beta_slow, mscale, mscale_all_dim, truncate |
| longrope | short_factor, long_factor, factor, original_max_position_embeddings, attention_factor |

All of them work with `mrope_section`, so that the setting for long texts in Qwen2.5-VL's and Qwen3-VL's READMEs
is read: `"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24], "factor": 3,
"original_max_position_embeddings": 32768}`. Refused by name: a field that no kind has, dicts of several layer types,
`partial_rotary_factor` except in Phi-3, and in DeepSeek other kinds than yarn, or `mscale` without `mscale_all_dim`."""


def properties(paths: list[str]) -> dict[str, list[str]]:
    """Values of all properties of passed tests, by name."""
    found = defaultdict(list)
    for case in (case for path in paths for case in ElementTree.parse(path).iter("testcase")):
        if case.find("failure") is None and case.find("error") is None:
            for entry in case.iter("property"):
                found[entry.get("name")].append(entry.get("value"))
    return found


def ends(values: list[str]) -> str:
    """The first and the last, where they differ."""
    return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def main(paths: list[str]) -> None:
    found, rows = properties(paths), defaultdict(list)
    errors = defaultdict(list)
    for family, error in (value.split() for value in found["parity"]):
        errors[family].append(float(error))
    for name, config in published():
        rows[config.family].append((sum(count_params(config).values()), name, config))
    print(HEAD)
    for family in FAMILIES:
        sizes = sorted(rows[family], key=lambda row: row[0])
        if not sizes:
            continue
        tokens = [image_tokens(config, HEIGHT, WIDTH) for _, _, config in (sizes[0], sizes[-1])]
        counts = ends([f"{count / 1e6:,.0f} M" for count, _, _ in sizes])
        cells = [
            family,
            f"{len(sizes)}: {ends([name for _, name, _ in sizes])}",
            counts,
            "" if tokens[0] is None else ends([f"{sum(count):,}" for count in tokens]),
            f"{max(errors[family]):.0e}" if errors[family] else "",
            "yes" if family in found["trains"] else "",
            "yes" if generates(sizes[0][2]) else "",
        ]
        print(f"| {' | '.join(cells)} |")
    print(FOOT)


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("reports", nargs="+", metavar="REPORT", help="a report of the tests, in JUnit's XML")
    main(parser.parse_args().reports)
