"""The demo's orchestration: what it deletes, what it says, and the whole of it in miniature."""

from pathlib import Path

import pytest

from launch import demo
from launch.demo import Failed, Trained, asked_kinds, fresh_folder, gallery, main, results
from mllm_jax.evaluate.report import Answer
from mllm_jax.train.monitor.metrics import read_metrics

TINY = [
    "--config.data.batch=1",
    "--config.model.encoder.layers=1",
    "--config.model.decoder.layers=1",
    "--config.train.num_eval_examples=12",
    "--config.train.log_every=4",
]


def test_only_an_earlier_demo_is_deleted(tmp_path):
    folder = fresh_folder(tmp_path / "new" / "demo")
    (folder / "old").write_text("of the first demo")
    assert fresh_folder(folder) == folder and not (folder / "old").exists()
    precious = tmp_path / "precious"
    precious.mkdir()
    assert fresh_folder(precious) == precious  # empty
    for path in precious.iterdir():
        path.unlink()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(Failed, match="precious is not empty and not of a demo"):
        fresh_folder(precious)
    with pytest.raises(Failed, match="not of a demo"):
        fresh_folder(precious / "thesis.txt")
    assert (precious / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("arguments", [["--stepz=20"], ["--steps=3"], ["--questions=0"], ["surplus"]], ids=str)
def test_wrong_arguments_start_nothing(tmp_path, arguments, capsys):
    with pytest.raises(SystemExit):
        main(["--workdir", str(tmp_path / "demo"), *arguments])
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_training_that_fails_ends_the_demo(tmp_path, capfd):
    assert main(["--workdir", str(tmp_path / "demo"), "--steps=20", "--config.data.nonsense=1"]) == 2
    said = capfd.readouterr()
    assert "nonsense" in said.err and "training ended with status 1 before it could be killed" in said.out


def test_results_and_gallery():
    said = ["red", "red", "blue", "[/]", "red"]
    answers = [Answer("color", "What color?", "red", text) for text in said] + [Answer("count", "How many?", "2", "2")]
    kinds = asked_kinds(answers)
    assert [(kind.name, kind.questions, kind.bar) for kind in kinds] == [("color", 5, 0.9), ("count", 1, 0.9)]
    seeing = Trained("with images", Path("a"), answers, {"all": 4 / 6, "color": 0.6, "count": 1.0})
    blind = Trained("text only", Path("b"), answers[2:4], {"all": 0.0, "color": 0.0})
    with demo.console.capture() as capture:
        demo.console.print(results(kinds, seeing, blind))
    color, count = (line for line in capture.get().splitlines() if "co" in line and "%" in line)
    assert "60 %" in color and "16.7 %" in color and "MISSED" in color
    assert "100 %" in count and "–" in count and "pass" in count
    shown = gallery(answers, each=1, mistakes=1)
    assert [answer.answer for answer in shown] == ["red", "2", "blue"]


@pytest.mark.slow
def test_the_whole_demo_in_miniature(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # trainings on one device, as people run it
    folder = tmp_path / "demo"
    assert main(["--workdir", str(folder), "--steps=60", "--questions=30", *TINY]) == 1  # learns next to nothing
    said = capfd.readouterr().out
    assert "resumed from" in said and "all 30 answers agree" in said and "below the bar" in said
    steps = [record["step"] for record in read_metrics(folder / "with_images") if "loss" in record]
    assert steps == list(range(1, 61))  # none twice, none missing
    page = (folder / "report.html").read_text(encoding="utf-8")
    for text in ["killed after step", "text only", "data:image/png", "encoder", "same answers"]:
        assert text in page
    assert (folder / "export" / "config.json").is_file()
