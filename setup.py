"""Metadata and dependencies.

Lower bounds were tried (`make lowest`), tokamax's on a CPU only. CONTRIBUTING.md lists them beside the versions of
development.
"""

from setuptools import find_packages, setup

setup(
    name="mllm-jax",
    version="0.1.0",
    description="Multimodal language models as one composable, pure-functional Flax model for TPU and GPU",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mllm_jax", "mllm_jax.*"]),
    package_data={"mllm_jax": ["**/*.jinja", "**/*.html"]},
    install_requires=[
        "jax>=0.10.1,<0.13",  # with 0.10.0 grain warns at every start
        "flax>=0.12.8,<0.14",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.3",  # older ones do not mark a checkpoint as whole
        "grain>=0.2.18",
        "array_record>=0.8.1",
        "msgpack>=1.0.8",
        "pyarrow>=16",
        "einops>=0.8",
        "ml-collections>=1.0",
        "tensorflow-datasets>=4.9.9",
        "absl-py>=2.1",
        "numpy>=2.0",
        "pillow>=11.3",  # AVIF is built in, and TIFF states its size upright
        "tokenizers>=0.21",
        "jinja2>=3.1.6",
        "huggingface_hub>=0.30",
        "tensorboardX>=2.6.2",
        "rich>=13",
        "pyyaml>=6",
    ],
    extras_require={
        "video": ["av>=17"],
        "heic": ["pillow-heif>=1.0"],
        # For folders with a tokenizer.model alone. Beside an older protobuf TFDS is not importable (5), or grain warns
        # at every start (6.31).
        "sentencepiece": ["sentencepiece>=0.2", "protobuf>=6.32"],
        "tpu": ["jax[tpu]>=0.10.1,<0.13"],
        "plan": ["jax[tpu]>=0.10.1,<0.13"],  # the TPU compiler (libtpu) of jax's own choice; it needs no TPU
        "cuda": ["jax[cuda13]>=0.10.1,<0.13", "tokamax>=0.0.12"],
        "test": [
            "av>=17",
            "pillow-heif>=1.0",
            "torch==2.13.0",
            "transformers>=5.20,<5.24",
            "peft>=0.21",
            "accelerate>=1.10",
            "trl>=1.16,<1.17",  # the loss of its trainer is called
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.15.5",
            "safetensors>=0.8",
            "sentencepiece>=0.2",
            "kubeflow-trainer-api>=2.3",  # models of JobSet, Job and Pod
        ],
    },
)
