"""A model's name on the hub becomes a local folder: the files that are fetched, and errors."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from mllm_jax.weights.hf import local_folder

WANTED = {"config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"}
WANTED |= {"tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"}
WANTED |= {"tokenizer_config.json", "added_tokens.json", "generation_config.json", "preprocessor_config.json"}
USELESS = {"pytorch_model.bin", "pytorch_model.bin.index.json", "modeling_x.py", "training_args.bin", "a.gguf"}
USELESS |= {"consolidated.safetensors", "consolidated-00001-of-2.safetensors", "original/model.safetensors"}
USELESS |= {"model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", "onnx/config.json"}
USELESS |= {"model-00001-of-00002.fp16.safetensors", "adapter_model.safetensors", "trainer_state.json", "README.md"}
COMMIT = "5" * 40


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that the client asks for a snapshot: each file holds its own name."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path, _, name = self.path.partition("/resolve/" + COMMIT + "/")
        files = sorted(WANTED | USELESS)
        if name:
            content, headers = name.encode(), {"ETag": f'"{abs(hash(name)):x}"', "X-Repo-Commit": COMMIT}
        elif "/tree/" in path:
            entries = [{"type": "file", "path": file, "size": len(file), "oid": COMMIT} for file in files]
            content, headers = json.dumps(entries).encode(), {}
        else:
            siblings = [{"rfilename": file} for file in files]
            answer = {"id": "someone/model-2B", "sha": COMMIT, "siblings": siblings, "private": False}
            content, headers = json.dumps(answer).encode(), {}
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    """The address of a hub that has one model."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_weights_and_texts_are_fetched_and_nothing_else(hub, tmp_path):
    code = "from mllm_jax.weights.hf import local_folder; print(local_folder('someone/model-2B'))"
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", code]  # the client reads its settings when it is imported
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert found == {name: name for name in WANTED}


def test_a_model_that_the_hub_does_not_give(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("401 Client Error.\n\nNo such repository.\n")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="is not a folder here.*Without network, run `hf download") as error:
        local_folder("someone/model-2B")
    assert str(error.value).endswith("(OSError: 401 Client Error. No such repository.)")
    with pytest.raises(FileNotFoundError, match="there is no folder /nowhere/at/all"):
        local_folder("/nowhere/at/all")
