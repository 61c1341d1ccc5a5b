"""A chat in the shell, and a file of prompts: what is kept, what is refused, what an interrupt ends, and life signs."""

import io
import json
import os
import signal
import time

import numpy as np
import pytest
from chat_model import saved_chat
from PIL import Image

from mllm_jax.common import status
from mllm_jax.generate import decode
from mllm_jax.generate.__main__ import main
from mllm_jax.generate.chat import Chat, ended_by_interrupt
from mllm_jax.generate.requests import generate, read_prompts

NEW = 9


def nothing(text):
    pass


def said(vlm, messages):
    return generate(vlm, [messages], NEW)[0].rstrip("\ufffd")


def user(text, *media):
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "a b.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    return str(path)


def test_a_chat_keeps_what_was_said_and_shown(model, image):
    vlm, _ = model
    chat = Chat(vlm, "Be brief.", {"max_new_tokens": NEW})
    tokens = chat.attach("image", image)
    assert tokens == int(np.sum(read_prompts(vlm, [[user("?", {"type": "image", "image": image})]]).vision_index >= 0))
    system = {"role": "system", "content": "Be brief."}
    first = [system, user("What is it?", {"type": "image", "image": image})]
    written = []
    answer = chat.ask("What is it?", written.append)
    assert answer == "".join(written) == said(vlm, first)
    then = [*first, {"role": "assistant", "content": answer}, user("Where on the photo?")]
    assert chat.ask("Where on the photo?", nothing) == said(vlm, then)
    assert chat.messages[:-1] == then
    chat.attach("image", image)
    chat.reset()
    assert chat.messages == [system] and chat.attached == []
    assert chat.ask("Who?", nothing) == said(vlm, [system, user("Who?")])


def test_a_turn_in_the_same_bucket_compiles_nothing(model):
    chat = Chat(model[0], settings={"max_new_tokens": 4})
    chat.ask("Hi", nothing)
    before = decode._prefill._cache_size(), decode._step._cache_size()
    length = [read_prompts(model[0], [chat.messages[:-1]]).tokens.shape[1]]
    chat.ask("So", nothing)
    length.append(read_prompts(model[0], [chat.messages[:-1]]).tokens.shape[1])
    assert length[0] < length[1] < 64
    assert (decode._prefill._cache_size(), decode._step._cache_size()) == before


def test_an_interrupt_ends_an_answer_and_not_the_chat(model):
    vlm, _ = model
    chat, before = Chat(vlm, settings={"max_new_tokens": 60}), signal.getsignal(signal.SIGINT)
    whole = Chat(vlm, settings={"max_new_tokens": 60}).ask("Hello there.", nothing)
    answer = chat.ask("Hello there.", lambda text: os.kill(os.getpid(), signal.SIGINT) if text else None)
    assert 0 < len(answer) < len(whole) and whole.startswith(answer)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert signal.getsignal(signal.SIGINT) is before
    assert chat.ask("And?", nothing) and len(chat.messages) == 4
    with ended_by_interrupt() as pressed:
        assert not pressed()
        os.kill(os.getpid(), signal.SIGINT)
        assert pressed()
        with pytest.raises(KeyboardInterrupt):  # of a second one
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_an_error_withdraws_the_question(model, image, tmp_path):
    vlm, _ = model
    chat = Chat(vlm, settings={"max_new_tokens": 4})
    with pytest.raises((OSError, ValueError), match="absent.png"):
        chat.attach("image", str(tmp_path / "absent.png"))
    gone = tmp_path / "gone.png"
    gone.write_bytes(open(image, "rb").read())
    chat.attach("image", str(gone))
    gone.unlink()
    with pytest.raises((OSError, ValueError), match="gone.png"):
        chat.ask("What is it?", nothing)
    assert chat.messages == chat.attached == []
    assert chat.ask("Hello", nothing)


def test_the_command_chats(model, image, monkeypatch, capsys):
    vlm, folder = model
    lines = ["/image", f"/image '{image}'", "What is it?", "", "/imag x", " /reset is a word", "/reset", "/exit", "no"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["--checkpoint", str(folder), "--chat", "--system", "Be brief.", "--max-new-tokens", str(NEW)]) == 0
    told = capsys.readouterr()
    system = {"role": "system", "content": "Be brief."}
    first = [system, user("What is it?", {"type": "image", "image": image})]
    answer = said(vlm, first)
    then = said(vlm, [*first, {"role": "assistant", "content": answer}, user("/reset is a word")])
    assert told.out == f"{answer}\n{then}\n"
    assert "error: /image: the path is missing" in told.err and "did you mean 'image'" in told.err
    assert "a b.png: " in told.err and "started a new conversation" in told.err
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello there.\n"))
    words = ["--checkpoint", str(folder), "--chat", "--image", image, "--max-new-tokens", str(NEW)]
    assert main(words) == 0
    assert capsys.readouterr().out == said(vlm, [user("Hello there.", {"type": "image", "image": image})]) + "\n"


def test_the_command_answers_a_file(model, image, tmp_path, capsys):
    vlm, folder = model
    (tmp_path / "a.png").write_bytes(open(image, "rb").read())
    records = [
        {"id": "first", "image": "a.png", "prompt": "What?"},
        {"messages": [user("Who?")]},
        {"image": "absent.png", "prompt": "What?"},
        {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]},
        {"messages": [{"role": "system", "content": "Mine."}, user("When?")]},
        "Why?",
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    command = ["--checkpoint", str(folder), "--max-new-tokens", str(NEW), "--system", "S.", "--batch_size=2"]
    assert main([*command, "--prompts", str(path)]) == 1
    told = capsys.readouterr()
    lines = [json.loads(line) for line in told.out.splitlines()]
    assert [line["id"] for line in lines] == ["first", *(f"questions.jsonl:{number}" for number in range(2, 7))]
    assert "absent.png" in lines[2]["error"] and "1 prompts could not be read" in told.err
    system = {"role": "system", "content": "S."}
    asked = [
        [system, user("What?", {"type": "image", "image": str(tmp_path / "a.png")})],
        [system, user("Who?")],
        [system, user("Where?")],
        [{"role": "system", "content": "Mine."}, user("When?")],
        [system, user("Why?")],
    ]
    good = [line for line in lines if "error" not in line]
    assert [line["prompt"] for line in good] == ["What?", "Who?", "Where?", "When?", "Why?"]
    assert [line["answer"] for line in good] == [generate(vlm, [messages], NEW)[0] for messages in asked]
    (tmp_path / "prompts.txt").write_text("Who?\n\nWhy?\n")
    assert main([*command, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    texts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["id"], line["answer"]) for line in texts] == [("1", good[1]["answer"]), ("3", good[4]["answer"])]


@pytest.mark.parametrize(
    "words",
    [[], ["--prompt=a", "--chat"], ["--prompt=a", "--prompts=b"], ["--prompts=a", "--image=b"], ["--batch_size=0"]],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(words, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(SystemExit) as ended:
        main(["--checkpoint", "absent", *words])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_life_signs_come_where_an_answer_does_not(model, monkeypatch, capsys):
    _, folder = model
    command = ["--checkpoint", str(folder), "--prompt", "Hello", "--max-new-tokens", "2"]
    assert status.PATIENCE <= 3
    monkeypatch.setattr(status, "PATIENCE", 0.0)
    assert main(command) == 0
    assert f"reading {folder}" in (told := capsys.readouterr().err) and "computing the first token from" in told
    monkeypatch.setattr(status, "PATIENCE", 1000.0)
    assert main(command) == 0
    assert capsys.readouterr().err == ""
