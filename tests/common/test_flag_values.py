"""Values of flags that cannot be read: one line that names the flag and the form that it has."""

import pytest
from absl import flags
from paths import ROOT

from launch import gke, slurm, xpk
from mllm_jax.common.config import ConfigError
from mllm_jax.data.__main__ import main as data
from mllm_jax.families.__main__ import main as models
from mllm_jax.plan.hardware.topology import get_topology
from mllm_jax.plan.search import read_mesh
from mllm_jax.plan.verify.certificate import read_mesh as certified_mesh
from mllm_jax.train.monitor import processes
from mllm_jax.train.monitor.profiler import steps_of
from mllm_jax.train.runs.command import read_config

SCENES = str(ROOT / "configs" / "scenes.py")


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (data, ["convert", "a", "b", "--where", "split"], "argument --where: needs FIELD=VALUE, not 'split'"),
        (data, ["convert", "a", "b", "--where", "=x"], "argument --where: needs FIELD=VALUE, not '=x'"),
        (data, ["convert", "a", "b", "--records=x"], "argument --records: 'x': needs an integer"),
        (slurm.main, ["--time=1week"], "argument --time: '1week' is not a time; write [DAYS-]HOURS:MINUTES:SECONDS"),
        (slurm.main, ["--time="], "argument --time: '' is not a time; write [DAYS-]HOURS:MINUTES:SECONDS"),
        (xpk.main, ["--mount=runs"], "argument --mount: 'runs' is not a folder of the hosts: begin with /"),
        (gke.main, ["--gpu=h200:²"], "argument --gpu: 'h200:²': hosts have 8 GPUs; write h200:N"),
        (data, ["inspect", "--config", "a", "--html="], "argument --html: needs FILE, not an empty name"),
        (models, ["--image"], "argument --image: needs WIDTHxHEIGHT; if it begins with a hyphen, write --image="),
        (models, ["--image", "-3x4"], "argument --image: needs WIDTHxHEIGHT; "),
    ],
)
def test_a_value_of_another_form_is_one_line(main, words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"error: {said}") and error.endswith("; run with --help\n")
    assert error.count("\n") == 1 and ".;" not in error


@pytest.mark.parametrize("text", ["24:00:00", "90", "90:30", "2-12", "2-12:30", "2-12:30:00", "UNLIMITED"])
def test_times_of_slurm(text):
    assert slurm.duration(text) == text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("mesh=fsdp", "needs names with values, as in {'name': 1}, not 'fsdp'"),
        ("data.kinds={'color': 1.0", "needs names with values, as in {'name': 1}, not \"{'color': 1.0\""),
        ("optim.freeze=(1,", "needs a list, as in ('first', 'second'), not (1,"),
        ("data.text_only=maybe", "needs true or false, not 'maybe'"),
        ("optim.steps=1e3", "needs an integer, not '1e3'"),
        ("optim.learning_rate=", "needs a number, not ''"),
    ],
)
def test_a_value_of_a_config_of_another_form_is_one_line(override, said):
    with pytest.raises(ConfigError) as error:
        read_config(["--config", SCENES, f"--config.{override}"])
    assert str(error.value) == f"flag --config.{override}: {said}"


def test_an_empty_value_is_not_taken_for_none():
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "A folder.", flag_values=values)
    with pytest.raises(ConfigError, match="^--workdir is empty\. Give it a value, or leave it out\.$"):
        read_config(["--config", SCENES, "--workdir=", "--config.init="], values)


@pytest.mark.parametrize("text", ["nohost", "localhost:", "localhost:port", ":1234", "localhost:99999", "a:0", "a:1:2"])
def test_a_coordinator_is_a_host_and_a_port(text):
    with pytest.raises(ConfigError, match=r"^--coordinator=.* must be HOST:PORT, such as 10\.0\.0\.1:1234\.$"):
        processes.join(text, 2, 0, detect=False)


@pytest.mark.parametrize("text", ["10.0.0.1:1234", "node-1.cluster:65535", "[::1]:1234"])
def test_coordinators(text, monkeypatch):
    joined = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *arguments, **_: joined.append(arguments))
    processes.join(text, 2, 0, detect=False)
    assert joined == [(text, 2, 0)]


@pytest.mark.parametrize("text", ["", "10", "10:", "a:b", "-1:5", "1:2:3", "13:10", "0:5"])
def test_steps_of_a_trace(text):
    with pytest.raises(ConfigError, match=f"^--profile_steps={text} must be FIRST:LAST"):
        steps_of(text)


def test_digits_are_decimal():
    """A superscript is a digit to `str.isdigit`, and no number to `int`."""
    with pytest.raises(ConfigError, match="config.meshes: 'fsdp=²' is not written as in 'fsdp=2,tensor=4'"):
        certified_mesh("fsdp=²")
    with pytest.raises(ValueError, match="a mesh is written as in fsdp=16,expert=16"):
        read_mesh("fsdp=²", get_topology("h200:8", compiler=False))
    for text in ("v5p:4x4x²", "v6e:4x4*²", "h200:²"):
        with pytest.raises(ConfigError, match="TPUs are v4"):
            get_topology(text, compiler=False)
