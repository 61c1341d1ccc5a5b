"""Checkpoints: complete or absent, restored on any mesh, with the config and the position in the data."""

import shutil

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from tiny_run import get_config

from mllm_jax.common.config import ConfigError
from mllm_jax.sharding.mesh import make_mesh
from mllm_jax.train.checkpoint.damage import Damaged, read_sealed, sealed
from mllm_jax.train.checkpoint.manager import Checkpoints
from mllm_jax.train.checkpoint.restore import read_config, restore_params
from mllm_jax.train.checkpoint.tiers import Tiers
from mllm_jax.train.runs.config import read_run, train_context
from mllm_jax.train.step.context import init_state
from mllm_jax.train.step.state import abstract_state, state_shardings

CONFIG = get_config()
RUN = read_run(CONFIG)
CHANGES = {"algorithm.type": "PreferenceConfig", "optim.name": "adafactor", "processor": "elsewhere"} | {
    f"data.{name}": value
    for name, value in dict(
        seed=5, batch=16, tokens=128, patch_rows=2, patches_per_row=64, window=2.0, streams=4, text_only=True,
        min_pixels=64, max_pixels=4096, cell=32, min_cells=4, max_cells=6,
    ).items()
} | {"data.kinds.color": 0.5, "model.decoder.mlp": 64}  # fmt: skip
TX = train_context(RUN, make_mesh()).tx
ABSTRACT = abstract_state(RUN.model, TX)

NOTES = {"at": 1e9, "seconds": {"steps": 5.0}}


def layout(mesh):
    return state_shardings(RUN.model, TX, mesh, RUN.model.runtime.rules)


def position(step):
    """Position of a loader in the data."""
    return {"streams": {str(number): {"next": step + number, "waiting": [1, 2]} for number in range(11)}, "data": {}}


@pytest.fixture(scope="module")
def state():
    """A state that is not all zeros, on eight devices."""
    fresh = init_state(train_context(RUN, make_mesh({"fsdp": 8})), jax.random.key(1))
    busy = jax.tree.map(lambda x: x + 0.5 if x.dtype == np.float32 else x + 3, fresh.opt_state)
    return fresh._replace(opt_state=busy, step=fresh.step + 7, bad=fresh.bad + 1)


@pytest.fixture
def saved(state, tmp_path):
    checkpoints = Checkpoints(tmp_path, max_to_keep=2)
    for step in (5, 6, 7):
        checkpoints.save(step, state, CONFIG, position(step), NOTES)
    checkpoints.close()
    return tmp_path


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 2, "data": 4}])
def test_a_state_is_restored_on_any_mesh(saved, state, shape):
    wanted = layout(make_mesh(shape))
    found, found_position, notes = Checkpoints(saved).restore(CONFIG, ABSTRACT, wanted)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found, state)
    assert all(x.sharding.is_equivalent_to(y, x.ndim) for x, y in zip(*map(jax.tree.leaves, (found, wanted))))
    assert found_position == position(7) and notes == NOTES


def test_the_newest_are_kept(saved):
    assert Checkpoints(saved).latest() == 7
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["6", "7"]


def test_half_a_checkpoint_is_not_read_and_is_removed(saved, state):
    half = (saved / "checkpoints" / "7").rename(saved / "checkpoints" / "7.orbax-checkpoint-tmp")
    (half / "commit_success.txt").unlink()
    assert read_config(saved, 6) == read_config(saved)
    checkpoints = Checkpoints(saved)
    assert checkpoints.latest() == 6
    checkpoints.save(7, state, CONFIG, position(7), NOTES)
    checkpoints.close()
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["6", "7"]


def test_parameters_alone_for_generation(saved, state):
    model, params = restore_params(saved, step=6)
    assert model == RUN.model
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(params))
    _, spread = restore_params(saved, mesh=make_mesh({"tensor": 2, "fsdp": 4}))
    assert len(spread["decoder"]["embed"].sharding.device_set) == 8


def test_a_checkpoint_carries_its_config(saved):
    assert read_config(saved) == RUN


def test_missing_checkpoints_are_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 9; there are \[6, 7\]"):
        restore_params(saved, step=9)
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="young has no checkpoint yet"):
        restore_params(tmp_path / "young")
    with pytest.raises(FileNotFoundError, match="not the folder of a training run"):
        restore_params(tmp_path / "nowhere")


def test_harmless_settings_may_change(saved):
    config = CONFIG.copy_and_resolve_references()
    config.train.log_every, config.optim.learning_rate, config.model.runtime.remat = 1, 1e-5, "full"
    config.data.update(workers=7, processes=1, prefetch=0, fail_on_bad_record=True, max_bad_fraction=0.5, epochs=3)
    Checkpoints(saved).restore(config, ABSTRACT, layout(make_mesh()))


def test_what_gives_the_checkpoint_another_meaning_is_refused(saved):
    """The shapes of the state, and which conversations come next."""
    checkpoints, wanted = Checkpoints(saved), layout(make_mesh())
    for path, value in CHANGES.items():
        config = CONFIG.copy_and_resolve_references()
        config.update_from_flattened_dict({path: value})
        with pytest.raises(ConfigError, match=rf"config.{path} was .*, is {value}\. Use another --workdir"):
            checkpoints.restore(config, ABSTRACT, wanted)


def tiers(workdir, shape=None):
    return Tiers(workdir, 2, str(workdir / "disk"), True, ABSTRACT, layout(make_mesh(shape or {"fsdp": 8})))


@pytest.fixture
def two_tiers(state, tmp_path):
    """Checkpoints of steps 5 and 6 in the shared tier, and 6, 7 and 8 in the local one."""
    checkpoints = tiers(tmp_path)
    for step in (5, 6):
        checkpoints.save(step, state, CONFIG, position(step), NOTES)
    for step in (6, 7, 8):
        checkpoints.save_local(step, state, CONFIG, position(step), NOTES | {"step": step})
    checkpoints.close()
    return tmp_path


def test_saves_do_not_ask_whether_the_run_shall_stop(state, tmp_path, monkeypatch):
    """jax's preemption service takes each question for a step that was begun: the run alone may ask."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    checkpoints = tiers(tmp_path)
    checkpoints.save(1, state, CONFIG, position(1), NOTES)
    checkpoints.save_local(2, state, CONFIG, position(2), NOTES)
    checkpoints.close()
    assert asked == [] and tiers(tmp_path).latest() == 2


def test_the_newest_of_two_tiers_wins(two_tiers, state):
    checkpoints = tiers(two_tiers)
    assert checkpoints.latest() == 8 and checkpoints.local.steps() == [7, 8]
    found = checkpoints.restore(CONFIG)
    jax.tree.map(np.testing.assert_array_equal, found.state, state)
    wanted = layout(make_mesh({"fsdp": 8}))
    assert all(x.sharding.is_equivalent_to(y, x.ndim) for x, y in zip(*map(jax.tree.leaves, (found.state, wanted))))
    assert found.position == position(8) and found.notes == NOTES | {"step": 8}
    changed = CONFIG.copy_and_resolve_references()
    changed.data.seed = 5
    with pytest.raises(ConfigError, match="config.data.seed was 0, is 5"):
        checkpoints.restore(changed)

    checkpoints.save(9, state, CONFIG, position(9), NOTES)
    checkpoints.close()
    checkpoints = tiers(two_tiers)
    assert checkpoints.latest() == 9 and checkpoints.restore(CONFIG).position == position(9)


def test_a_local_checkpoint_is_read_only_where_all_that_is_needed_is_there(two_tiers, state):
    """Another mesh needs other parts; a half-written one is none; a lost disk, or another run, has none."""
    assert tiers(two_tiers, {"tensor": 2, "fsdp": 4}).latest() == 6
    assert tiers(two_tiers).latest() == 6, "what another mesh could not use was forgotten"
    checkpoints = tiers(two_tiers)
    for step in (7, 8):
        checkpoints.save_local(step, state, CONFIG, position(step), NOTES)
    checkpoints.close()
    folder = checkpoints.local.folder
    (folder / "8").rename(folder / "8.orbax-checkpoint-tmp")
    assert tiers(two_tiers).latest() == 7
    (two_tiers / "run_id").unlink()
    assert tiers(two_tiers).latest() == 6
    (two_tiers / "run_id").write_text(folder.parent.name)
    assert tiers(two_tiers).latest() == 7
    shutil.rmtree(two_tiers / "disk")
    assert tiers(two_tiers).latest() == 6


def test_going_back_forgets_what_is_newer_in_both_tiers(two_tiers):
    checkpoints = tiers(two_tiers)
    assert checkpoints.back_to(5, CONFIG).position == position(5)
    assert checkpoints.shared.steps() == [5] and checkpoints.local.steps() == []


def restored(workdir, shape=None):
    return tiers(workdir, shape).restore(CONFIG)


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads that are pending
def test_no_flipped_bit_is_restored_silently(saved, state, tmp_path_factory):
    """One bit in each of the largest files: what is restored is what was saved, or it is refused."""
    files = [path for path in (saved / "checkpoints" / "7").rglob("*") if path.is_file()]
    files = sorted(files, key=lambda path: (-path.stat().st_size, path.name))[:16]
    wanted, refused = (ABSTRACT, layout(make_mesh())), 0
    for path, bit in zip(files, np.random.default_rng(0).integers(2**40, size=len(files))):
        copy = tmp_path_factory.mktemp("flipped")
        shutil.copytree(saved, copy, dirs_exist_ok=True)
        flip(copy / path.relative_to(saved), int(bit))
        try:
            found = Checkpoints(copy).restore(CONFIG, *wanted, step=7)
        except Damaged as error:
            assert "checkpoints/7 is damaged" in str(error)
            refused += 1
        else:
            jax.tree.map(np.testing.assert_array_equal, found.state, state)
            assert found.position == position(7) and found.notes == NOTES
    assert refused > 1


def test_notes_without_their_checksum_are_damaged(tmp_path):
    """A flipped bit can change the key of the checksum."""
    about = sealed({"step": 7})
    assert read_sealed(about, tmp_path) == {"step": 7}
    about["sha257"] = about.pop("sha256")
    with pytest.raises(Damaged, match="is damaged: its config or its position in the data differs from what was saved"):
        read_sealed(about, tmp_path)


def test_the_newest_whole_one_is_restored_and_the_damaged_one_is_set_aside(saved, state, capsys):
    shutil.rmtree(saved / "checkpoints" / "7" / "params")
    found = restored(saved, {"data": 2, "fsdp": 4})
    assert found.position == position(6)
    jax.tree.map(np.testing.assert_array_equal, found.state, state)
    assert f"{saved / 'checkpoints' / '7'} is damaged" in (said := capsys.readouterr().err)
    assert f"It was moved to {saved / 'damaged' / '7'}" in said and len(said.splitlines()) == 1
    assert [path.name for path in (saved / "checkpoints").iterdir()] == ["6"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(saved):
    for step in ("6", "7"):
        (saved / "checkpoints" / step / "about" / "metadata").write_text("{")
    for _ in range(2):  # the same at the next start
        checkpoints = tiers(saved)
        with pytest.raises(ConfigError, match="all checkpoints of .* are damaged. Put an intact copy into"):
            checkpoints.restore(CONFIG) if checkpoints.latest() is not None else checkpoints.check_new()
        checkpoints.close()


def test_neither_does_one_whose_local_checkpoints_are_all_that_there_was(state, tmp_path, capsys):
    checkpoints = tiers(tmp_path)
    for step in (1, 2):
        checkpoints.save_local(step, state, CONFIG, position(step), NOTES)
    checkpoints.close()
    for step, lost in ((1, "shards"), (2, "about")):
        shutil.rmtree(next((tmp_path / "disk").glob(f"*/process-0/{step}")) / lost)
    (damaged,) = [path / "damaged" for path in (tmp_path / "disk").iterdir()]
    for _ in range(2):  # the same at the next start
        checkpoints = tiers(tmp_path)
        with pytest.raises(ConfigError, match=f"all checkpoints of .* or remove {damaged} to start over"):
            checkpoints.restore(CONFIG) if checkpoints.latest() is not None else checkpoints.check_new()
        checkpoints.close()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("is damaged" in line and f"It was moved to {damaged}" in line for line in said)
    shutil.rmtree(damaged)
    tiers(tmp_path).check_new()


def test_parameters_that_are_not_those_that_were_saved_are_refused(saved):
    file = max((saved / "checkpoints" / "7" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    for bit in range(8, 8 * file.stat().st_size, file.stat().st_size):
        flip(file, bit)
    with pytest.raises(Damaged, match="checkpoints/7 is damaged"):
        restore_params(saved)
    restore_params(saved, step=6)


def test_a_damaged_local_one_is_set_aside(two_tiers, capsys):
    shutil.rmtree(next((two_tiers / "disk").glob("*/process-0/8")) / "shards")
    found = restored(two_tiers)
    assert found.position == position(7) and "process-0/8 is damaged" in capsys.readouterr().err
    assert next((two_tiers / "disk").glob("*/damaged/8")).is_dir()


def test_without_fingerprints_a_checkpoint_is_read_as_it_is(state, tmp_path):
    checkpoints = Checkpoints(tmp_path, verify=False)
    checkpoints.save(3, state, CONFIG, position(3), NOTES)
    checkpoints.close()
    found = Checkpoints(tmp_path).restore(CONFIG, ABSTRACT, layout(make_mesh()))
    jax.tree.map(np.testing.assert_array_equal, found.state, state)
