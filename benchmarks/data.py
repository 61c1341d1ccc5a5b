"""Conversations and images per second of every kind of source, against PyTorch's DataLoader with transformers.

python benchmarks/data.py [--conversations 64] [--rounds 5]

Both sides read the same JPEG files and texts, shuffled, and end with what a model reads: token ids and patches, ours
packed in rows. Theirs is a Dataset of JSON lines in a DataLoader whose workers run a Qwen3-VL processor (chat template,
tokenizer, the image processor of PIL). Seconds are those that a core works, threads and processes of workers included.
Sides take turns; figures are medians of rounds.
"""

import importlib
import io
import json
import os
import pathlib
import statistics
import sys
import tempfile

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import numpy as np
import pair
import tensorflow_datasets as tfds
import torch
from PIL import Image
from ratios import ratio_text
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mllm_jax.common.cli import Parser
from mllm_jax.data.pipeline.loader import make_loader
from mllm_jax.data.pipeline.packing import Budget
from mllm_jax.data.pipeline.processor import Processor
from mllm_jax.data.pipeline.spec import SEEING
from mllm_jax.data.sources import open_source
from mllm_jax.data.synthetic.scenes import SCENES_TEMPLATE, scenes_tokenizer
from mllm_jax.data.text.chat_template import ChatTemplate
from mllm_jax.data.text.tokenizer import Tokenizer

WORDS = "the a red blue cat dog house stands left right above of and near small large what where count is".split()
KINDS = {"JSON Lines": "jsonl", "ArrayRecord": "array_record", "WebDataset": "tar", "Parquet": "parquet"}


def conversations(count: int) -> list[dict]:
    """One to three photographs of 300 to 900 pixels a side, and two turns of 40 words."""
    rng, made = np.random.default_rng(0), []
    text = lambda: " ".join(rng.choice(WORDS, 40))
    for index in range(count):
        images = []
        for _ in range(rng.integers(1, 4)):
            height, width = rng.integers(300, 900, 2).tolist()
            images.append(pair.jpeg(rng, height, width))
        turns = [{"role": ("user", "assistant")[i % 2], "content": text()} for i in range(4)]
        made.append({"id": f"c{index}", "kind": "", "images": images, "messages": turns})
    return made


class Tfds(tfds.core.GeneratorBasedBuilder):
    """The same, prepared by TFDS."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}
    records: list[dict] = []

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {
            "id": text,
            "images": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")),
            "messages": tfds.features.Sequence({"role": text, "content": text}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        shown = lambda record: {name: record[name] for name in ("id", "messages")}
        files = lambda record: {"images": [io.BytesIO(data) for data in record["images"]]}
        return {"train": ((index, shown(record) | files(record)) for index, record in enumerate(self.records))}

    def _generate_examples(self):
        """All is said by `_split_generators`."""


class Theirs(torch.utils.data.Dataset):
    """The baseline of a project with transformers: JSON lines with files, and a processor in __getitem__."""

    def __init__(self, folder: pathlib.Path, tokenizer: AutoTokenizer):
        lines = "".join(path.read_text() for path in sorted(folder.glob("*.jsonl"))).splitlines()
        self.folder, self.records, self.tokenizer = folder, [json.loads(line) for line in lines], tokenizer
        self.images = Qwen2VLImageProcessorPil(
            size={"shortest_edge": SEEING.min_pixels, "longest_edge": SEEING.max_pixels}, patch_size=SEEING.patch,
            temporal_patch_size=SEEING.temporal_patch, merge_size=SEEING.merge, image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        record = self.records[index]
        images = [Image.open(self.folder / name).convert("RGB") for name in record["images"]]
        seen = self.images(images, return_tensors="pt")
        first, *rest = record["messages"]
        shown = [{"type": "image"} for _ in images]
        messages = [{"role": "user", "content": [*shown, {"type": "text", "text": first["content"]}]}, *rest]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        for grid in seen["image_grid_thw"]:  # as Qwen3VLProcessor does
            text = text.replace("<|image_pad|>", "<|seen|>" * int(grid.prod() // SEEING.merge**2), 1)
        ids = self.tokenizer(text.replace("<|seen|>", "<|image_pad|>"), return_tensors="pt")["input_ids"][0]
        return {"input_ids": ids, "pixel_values": seen["pixel_values"], "image_grid_thw": seen["image_grid_thw"]}


def padded(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
    joined = {name: torch.cat([item[name] for item in items]) for name in ("pixel_values", "image_grid_thw")}
    return {"input_ids": ids} | joined


def core_seconds() -> float:
    """CPU seconds of this process and its ended children so far."""
    return sum(os.times()[:4])


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=64, help="conversations in a timed run (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side (default 5)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"load of the machine: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        measure(pathlib.Path(name), conversations(args.conversations), args.rounds)


def measure(folder: pathlib.Path, records: list[dict], rounds: int):
    tokenizer = Tokenizer(scenes_tokenizer(), {"eos_token": SEEING.end_of_turn})
    processor = Processor(tokenizer, ChatTemplate(SCENES_TEMPLATE), SEEING)
    processor.save(folder / "processor")
    theirs = AutoTokenizer.from_pretrained(folder / "processor")
    writers = importlib.import_module("source_files").WRITERS
    sources = {kind: open_source(writers[name](folder / name, records)) for kind, name in KINDS.items()}
    Tfds.records = records
    tfds.disable_progress_bar()
    builder = Tfds(data_dir=str(folder / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    sources["TFDS"] = open_source(str(builder.data_path))
    images = sum(len(record["images"]) for record in records)

    def run_theirs():
        data = Theirs(folder / "jsonl", theirs)
        loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, num_workers=1, collate_fn=padded)
        assert sum(len(batch["input_ids"]) for batch in loader) == len(records)

    def run_ours(source):
        budget, shape = Budget(8192, 4, 4096), dict(batch_rows=1, workers=1, epochs=1)
        loader = make_loader(source, processor, budget, **shape)
        assert sum(info.conversations for _, info in loader) == len(records)
        loader.close()

    runs = {"DataLoader, transformers": run_theirs}
    runs |= {kind: lambda source=source: run_ours(source) for kind, source in sources.items()}
    seconds = pair.in_turn(runs, rounds, core_seconds)
    usual = seconds["DataLoader, transformers"]
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        print(
            f"{name:26}{len(records) / middle:8.1f} conversations/s {images / middle:8.1f} images/s   "
            f"ratio {ratio_text(usual, taken)}"
        )


if __name__ == "__main__":
    main()
