#!/bin/bash
# On every host of a TPU pod, called by launch/tpu_pod.py from the folder that holds this checkout:
#   tpu_vm.sh install BUCKET      the bucket at /runs, and a Python with mllm_jax in ~/venv
#   tpu_vm.sh start WORD...       that command in the background, its output to ~/train.log
#   tpu_vm.sh stop                asks it to save and end, and waits until it has
#   tpu_vm.sh status              its exit code; "running"; or "none"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

install() {
  if ! mountpoint -q /runs; then
    if ! command -v gcsfuse > /dev/null; then
      local key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
      curl -fsS $site/doc/apt-key.gpg | sudo tee $key > /dev/null
      echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
      sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
      sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse
    fi
    sudo mkdir -p /runs
    sudo chown "$(id -u)" /runs
    gcsfuse --implicit-dirs "$1" /runs
  fi
  # The Python of these images is older than 3.11: uv brings one.
  export PATH=~/.local/bin:$PATH PIP_BREAK_SYSTEM_PACKAGES=1
  command -v uv > /dev/null || python3 -m pip install --quiet --user uv
  [[ -d ~/venv ]] || uv venv --quiet --python 3.12 ~/venv
  uv pip install --quiet --python ~/venv/bin/python --editable '.[tpu,video]'
}

running() {
  [[ -f ~/train.pid ]] && kill -0 "$(cat ~/train.pid)" 2> /dev/null
}

start() {
  if running; then
    echo "it runs already"
    return
  fi
  rm -f ~/train.code ~/train.pid
  export PATH=~/venv/bin:$PATH JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-/runs/compilations}
  # setsid: it outlives this connection. The exit code is written when it ends, never when the machine does.
  # shellcheck disable=SC2016
  setsid nohup bash -c '"$@" & echo $! > ~/train.pid; wait $!; echo $? > ~/train.code' tpu_vm "$@" \
    >> ~/train.log 2>&1 < /dev/null &
  until [[ -f ~/train.pid ]]; do sleep 0.1; done
}

stop() {
  running || return 0
  kill -TERM "$(cat ~/train.pid)"
  while running; do sleep 1; done
}

status() {
  if [[ -f ~/train.code ]]; then cat ~/train.code; elif running; then echo running; else echo none; fi
}

"$@"
