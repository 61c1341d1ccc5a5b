"""The lock of a working directory: one run at a time, and nobody waits for a dead one."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from mllm_jax.common.config import ConfigError
from mllm_jax.train.checkpoint import lock
from mllm_jax.train.checkpoint.lock import FILE, Lock, locked

HOLD = "import sys, pathlib, time; from mllm_jax.train.checkpoint.lock import Lock\n"
HOLD += "Lock(pathlib.Path(sys.argv[1])).take()\n"
HOLD += "print('held', flush=True); time.sleep(600)"


def foreign(path, host="elsewhere", age=0.0, **fields):
    """A lock file of another machine, last touched `age` seconds ago."""
    path.write_text(json.dumps({"host": host, "boot": "b", "namespace": "n", "pid": 7, "started": "1", **fields}))
    os.utime(path, (time.time() - age,) * 2)


def test_the_second_is_refused_by_the_name_of_the_first_and_the_lock_goes_with_the_run(tmp_path):
    with locked(tmp_path):
        with pytest.raises(ConfigError, match=rf"{tmp_path} is in use by process {os.getpid()} on .* since 20"):
            with locked(tmp_path):
                pass
        assert (tmp_path / FILE).is_file()
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="of the run"), locked(tmp_path):
        raise RuntimeError("of the run")
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / FILE)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid} on"):
            Lock(tmp_path / FILE).take()
    finally:
        holder.kill()  # not waited for: its number is still listed
    while (holder_state := open(f"/proc/{holder.pid}/stat").read().rsplit(")", 1)[1].split()[0]) != "Z":
        assert holder_state
        time.sleep(0.01)
    with locked(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    holder.wait()


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path):
    mine = Lock(tmp_path / FILE)
    mine.take()
    stated = json.loads((tmp_path / FILE).read_text())
    mine.release()
    (tmp_path / FILE).write_text(json.dumps(stated | {"started": "1"}))
    with locked(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["started"] == stated["started"] != "1"


def test_a_stopped_process_of_this_machine_keeps_its_lock(tmp_path):
    mine = Lock(tmp_path / FILE)
    mine.take()
    os.utime(tmp_path / FILE, (time.time() - 2 * lock.STALE,) * 2)
    with pytest.raises(ConfigError, match="is in use"):
        Lock(tmp_path / FILE).take()
    mine.release()


@pytest.mark.parametrize("content", [None, "", "{", "[]"])
def test_a_lock_of_another_machine_that_is_not_touched_is_taken_over(tmp_path, content):
    foreign(tmp_path / FILE, age=2 * lock.STALE)
    if content is not None:
        (tmp_path / FILE).write_text(content)
        os.utime(tmp_path / FILE, (time.time() - 2 * lock.STALE,) * 2)
    with locked(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


def test_a_lock_of_another_machine_is_watched_until_it_is_touched(tmp_path, capsys):
    foreign(tmp_path / FILE, age=lock.STALE / 2)
    toucher = threading.Timer(1.5, lambda: os.utime(tmp_path / FILE))
    toucher.start()
    with pytest.raises(ConfigError, match="is in use by process 7 on elsewhere"), locked(tmp_path):
        pass
    toucher.join()
    assert "waiting up to 60 s for a sign of life" in capsys.readouterr().err


def test_of_many_that_find_a_stale_lock_one_takes_it(tmp_path):
    foreign(tmp_path / FILE, age=2 * lock.STALE)
    taken, refused = [], []

    def start():
        own = Lock(tmp_path / FILE)
        try:
            own.take()
            taken.append(own)
        except ConfigError as error:
            refused.append(error)

    starts = [threading.Thread(target=start) for _ in range(8)]
    for thread in starts:
        thread.start()
    for thread in starts:
        thread.join()
    assert len(taken) == 1 and len(refused) == 7
    taken[0].release()
    assert not list(tmp_path.iterdir())


def test_without_hard_links_the_file_is_made_exclusively(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", link)
    with locked(tmp_path):
        with pytest.raises(ConfigError, match="is in use"), locked(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_a_holder_that_lost_the_lock_ends_itself(tmp_path, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    mine = Lock(tmp_path / FILE)
    mine.take()
    foreign(tmp_path / FILE, token="of another run")
    assert ended.wait(10)
    mine.release()
    assert json.loads((tmp_path / FILE).read_text())["token"] == "of another run"
