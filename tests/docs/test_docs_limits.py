"""Limits that the documents name are those of the code."""

from paths import ROOT

from mllm_jax.common.fields import MOST_EXPERTS, MOST_LAYERS
from mllm_jax.data.pipeline import loader
from mllm_jax.data.records import grounding
from mllm_jax.data.text import bounded_jinja
from mllm_jax.data.tools import inline_media
from mllm_jax.data.vision import images
from mllm_jax.train.checkpoint import lock
from mllm_jax.train.monitor import processes
from mllm_jax.train.runs.config import SpikeConfig, TrainConfig
from mllm_jax.train.runs.data_files import FilesData

DOCS = ROOT / "docs"


def says(page, *texts):
    whole = " ".join((DOCS / page).read_text().split())
    assert [text for text in texts if text not in whole] == []


def test_security():
    assert images.MAX_PIXELS == 2**27 and images.MAX_BYTES == 512 * 2**20 and bounded_jinja.SOURCE == 2**20
    assert bounded_jinja.LENGTH == 2**28 and bounded_jinja.SECONDS == 10
    says("security.md", "2^27 pixels, 512 MB for the pixels and their copies, 200:1", "`data.max_bad_fraction` (5 %)")
    says("security.md", "2^20 characters of the template; for a conversation 10 s and 2^28 characters")
    says("security.md", f"{MOST_LAYERS:,} layers, {MOST_EXPERTS:,} experts")


def test_data():
    assert FilesData().max_bad_fraction == 0.05 and images.LARGE == 2**25 and inline_media.LARGEST == 256 * 2**20
    assert grounding.OUTSIDE == 0.01 and images.DISTORTED == 1.25
    says("data.md", f"of at least {loader.ENOUGH} records", "ran for 10 s, or made 2^28 characters")
    says("data.md", f"one side over {images.MAX_ASPECT} times the other", "JPEG of more than 2^25 pixels")
    says(
        "data.md",
        "Videos over 256 MB are not embedded",
        "A box over 1 % outside its image",
        "by a factor of at most 1.25",
    )


def test_reliability():
    train, spikes = TrainConfig(), SpikeConfig()
    assert processes.COMPILING == 1800
    says("reliability.md", f"`train.patience` ({train.patience})", f"`train.watchdog` ({train.watchdog:g} s; 0: off)")
    says("reliability.md", f"the last {spikes.window} (`spikes.window`)", f"After {spikes.rewinds} returns")
    says("reliability.md", f"touches it every {lock.BEAT:g} s", f"heartbeat within {processes.HEARTBEAT} s")
    says("reliability.md", "not touched for a minute", "may take 30 minutes", f"| {processes.AGAIN} | the same command")
    assert lock.STALE == 60
