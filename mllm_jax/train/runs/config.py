"""What a run is made of: one tree of dataclasses, which a config file states.

`configs/*.py` return `run_config(Run(...))`; the loop, evaluation and generation read it back with `read_run`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mllm_jax.common.config import ConfigError, following, from_config_dict, to_config_dict
from mllm_jax.common.errors import suggestion
from mllm_jax.common.settings import Config, NonNegativeInt, OneOf, PositiveInt, Range, Seed
from mllm_jax.families import FAMILIES
from mllm_jax.families.decoders.by_model_type import TEXT
from mllm_jax.model.connectors.average_pool import AveragePoolConfig
from mllm_jax.model.connectors.mlp import MlpConnectorConfig
from mllm_jax.model.connectors.patch_merger import PatchMergerConfig
from mllm_jax.model.connectors.pixel_shuffle import PixelShuffleConfig
from mllm_jax.model.dual_encoder import AttentionPool, ClassPool, DualConfig
from mllm_jax.model.encoders.vit import VitConfig
from mllm_jax.model.vlm import ModelConfig
from mllm_jax.nn.attention.layer import AttentionConfig
from mllm_jax.nn.attention.mla import MlaConfig
from mllm_jax.nn.lora import LoraConfig
from mllm_jax.nn.rope import BlendedStretch, LinearStretch, ListedStretch, NtkStretch, YarnConfig
from mllm_jax.nn.value_head import NAME as VALUE_HEAD
from mllm_jax.sharding.logical_axes import MeshAxes, freeze_rules
from mllm_jax.sharding.mesh import MESH_AXES
from mllm_jax.sharding.presets import PRESETS, RULES
from mllm_jax.train.algorithms.contrastive import make_contrastive_step
from mllm_jax.train.algorithms.ppo import make_ppo_step
from mllm_jax.train.algorithms.preference import PairObjective
from mllm_jax.train.algorithms.reward import RewardConfig, RewardObjective
from mllm_jax.train.algorithms.supervised import CrossEntropy
from mllm_jax.train.losses.cross_entropy import WEIGHTINGS
from mllm_jax.train.losses.load_balance import BalanceConfig
from mllm_jax.train.losses.ppo import PpoConfig
from mllm_jax.train.losses.preference import BASE, FIRST, PreferenceConfig
from mllm_jax.train.monitor.spikes import SpikeConfig
from mllm_jax.train.runs.data import CaptionsData, DataConfig, ScenesData
from mllm_jax.train.runs.data_files import FilesData, MixtureData
from mllm_jax.train.step.optimizer import OptimConfig
from mllm_jax.train.step.train_step import make_train_step

PARTS = {
    part.__name__: part
    for part in (
        *(ModelConfig, DualConfig, ClassPool, AttentionPool),
        *(VitConfig, AveragePoolConfig, MlpConnectorConfig, PatchMergerConfig, PixelShuffleConfig),
        *(AttentionConfig, MlaConfig),
        *(LinearStretch, NtkStretch, BlendedStretch, ListedStretch, YarnConfig),
        *(FilesData, MixtureData, ScenesData, CaptionsData),
    )
}
AxisSize = Annotated[int, Range(least=1, also=(-1,))]  # of a mesh
PARTS_OF_STAGES = ("data", "optim", "lora", "train", "mesh")


@dataclass(frozen=True)
class TrainConfig(Config):
    """
    seed: of random parameters, and of what dropout leaves out.
    accumulate: parts that a batch is worked off in, to save memory; the result is that of the whole batch.
    weighting: "token", or "sqrt" (a conversation of n targets counts as sqrt(n)).
    loss_chunk: targets of a row whose logits are held at once.
    log_every, evaluate_every, save_every: in steps; 0 = at the end only.
    heldout: number of held-out conversations to evaluate on.
    keep: checkpoints that are kept.
    verify: whether checkpoints hold a fingerprint of every array, which is compared when they are read. It costs one
      pass over the state on the devices at every save.
    save_local_every, local: between these, every so many steps, each process saves what it holds in a folder on its own
      disk; 0 or no folder = it does not. See mllm_jax/train/checkpoint/local.py.
    spikes: of the loss, and whether to go back.
    patience: non-finite steps in a row that stop the run.
    watchdog: seconds without a finished step after which a run counts as hanging, and is ended; 0 = never.
    balance: how experts are kept evenly loaded, in models that have them.
    preference: what is learned from pairs of a chosen and a rejected answer, in place of every answer (see
      `mllm_jax.train.losses.preference`).
    reward: whether such pairs train a reward model (see `mllm_jax.train.algorithms.reward`).
    ppo: whether the model learns from answers of its own, which a reward model judges (see
      `mllm_jax.train.losses.ppo`).
    async_gathers: TPUs gather weights with options that only some accept: at your risk, see
      mllm_jax/train/step/compiler.py.
    """

    seed: Seed = 0
    accumulate: PositiveInt = 1
    weighting: Annotated[str, OneOf(WEIGHTINGS)] = "token"
    loss_chunk: PositiveInt = 512
    log_every: NonNegativeInt = 10
    evaluate_every: NonNegativeInt = 0
    heldout: PositiveInt = 256
    save_every: NonNegativeInt = 500
    keep: PositiveInt = 3
    verify: bool = True
    save_local_every: NonNegativeInt = 0
    local: str = ""
    spikes: SpikeConfig = SpikeConfig()
    patience: PositiveInt = 10
    watchdog: Annotated[float, Range(least=0, hint="Set 0 for no watchdog.")] = 600.0
    balance: BalanceConfig = BalanceConfig()
    preference: PreferenceConfig = PreferenceConfig()
    reward: RewardConfig = RewardConfig()
    ppo: PpoConfig = PpoConfig()
    async_gathers: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.save_local_every and not self.local:
            raise ValueError("save_local_every needs local=FOLDER, on a disk of each process's own")
        others = {"preference": self.preference.has_pairs, "reward": self.reward.learn, "ppo": bool(self.ppo.reward)}
        if len(wanted := [name for name, is_on in others.items() if is_on]) > 1:
            raise ValueError(f"{' and '.join(wanted)} cannot be learned at once: give each a stage of its own")
        if not self.ppo.reward and self.ppo != PpoConfig():
            raise ValueError(
                "ppo.reward must name the folder of a run that trained a reward model: without it is no PPO"
            )

    @property
    def has_values(self) -> bool:
        """Whether the model needs a value head."""
        return self.reward.learn or bool(self.ppo.reward)


@dataclass(frozen=True)
class Stage(Config):
    """What a part of a run does otherwise than the rest; what is None is that of the run (see
    `mllm_jax.train.runs.stages`).

    after: the stage whose weights it begins with, "" = those of `init`; None = the one that is named before it.
    data, optim, lora, train, mesh: as in a `Run`. `optim.steps`, or `data.epochs`, is the length of the stage.
    """

    after: str | None = None
    data: Any = None
    optim: OptimConfig | None = None
    lora: LoraConfig | None = None
    train: TrainConfig | None = None
    mesh: Mapping[str, AxisSize] | None = None


@dataclass(frozen=True)
class Run(Config):
    """
    model: ModelConfig, or DualConfig, which is trained on pairs of a picture and a text; its runtime's sharding rules
      are those of `rules`.
    data: FilesData, MixtureData, ScenesData or CaptionsData.
    init: folder or hub name of published weights to begin with, or the folder of a run; empty = random.
    parts: in place of `init`, folders or hub names of the published models that single parts are taken from: "encoder",
      "connector", "decoder", or of a DualConfig "encoder", "text" (see `mllm_jax.train.checkpoint.components`).
    processor: folder or hub name of a tokenizer with its chat template, or "scenes"; empty = that of `init`, or that of
      the decoder's folder.
    optim: `optim.steps` is the length of the run; 0 = as long as `data.epochs` last.
    lora: adapters that are trained in place of the weights (see `mllm_jax.nn.lora`); of rank 0 there are none.
    preset: of `mllm_jax.sharding.presets`: the mesh and the rules that the run begins with, and edits.
    mesh: devices along each axis of the mesh (see `mllm_jax.sharding.mesh.make_mesh`); -1 = those that are left.
    rules: on which axes of the mesh the named axes of weights and activations lie (see `mllm_jax.sharding.presets`). Of
      both, a config file states what differs from the preset; `read_run` gives all.
    stages: parts of the run that are trained one after the other; empty = the run is trained as it stands.
    """

    model: Any
    data: Any
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    init: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)
    processor: str = ""
    preset: str = "fsdp"
    mesh: Mapping[str, AxisSize] = field(default_factory=dict)
    rules: Mapping[str, Annotated[Any, MeshAxes()]] = field(default_factory=dict)
    stages: Mapping[str, Stage] = field(default_factory=dict)

    @property
    def taken(self) -> dict[str, str]:
        """The parts that come from folders of their own."""
        return {part: source for part, source in self.parts.items() if source}


def run_config(run: Run) -> ConfigDict:
    """A run as the ConfigDict that a config file returns. What its model takes from the run stands there alone.

    Every axis of the mesh and every rule has a field; those in which the run equals its preset follow `config.preset`.
    Every stage has all of its fields; those in which it equals the run follow what the command line sets there.
    """
    run = _with_all_of_preset(dataclasses.replace(run, parts=dict.fromkeys(_parts_of(run), "") | run.parts))
    before = dict(zip(run.stages, ["", *run.stages]))
    config = to_config_dict(
        dataclasses.replace(run, stages={name: filled(run, stage, before[name]) for name, stage in run.stages.items()})
    )
    with config.unlocked():
        del config.model.runtime["rules"], config.model["lora"]
        if "value" in config.model:  # of language models: what is learned says whether there are values
            del config.model["value"]
        for part, names in OF_PRESETS.items():
            for name in names:
                usual = partial(_of_preset, part, name)
                if config[part][name] == usual(run.preset):
                    config[part][name] = following(config.get_ref("preset"), usual)
        for stage in config.stages.values():
            for part in PARTS_OF_STAGES:
                follow(stage[part], config[part])
    return config


OF_PRESETS = {"mesh": MESH_AXES, "rules": tuple(RULES)}


def _of_preset(part: str, name: str, preset: str) -> Any:
    """What a preset says of an axis of the mesh, or of a rule."""
    if preset not in PRESETS:
        raise ConfigError(f"config.preset: there is no {preset!r}; {suggestion(preset, PRESETS)}")
    return PRESETS[preset][part].get(name, 1 if part == "mesh" else None)


def _with_all_of_preset(run: Run) -> Run:
    """The run, with what its mesh and its rules do not say."""
    usual = {part: {name: _of_preset(part, name, run.preset) for name in names} for part, names in OF_PRESETS.items()}
    return dataclasses.replace(run, **{part: values | getattr(run, part) for part, values in usual.items()})


def filled(run: Run, stage: Stage, before: str) -> Stage:
    """The stage, with what it does not say from the run and from the stage before it; all axes of a mesh are named."""
    parts = {part: getattr(stage, part) for part in PARTS_OF_STAGES}
    parts = {part: getattr(run, part) if value is None else value for part, value in parts.items()}
    parts["mesh"] = dict.fromkeys(run.mesh, 1) | dict(parts["mesh"])
    return Stage(after=before if stage.after is None else stage.after, **parts)


def _parts_of(run: Run) -> tuple[str, ...]:
    """The parts of the run's model that may come from folders of their own."""
    return ("encoder", "text") if isinstance(run.model, DualConfig) else ("encoder", "connector", "decoder")


def processor_source(processor: str, init: str, parts: Mapping[str, str]) -> str:
    """Where a run with these fields has its processor from."""
    return processor or init or parts.get("decoder") or parts.get("text") or ""


def follow(section: ConfigDict, leader: ConfigDict) -> None:
    """Lets every value of `section` that equals the leader's be the leader's, until it is set itself."""
    for name in section:
        if name not in leader or type(section[name]) is not type(leader[name]):
            continue
        if isinstance(section[name], ConfigDict) and section[name]:
            follow(section[name], leader[name])
        elif section[name] == leader[name]:
            with section.ignore_type():
                section[name] = leader.get_oneway_ref(name)


def read_run(config: ConfigDict) -> Run:
    """The inverse of `run_config`. Raises ConfigError, which names the path of what is wrong."""
    run = _with_all_of_preset(from_config_dict(Run, config, PARTS, "config"))
    if type(run.model) not in STEPS:
        raise ConfigError("config.model.type must be ModelConfig or DualConfig")
    for path, family, known in _families(run.model):
        if family not in known:
            raise ConfigError(f"config.{path}={family!r}: must be one of {', '.join(known)}.")
    run = dataclasses.replace(run, stages={name: filled(run, stage, "") for name, stage in run.stages.items()})
    if unknown := sorted(set(run.parts) - set(_parts_of(run))):
        raise ConfigError(f"config.parts: there is no {unknown[0]!r}; {suggestion(unknown[0], _parts_of(run))}")
    if run.init and run.taken:
        raise ConfigError(f"config.parts={run.taken} is in place of config.init={run.init!r}: leave one of them empty")
    for name, stage in run.stages.items():
        _check(run, stage, f"config.stages.{name}")
    if not run.stages:
        _check(run, run, "config")
    values = {"value": True} if run.train.has_values else {}
    model = dataclasses.replace(with_rules(run.model, run.rules), lora=run.lora, **values)
    trained = dataclasses.replace(run.lora, train=(*run.lora.train, f"^{VALUE_HEAD}/"))  # beside adapters, too
    optim = dataclasses.replace(run.optim, freeze=(trained if values else run.lora).freezes(run.optim.freeze))
    return dataclasses.replace(run, model=model, optim=optim)


def _families(model: ModelConfig | DualConfig) -> Iterator[tuple[str, str, Iterable[str]]]:
    """Fields of a model that name its family, with their values and the values that are allowed."""
    yield "model.family", model.family, FAMILIES
    if isinstance(model, ModelConfig) and model.decoder is not None and model.decoder.family:
        yield "model.decoder.family", model.decoder.family, TEXT


def _check(whole: Run, run: Run | Stage, path: str) -> None:
    if not isinstance(run.data, DataConfig):
        raise ConfigError(f"{path}.data.type must be FilesData, MixtureData, ScenesData or CaptionsData")
    if not run.optim.steps and run.data.epochs is None:
        or_epochs = "" if isinstance(run.data, MixtureData) else f" or {path}.data.epochs"
        raise ConfigError(f"{path}.optim.steps=0: the data have no end. Set {path}.optim.steps{or_epochs}")
    if run.data.batch % run.train.accumulate:
        raise ConfigError(
            f"{path}.train.accumulate={run.train.accumulate} must divide {path}.data.batch={run.data.batch}"
        )
    if isinstance(whole.model, DualConfig) and run.train.accumulate > 1:
        raise ConfigError(f"{path}.train.accumulate must be 1: every pair of a batch is compared with all others")
    if isinstance(whole.model, DualConfig) and run.lora.drops:
        raise ConfigError(f"{path}.lora.dropout must be 0: training on pairs of a picture and a text drops nothing")
    if whole.model.encoder is None and run.data.budget.rows:
        raise ConfigError(f"{path}.data.rows must be 0: the model has no encoder, so that it sees no pictures")
    if isinstance(whole.model, ModelConfig) and run.data.budget.rows and run.data.patches % whole.model.merge**2:
        raise ConfigError(
            f"{path}.data.patches={run.data.patches} must be a multiple of {whole.model.merge**2}: "
            f"config.model.connector makes a visual token of {whole.model.merge} x {whole.model.merge} patches"
        )
    if isinstance(whole.model, ModelConfig) and 0 < getattr(whole.model.decoder, "positions", 0) < run.data.tokens:
        raise ConfigError(
            f"{path}.data.tokens={run.data.tokens}: must be at most config.model.decoder.positions="
            f"{whole.model.decoder.positions}, which are learned: a conversation may fill a row"
        )
    preference = run.train.preference
    if preference.has_pairs and preference.reference == BASE and (not run.lora.rank or run.lora.train):
        raise ConfigError(
            f"{path}.train.preference.reference={BASE!r} is the model without its adapters, which needs "
            f"{path}.lora.rank and no {path}.lora.train; {FIRST!r} keeps a copy of the first weights"
        )
    if preference.has_pairs and isinstance(whole.model, DualConfig):
        raise ConfigError(f"{path}.train.preference is for models that answer; a dual encoder does not")
    if preference.has_pairs and run.train.weighting != "token":
        raise ConfigError(f"{path}.train.weighting={run.train.weighting!r} has no meaning for pairs of answers")
    if run.train.has_values:
        _check_values(whole, run, path)


def _check_values(whole: Run, run: Run | Stage, path: str) -> None:
    """Of a run that trains a reward model, or with one."""
    ppo, what = run.train.ppo, "reward" if run.train.reward.learn else "ppo"
    if isinstance(whole.model, DualConfig):
        raise ConfigError(f"{path}.train.{what} is for models that answer; a dual encoder does not")
    if run.train.weighting != "token":
        raise ConfigError(f"{path}.train.weighting={run.train.weighting!r} has no meaning for {path}.train.{what}")
    if what == "reward":
        return
    if run.data.batch % (ppo.minibatches * run.train.accumulate):
        raise ConfigError(
            f"{path}.train.ppo.minibatches={ppo.minibatches} times accumulate={run.train.accumulate} must divide "
            f"{path}.data.batch={run.data.batch}"
        )
    if run.lora.drops:
        raise ConfigError(f"{path}.lora.dropout must be 0 for PPO, which compares a model with what it was before")
    if ppo.reference == BASE and (not run.lora.rank or run.lora.train):
        raise ConfigError(
            f"{path}.train.ppo.reference={BASE!r} is the model without its adapters, which needs {path}.lora.rank and "
            f"no {path}.lora.train; {FIRST!r} keeps a copy of the first weights"
        )


def with_rules(model: ModelConfig | DualConfig, rules: Mapping[str, Any]) -> ModelConfig | DualConfig:
    """The model under other sharding rules."""
    return dataclasses.replace(model, runtime=dataclasses.replace(model.runtime, rules=freeze_rules(rules)))


def train_step(run: Run, tx: optax.GradientTransformation, mesh: Mesh) -> Callable:
    """The step that a run takes, by the kind of its model, see STEPS; `tx` of `make_optimizer`."""
    return STEPS[type(run.model)](run, tx, mesh)


def updates_of(run: Run) -> OptimConfig:
    """The run's `optim`, whose steps and warm-up are updates of the weights: of PPO a step has several."""
    optim, count = run.optim, run.train.ppo.updates if run.train.ppo.reward else 1
    return dataclasses.replace(optim, steps=optim.steps * count, warmup=optim.warmup * count)


def objective_of(run: Run) -> CrossEntropy | PairObjective | RewardObjective:
    """What a run of a language model minimises, if it is not PPO."""
    train = run.train
    if train.reward.learn:
        return RewardObjective(run.model, train.reward)
    if train.preference.has_pairs:
        return PairObjective(run.model, train.preference, train.loss_chunk)
    return CrossEntropy(run.model, train.weighting, train.loss_chunk)


def _language_step(run: Run, tx: optax.GradientTransformation, mesh: Mesh) -> Callable:
    options = {name: getattr(run.train, name) for name in ("accumulate", "balance", "async_gathers", "seed")}
    if run.train.ppo.reward:
        return make_ppo_step(run.model, run.train.ppo, tx, updates_of(run), mesh, chunk=run.train.loss_chunk, **options)
    return make_train_step(run.model, tx, run.optim, mesh, objective=objective_of(run), **options)


def _contrastive_step(run: Run, tx: optax.GradientTransformation, mesh: Mesh) -> Callable:
    return make_contrastive_step(run.model, tx, run.optim, mesh)


STEPS = {ModelConfig: _language_step, DualConfig: _contrastive_step}
