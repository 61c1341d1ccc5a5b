"""The commands in README, CONTRIBUTING and docs/: each is run, as far as this machine can, or at least understood.

Those that need no files run, with few steps where they train. Those that begin with published weights, which are not
here, run until they ask for them. What this repository does not own (gcloud, kubectl, squeue ...) is compared with what
the launchers make.
"""

import importlib.util
import json
import os
import re
import shlex

import pytest
import source_files
from document_runs import FEW_STEPS, run
from documents import COMMANDS, CONFIGS, PAGES, ROOT, RUN_AT_ONCE, blocks_of

from launch.checks import read_training
from mllm_jax.common.config import ConfigError, to_config_dict
from mllm_jax.model.vlm import abstract_params
from mllm_jax.train.run_stages import train_run
from mllm_jax.train.runs.command import read_config
from mllm_jax.train.runs.config import read_run
from mllm_jax.train.runs.stages import names_in_order, one_run
from mllm_jax.train.step.optimizer import make_optimizer

OURS = [
    (page, command)
    for page, command in COMMANDS
    if re.search(r"\bpython (-m (mllm_jax|launch)\b|benchmarks/)", command)
]
TRAIN = "python -m mllm_jax.train "
FETCHING = [(page, command) for page, command in OURS if command.startswith(TRAIN) and "runs/" in command]


def words_of(command):
    """The words after the name of the program."""
    words = shlex.split(command)
    words = words[words.index("python") + 1 :]
    return words[1 + (words[0] == "-m") :]


def program(command):
    """The source of the module, the package or the script that a command runs."""
    found = re.search(r"python (?:-m ([\w.]+)|(\S+)\.py)", command)
    module = ROOT.joinpath(*(found[1].split(".") if found[1] else found[2].split("/")))
    files = [path for path in [*module.glob("*.py"), module.with_suffix(".py")] if path.is_file()]
    assert files, f"there is no program {module}"
    return "".join(path.read_text() for path in files)


def test_commands_of_other_programs_are_known():
    """A new one needs a test of its own, or a place in `OTHERS`."""
    found = {program_of(command) for page, command in COMMANDS if (page, command) not in OURS}
    assert found == set(OTHERS)


def program_of(command):
    return FRAGMENT if command.startswith(FRAGMENT) else command.split()[0]


# tests/configs/test_sft_folder.py begins with a model in a folder, which the pages have none of.
NAMED = {
    f"configs/{name}.py:FOLDER": f"configs/{name}.py:qwen3_vl/2b --config.init=FOLDER"
    for name in ("sft", "dpo", "reward", "rlhf")
}


def config_of(words):
    """The config of a command, with what it replaces."""
    file = words[words.index("--config") + 1]
    return read_config([f"--config={file}", *(word for word in words if word.startswith("--config."))])


def flags_of(command):
    return dict(word.removeprefix("--").partition("=")[::2] for word in shlex.split(command) if word.startswith("--"))


def check_cloud(command, launches):
    """The zone, the machines and the bucket are those that the launchers are given, and the image's file is here."""
    values = flags_of(command)
    assert (
        values.get("location", "us-east5") == "us-east5" and values.get("node-locations", "us-east5-b") == "us-east5-b"
    )
    if "tpu-topology" in values:
        [number] = {option for option in re.findall(r"--num-nodes=(\d+)", command)}
        assert f"--tpu v6e:{values['tpu-topology']} " in launches and int(number) == 16
    for bucket in re.findall(r"gs://([\w-]+)", command):
        assert f"--bucket {bucket} " in launches


def check_docker(command, launches):
    words = shlex.split(command)
    if "--file" in words:
        assert (ROOT / words[words.index("--file") + 1]).is_file()
    [image] = [word for word in words if "/images/" in word]
    assert f"--image {image} " in launches


def check_kubectl(command, launches):
    """The names of the pods, of their account and of the JobSet are those of the manifest."""
    [words] = [words for words in launches.splitlines() if "launch.gke --dry_run" in words]
    options = shlex.split(words)
    assert ["--name", "scenes"] == options[options.index("--name") :][:2] and "--account trainer " in words
    assert not command.startswith("kubectl delete") or command == "kubectl delete jobset scenes"
    assert not command.startswith("kubectl create serviceaccount") or command.endswith(" trainer")
    if "--selector" in command:
        name, index = flags_of(command)["selector"].split(",")
        assert name == "jobset.sigs.k8s.io/jobset-name=scenes"
        source = (ROOT / "launch" / "gke.py").read_text()
        assert index.partition("=")[0] in source


def check_slurm(command, launches):
    """The log lies in the folder of the run. tests/launch/test_slurm.py cancels and requeues jobs."""
    if command.startswith("tail"):
        assert command == "tail -f runs/scenes/slurm-*.log" and "--workdir runs/scenes" in launches
    else:
        assert command in ("squeue --me", "scancel JOB", "scontrol requeue JOB")


def check_make(command, launches):
    assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text()


def check_pip(command, launches):
    """tests/docs/test_colab.py does it in an environment without the package."""
    assert command == "pip install -e ." and (ROOT / "setup.py").is_file()


def check_fragment(command, launches):
    """Arguments for a command above."""
    words = [*shlex.split(command), "--config.lora.rank=8"]
    run = read_run(config_of(["--config", "configs/scenes.py", *words]))
    assert len(run.lora.rank_pattern) == 2 and make_optimizer(run.optim, abstract_params(run.model))


FRAGMENT = "--config."
OTHERS = {
    "gcloud": check_cloud,
    "docker": check_docker,
    "kubectl": check_kubectl,
    **dict.fromkeys(("squeue", "tail", "scancel", "scontrol"), check_slurm),
    "make": check_make,
    "pip": check_pip,
    FRAGMENT: check_fragment,
}


@pytest.mark.parametrize("command", [command for page, command in COMMANDS if (page, command) not in OURS])
def test_a_command_of_another_program_fits_ours(command):
    """In what it shares with the launches of the pages: machines, names, files."""
    launches = "\n".join(f"{command} " for _, command in COMMANDS if "launch." in command)
    OTHERS[program_of(command)](command, launches)


@pytest.mark.parametrize(("page", "command"), [*OURS, *CONFIGS], ids=lambda text: text[:60])
def test_a_command_is_understood(page, command, monkeypatch):
    """Its flags exist, its config can be read with what it replaces, and has the stage that it names."""
    if "-m launch." in command:
        return  # tests/launch/test_launch.py gives them to the launchers
    monkeypatch.chdir(ROOT)
    for name, value in NAMED.items():
        command = command.replace(name, value)
    words, source = words_of(command), program(command)
    known = {"config", *re.findall(r'(?:DEFINE_\w+|add(?:_argument)?)\(\s*"(?:--)?([\w-]+)"', source)}
    names = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
    assert {name for name in names if not name.startswith("config.")} <= known
    if "--config" not in words:
        return
    config, stage = config_of(words), flags_of(command).get("stage")
    if "model" not in config:
        return  # what `plan certify` compares, see tests/plan/test_certify.py
    if command.startswith(TRAIN):
        assert read_training(words).workdir
    if stage is not None or not config.stages:
        read_run(one_run(config, stage))
    else:
        assert names_in_order(config) and read_run(config).stages


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of a reader of the pages: conversations, pairs of answers, captions and tables."""
    folder = tmp_path_factory.mktemp("docs")
    records = source_files.conversations()
    source_files.write_jsonl(folder / "plain", records)
    (folder / "plain" / "images").rename(folder / "images")
    text = "".join((folder / "plain" / f"set-{i}.jsonl").read_text() for i in range(2)).replace("images/", "")
    for name in ("conversations", "captions", "instructions", "questions"):
        (folder / f"{name}.jsonl").write_text(text)
    pair = {"prompt": "What is it?", "images": [], "chosen": "a cat", "rejected": "a dog"}
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair | {"id": f"p{i}"}) + "\n" for i in range(8)))
    (folder / "reference.jsonl").write_text("")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"Page {i}."}) + "\n" for i in range(20)))
    source_files.write_parquet(folder / "charts", records)
    (folder / "converted").mkdir()
    (folder / "converted" / "part.jsonl").write_text(text.replace('"c0-', '"../images/c0-'))
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


@pytest.mark.parametrize("command", [command for _, command in FETCHING], ids=lambda text: text[27:80])
def test_training_from_published_weights_gets_as_far_as_asking_for_them(command, folder, tmp_path, monkeypatch):
    """With the data of the page, which are opened. The hub is offline."""
    monkeypatch.chdir(folder)
    config = config_of(words_of(command))
    for stage in names_in_order(config) or [None]:
        assert len(read_run(one_run(config, stage)).data.source("train"))
    with pytest.raises((ConfigError, OSError), match="is not a folder here"):
        train_run(config, tmp_path / "run", flags_of(command).get("stage"))


def small(command):
    """Returns whether a command trains something that needs no files, or reads the result of such a command."""
    return ":tiny" in command or ("mllm_jax.evaluate" in command and "/tmp/" in command)


SMALL = [command for page, command in COMMANDS if page == "docs/training.md" and small(command)]


def in_turn(commands, folder):
    """Outputs of commands, run in one folder from the top of the page."""
    os.symlink(ROOT / "configs", folder / "configs")
    return [run(command.replace("/tmp/", f"{folder}/"), folder).stdout for command in commands]


def test_a_small_recipe_runs(tmp_path):
    (output,) = in_turn(SMALL[:1], tmp_path)
    assert "stage align, 1 of 2, from random weights" in output
    assert "stage instruct, 2 of 2, from the weights of" in output and "report.html" in output


@pytest.mark.slow
def test_small_commands_run_in_turn(tmp_path):
    outputs = in_turn(SMALL, tmp_path)
    assert len(outputs) == 4
    assert "instruct resumes at step 8 of 12" in outputs[1]
    assert all(output.startswith("all") for output in outputs[2:])


BENCHMARKS = sorted({name for _, command in OURS for name in re.findall(r"benchmarks/\w+\.py", command)})
PLANS = [command for _, command in OURS if "mllm_jax.plan --" in command]
ON_SCENES = [
    command
    for page, command in OURS
    if page not in RUN_AT_ONCE and command.startswith(TRAIN) and "/tmp/" in command and not small(command)
]


@pytest.mark.slow
@pytest.mark.parametrize("command", dict.fromkeys(ON_SCENES), ids=lambda text: text[27:90])
def test_training_on_the_embedded_scenes_runs(command, tmp_path):
    """With few steps. Those of the README and the pages like it run in tests/docs/test_readme.py."""
    config = config_of(words_of(command))
    few = [*FEW_STEPS, "--config.model.decoder.layers=1"]
    if config.stages:
        few = [f"--config.stages.{name}.optim.{value}" for name in config.stages for value in ("steps=1", "warmup=1")]
        few += [f"--config.stages.{name}.train.num_eval_examples=4" for name in config.stages]
    if "--profile_steps" in command:
        command = command.replace("10:13", "1:2")
    if "--stage=ppo" in command:  # it goes on from the stages before, which the command above trained
        return
    run(" ".join([command.replace("/tmp/", f"{tmp_path}/"), *few]), ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("command", dict.fromkeys(PLANS), ids=lambda text: text[26:])
def test_plans_are_made(command, tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu")
    if "h200" in command and not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        pytest.skip("needs jax's CUDA plugin")
    run(f"{command.replace('plan.html', f'{tmp_path}/plan.html')} --compile=0", ROOT)


@pytest.mark.slow
def test_the_first_run_on_this_machine_comes_to_its_end(tmp_path):
    """Runs the command of docs/pods.md unchanged."""
    [command] = [command for page, command in OURS if page == "docs/pods.md" and "launch.local" in command]
    assert "step 20/20" in run(command.replace("/tmp/", f"{tmp_path}/"), ROOT).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", sorted({found[0] for _, c in OURS if (found := re.findall(r"benchmarks/\w+\.py", c))})
)
def test_benchmarks_begin(script):
    """They take minutes each."""
    assert "usage:" in run(f"python {script} --help", ROOT).stdout


def test_the_config_of_the_page_is_one(monkeypatch):
    """The Python block of training.md is a config file."""
    monkeypatch.syspath_prepend(ROOT)
    (text,) = [text for language, text in blocks_of(PAGES["docs/training.md"]) if language == "python"]
    scope = {}
    exec(text, scope)
    run_of = read_run(scope["get_config"]())
    assert run_of.stages["align"].optim.freeze == ("encoder", "decoder") and run_of.stages["instruct"].data.batch == 16
    assert run_of.stages["instruct"].optim == run_of.optim
    assert to_config_dict(run_of.optim).learning_rate == 2e-3
