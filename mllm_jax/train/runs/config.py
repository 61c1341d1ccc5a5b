"""The config of a run: a tree of dataclasses.

`configs/*.py` return `run_config(Run(...))`; training, evaluation and generation read it with `read_run`.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from mllm_jax.common.config import ConfigError, following, from_config_dict, to_config_dict
from mllm_jax.common.errors import suggestion
from mllm_jax.common.settings import Config, NonNegativeInt, PositiveInt, Range, Seed
from mllm_jax.families import FAMILIES
from mllm_jax.families.decoders.by_model_type import TEXT
from mllm_jax.model.connectors.average_pool import AveragePoolConfig
from mllm_jax.model.connectors.mlp import MlpConnectorConfig
from mllm_jax.model.connectors.patch_merger import PatchMergerConfig
from mllm_jax.model.connectors.perceiver import PerceiverConfig
from mllm_jax.model.connectors.pixel_shuffle import PixelShuffleConfig
from mllm_jax.model.connectors.position_aware import PositionAwareConfig
from mllm_jax.model.connectors.qformer import QFormerConfig
from mllm_jax.model.dual_encoder import AttentionPool, ClassPool, DualConfig
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.vlm import ModelConfig
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.nn.attention.mla import MlaConfig
from mllm_jax.nn.lora import LoraConfig
from mllm_jax.nn.rope import (
    DynamicNtkRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    YarnRopeScaling,
)
from mllm_jax.nn.value_head import NAME as VALUE_HEAD
from mllm_jax.sharding.logical_axes import MeshAxes, freeze_rules
from mllm_jax.sharding.mesh import MESH_AXES
from mllm_jax.sharding.presets import LOGICAL_AXIS_RULES, PRESETS
from mllm_jax.train.losses.algorithm_config import AlgorithmConfig
from mllm_jax.train.losses.contrastive import ContrastiveConfig
from mllm_jax.train.losses.cross_entropy import CHUNK, SupervisedConfig
from mllm_jax.train.losses.load_balance import BalanceConfig
from mllm_jax.train.losses.ppo import PpoConfig
from mllm_jax.train.losses.preference import PreferenceConfig
from mllm_jax.train.losses.reward import RewardConfig
from mllm_jax.train.runs.data import CaptionsData, DataConfig, ScenesData
from mllm_jax.train.runs.data_files import FilesData, MixtureData
from mllm_jax.train.step.context import TrainContext
from mllm_jax.train.step.optimizer import OptimConfig

PARTS = {
    part.__name__: part
    for part in (
        *(ModelConfig, DualConfig, ClassPool, AttentionPool),
        *(VitConfig, AveragePoolConfig, MlpConnectorConfig, PatchMergerConfig, PixelShuffleConfig),
        *(PerceiverConfig, PositionAwareConfig, QFormerConfig),
        *(AttentionConfig, MlaConfig),
        *(LinearRopeScaling, DynamicNtkRopeScaling, Llama3RopeScaling, LongRopeScaling, YarnRopeScaling),
        *(FilesData, MixtureData, ScenesData, CaptionsData),
        *(SupervisedConfig, PreferenceConfig, RewardConfig, PpoConfig, ContrastiveConfig),
    )
}
AxisSize = Annotated[int, Range(least=1, also=(-1,))]  # size of a mesh axis
PARTS_OF_STAGES = ("algorithm", "data", "optim", "lora", "train", "mesh")


@dataclass(frozen=True)
class SpikeConfig(Config):
    """Detection of loss spikes, see `mllm_jax.train.monitor.spikes`.

    factor: multiple of the median of recent losses above which a loss is a spike. 0: no detection.
    window: number of losses in the median. Detection starts after as many steps.
    rewinds: maximum number of rewinds to a checkpoint. Later spikes are only reported.
    """

    factor: Annotated[float, Range(above=1, also=(0,), hint="Set 3.0, say, or 0 for no rule.")] = 0.0
    window: PositiveInt = 50
    rewinds: NonNegativeInt = 10


@dataclass(frozen=True)
class TrainConfig(Config):
    """Settings of the training loop.

    seed: seed of initial parameters, of dropout and of sampling.
    grad_accum_steps: number of parts in which a batch is processed to save memory. It does not change the result.
    loss_chunk: largest number of targets per row whose logits are held at once.
    log_every, evaluate_every, save_every: intervals in steps. 0: only at the end.
    num_eval_examples: number of held-out records to evaluate on.
    max_to_keep: number of checkpoints to keep.
    verify: store a fingerprint of every array in checkpoints, and compare it when restoring. Costs one pass over the
      state on the devices per save.
    save_local_every, local: interval in steps and folder of checkpoints on each process's own disk. 0: no local
      checkpoints. See mllm_jax/train/checkpoint/local.py.
    spikes: detection of loss spikes, and rewinds to a checkpoint.
    patience: number of consecutive non-finite steps that ends the run.
    watchdog: seconds without a finished step after which a hanging run is ended. 0: no watchdog.
    balance: load balancing of experts.
    async_gathers: gather weights on TPUs with unsupported compiler options, at your own risk. See
      mllm_jax/train/step/compiler.py.
    """

    seed: Seed = 0
    grad_accum_steps: PositiveInt = 1
    loss_chunk: PositiveInt = CHUNK
    log_every: NonNegativeInt = 10
    evaluate_every: NonNegativeInt = 0
    num_eval_examples: PositiveInt = 256
    save_every: NonNegativeInt = 500
    max_to_keep: PositiveInt = 3
    verify: bool = True
    save_local_every: NonNegativeInt = 0
    local: str = ""
    spikes: SpikeConfig = SpikeConfig()
    patience: PositiveInt = 10
    watchdog: Annotated[float, Range(least=0, hint="Set 0 for no watchdog.")] = 600.0
    balance: BalanceConfig = BalanceConfig()
    async_gathers: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.save_local_every and not self.local:
            raise ValueError(
                f"save_local_every={self.save_local_every}: needs a folder. Set local to one on each process's disk."
            )


@dataclass(frozen=True)
class Stage(Config):
    """Settings in which a stage differs from the run (see `mllm_jax.train.runs.stages`). None: the run's value.

    after: name of the stage whose weights it starts from. "": the weights of `init`. None: the previous stage.
    algorithm, data, optim, lora, train, mesh: as in a `Run`. `optim.steps`, or `data.epochs`, sets the stage's length.
    """

    after: str | None = None
    algorithm: Any = None
    data: Any = None
    optim: OptimConfig | None = None
    lora: LoraConfig | None = None
    train: TrainConfig | None = None
    mesh: Mapping[str, AxisSize] | None = None


@dataclass(frozen=True)
class Run(Config):
    """A training run.

    model: ModelConfig, or DualConfig for image-text pairs. `rules` sets the sharding rules of its runtime.
    algorithm: training algorithm: SupervisedConfig, PreferenceConfig, RewardConfig or PpoConfig; for a DualConfig
      ContrastiveConfig (see `mllm_jax.train.algorithms`).
    data: FilesData, MixtureData, ScenesData or CaptionsData.
    init: initial weights: folder or hub name of published weights, or folder of a run. "": random weights.
    parts: instead of `init`, folder or hub name per part: "encoder", "connector", "decoder"; for a DualConfig
      "encoder", "text" (see `mllm_jax.train.checkpoint.components`).
    processor: folder or hub name of a tokenizer with its chat template, or "scenes". "": that of `init`, or of the
      decoder's folder.
    optim: optimizer. `optim.steps` sets the length of the run. 0: `data.epochs` sets it.
    lora: adapters to train instead of the weights (see `mllm_jax.nn.lora`). Rank 0: none.
    preset: mesh and rules to start from (see `mllm_jax.sharding.presets`).
    mesh: number of devices along each mesh axis (see `mllm_jax.sharding.mesh.make_mesh`). -1: all remaining
      devices.
    rules: mesh axes of each logical axis of weights and activations (see `mllm_jax.sharding.presets`). A config file
      sets only differences of mesh and rules from the preset; `read_run` returns all of them.
    stages: stages of the run, trained one after the other. Empty: a run without stages.
    """

    model: Any
    data: Any
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    algorithm: Any = SupervisedConfig()
    init: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)
    processor: str = ""
    preset: str = "fsdp"
    mesh: Mapping[str, AxisSize] = field(default_factory=dict)
    rules: Mapping[str, Annotated[Any, MeshAxes()]] = field(default_factory=dict)
    stages: Mapping[str, Stage] = field(default_factory=dict)

    @property
    def taken(self) -> dict[str, str]:
        """The entries of `parts` with a folder."""
        return {part: source for part, source in self.parts.items() if source}

    @property
    def first_weights(self) -> str:
        """The setting that determines the initial weights, such as `config.init='folder'`, for messages."""
        if self.taken:
            return f"config.parts={self.taken}"
        return f"config.init={self.init!r}" if self.init else f"config.train.seed={self.train.seed}"


def run_config(run: Run) -> ConfigDict:
    """Returns a run as the ConfigDict that a config file returns.

    Every mesh axis and rule has a field; those equal to the preset's follow `config.preset`. Every stage has all its
    fields; those equal to the run's follow the run's, which the command line may set. Model fields that `read_run` sets
    (rules, adapters, value head) are left out.
    """
    run = _with_all_of_preset(dataclasses.replace(run, parts=dict.fromkeys(_parts_of(run), "") | run.parts))
    previous = dict(zip(run.stages, ["", *run.stages]))
    config = to_config_dict(
        dataclasses.replace(
            run, stages={name: filled(run, stage, previous[name]) for name, stage in run.stages.items()}
        )
    )
    with config.unlocked():
        del config.model.runtime["rules"], config.model["lora"]
        if "value_head" in config.model:  # of language models; the algorithm sets it
            del config.model["value_head"]
        for part, names in OF_PRESETS.items():
            for name in names:
                of_preset = partial(_of_preset, part, name)
                if config[part][name] == of_preset(run.preset):
                    config[part][name] = following(config.get_ref("preset"), of_preset)
        for stage in config.stages.values():
            for part in PARTS_OF_STAGES:
                follow(stage[part], config[part])
    return config


OF_PRESETS = {"mesh": MESH_AXES, "rules": tuple(LOGICAL_AXIS_RULES)}


def _of_preset(part: str, name: str, preset: str) -> Any:
    """Returns the value of a mesh axis or a rule in a preset."""
    if preset not in PRESETS:
        raise ConfigError(f"config.preset: there is no {preset!r}; {suggestion(preset, PRESETS)}")
    return PRESETS[preset][part].get(name, 1 if part == "mesh" else None)


def _with_all_of_preset(run: Run) -> Run:
    """Returns the run with the preset's values for the mesh axes and rules that it does not set."""
    of_preset = {
        part: {name: _of_preset(part, name, run.preset) for name in names} for part, names in OF_PRESETS.items()
    }
    return dataclasses.replace(run, **{part: values | getattr(run, part) for part, values in of_preset.items()})


def filled(run: Run, stage: Stage, before: str) -> Stage:
    """Returns the stage with unset values taken from the run, `after` from `before`, and all mesh axes."""
    parts = {part: getattr(stage, part) for part in PARTS_OF_STAGES}
    parts = {part: getattr(run, part) if value is None else value for part, value in parts.items()}
    parts["mesh"] = dict.fromkeys(run.mesh, 1) | dict(parts["mesh"])
    return Stage(after=before if stage.after is None else stage.after, **parts)


def _parts_of(run: Run) -> tuple[str, ...]:
    """Returns the names of the model parts that `parts` may set."""
    return ("encoder", "text") if isinstance(run.model, DualConfig) else ("encoder", "connector", "decoder")


def processor_source(processor: str, init: str, parts: Mapping[str, str]) -> str:
    """Returns the folder or hub name of the processor of a run with these fields."""
    return processor or init or parts.get("decoder") or parts.get("text") or ""


def follow(section: ConfigDict, leader: ConfigDict) -> None:
    """Makes every value of `section` that equals the leader's a reference to it, until it is set itself."""
    for name in section:
        if name not in leader or type(section[name]) is not type(leader[name]):
            continue
        if isinstance(section[name], ConfigDict) and section[name]:
            follow(section[name], leader[name])
        elif section[name] == leader[name]:
            with section.ignore_type():
                section[name] = leader.get_oneway_ref(name)


def read_run(config: ConfigDict) -> Run:
    """Inverts `run_config`. Raises ConfigError with the path of an invalid setting."""
    run = _with_all_of_preset(from_config_dict(Run, config, PARTS, "config"))
    if not isinstance(run.model, ModelConfig | DualConfig):
        raise ConfigError("config.model.type: must be ModelConfig or DualConfig.")
    _check_algorithm(run, "config")  # of a run with stages too, although each stage may have another algorithm
    for path, family, names in _families(run.model):
        if family not in names:
            raise ConfigError(f"config.{path}={family!r}: must be one of {', '.join(names)}.")
    run = dataclasses.replace(run, stages={name: filled(run, stage, "") for name, stage in run.stages.items()})
    if unknown := sorted(set(run.parts) - set(_parts_of(run))):
        raise ConfigError(f"config.parts: there is no {unknown[0]!r}; {suggestion(unknown[0], _parts_of(run))}")
    if run.init and run.taken:
        raise ConfigError(f"config.parts={run.taken}: config.init={run.init!r} is set too. Leave one of them empty.")
    for name, stage in run.stages.items():
        _check(run, stage, f"config.stages.{name}")
    if not run.stages:
        _check(run, run, "config")
    values = {"value_head": True} if run.algorithm.value_head else {}
    model = dataclasses.replace(with_rules(run.model, run.rules), lora=run.lora, **values)
    lora = dataclasses.replace(
        run.lora, modules_to_save=(*run.lora.modules_to_save, f"^{VALUE_HEAD}/")
    )  # the value head is trained with adapters, too
    optim = dataclasses.replace(run.optim, freeze=(lora if values else run.lora).freezes(run.optim.freeze))
    return dataclasses.replace(run, model=model, optim=optim)


def _families(model: ModelConfig | DualConfig) -> Iterator[tuple[str, str, Iterable[str]]]:
    """Yields the fields of a model that name a family, with their values and the allowed values."""
    yield "model.family", model.family, FAMILIES
    if isinstance(model, ModelConfig) and model.decoder is not None and model.decoder.family:
        yield "model.decoder.family", model.decoder.family, TEXT


def _check(run: Run, stage: Run | Stage, path: str) -> None:
    _check_algorithm(stage, path)
    if not isinstance(run.model, stage.algorithm.model):
        raise ConfigError(
            f"{path}.algorithm.type={type(stage.algorithm).__name__}: trains a {stage.algorithm.model.__name__}, and "
            f"config.model is a {type(run.model).__name__}. Set {' or '.join(_algorithms(type(run.model)))}."
        )
    if not isinstance(stage.data, DataConfig):
        raise ConfigError(f"{path}.data.type: must be FilesData, MixtureData, ScenesData or CaptionsData.")
    if not stage.optim.steps and stage.data.epochs is None:
        or_epochs = "" if isinstance(stage.data, MixtureData) else f" or {path}.data.epochs"
        raise ConfigError(f"{path}.optim.steps=0: the data have no end. Set {path}.optim.steps{or_epochs}.")
    if stage.data.batch % stage.train.grad_accum_steps:
        raise ConfigError(
            f"{path}.train.grad_accum_steps={stage.train.grad_accum_steps} must divide "
            f"{path}.data.batch={stage.data.batch}."
        )
    if run.model.encoder is None and stage.data.budget.patch_rows:
        raise ConfigError(f"{path}.data.patch_rows={stage.data.patch_rows}: the model has no encoder. Set it to 0.")
    if (
        isinstance(run.model, ModelConfig)
        and stage.data.budget.patch_rows
        and stage.data.patches_per_row % run.model.merge**2
    ):
        raise ConfigError(
            f"{path}.data.patches_per_row={stage.data.patches_per_row}: must be a multiple of {run.model.merge**2}: "
            f"config.model.connector makes a visual token of {run.model.merge} x {run.model.merge} patches."
        )
    if isinstance(run.model, ModelConfig) and run.model.queries and stage.data.budget.patch_rows:
        if not stage.data.images_per_row:
            raise ConfigError(
                f"{path}.data.images_per_row=0: config.model.connector has {run.model.queries} queries for every image "
                "and needs the largest number of images in a patch row. Set it, for example to 8."
            )
        if run.model.reads_instructions and not 0 < stage.data.instruction_tokens <= run.model.connector.positions:
            raise ConfigError(
                f"{path}.data.instruction_tokens={stage.data.instruction_tokens}: config.model.connector reads an "
                f"instruction with every image. Set a number up to {run.model.connector.positions}, for example 64."
            )
    if isinstance(run.model, ModelConfig) and 0 < getattr(run.model.decoder, "positions", 0) < stage.data.tokens:
        raise ConfigError(
            f"{path}.data.tokens={stage.data.tokens}: must be at most config.model.decoder.positions="
            f"{run.model.decoder.positions}, because positions are learned and a conversation may fill a row."
        )
    stage.algorithm.check(stage, path)


def _check_algorithm(run: Run | Stage, path: str) -> None:
    if not isinstance(run.algorithm, AlgorithmConfig):
        raise ConfigError(f"{path}.algorithm.type: must be one of {', '.join(_algorithms(AlgorithmConfig))}.")


def _algorithms(model: type) -> list[str]:
    """Returns the types of `config.algorithm` that train models of a type, or all types for AlgorithmConfig."""
    types = [(name, part) for name, part in PARTS.items() if issubclass(part, AlgorithmConfig)]
    return [name for name, part in types if model is AlgorithmConfig or part.model is model]


def with_rules(model: ModelConfig | DualConfig, rules: Mapping[str, Any]) -> ModelConfig | DualConfig:
    """Returns the model with other sharding rules."""
    return dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, rules=freeze_rules(rules)))


def updates_of(run: Run) -> OptimConfig:
    """Returns the run's `optim` with steps and warmup in weight updates, of which a PPO step has several."""
    optim, count = run.optim, run.algorithm.updates_per_step
    return dataclasses.replace(optim, steps=optim.steps * count, warmup=optim.warmup * count)


def train_context(run: Run, mesh: Mesh) -> TrainContext:
    """Returns the context from which the run's step and state are made."""
    options = {name: getattr(run.train, name) for name in ("grad_accum_steps", "balance", "async_gathers", "seed")}
    return TrainContext(run.model, updates_of(run), mesh, **options)
