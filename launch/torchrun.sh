#!/usr/bin/env bash
# torchrun with signals that reach the ranks and leave them time to save, and the variables of launch/environment. On every node the same command but for
# --node-rank; launch/README.md explains.
# usage: launch/torchrun.sh [torchrun options] train/SCRIPT.py CONFIG.json [--key value ...]
set -euo pipefail
set -a
# shellcheck source=/dev/null
source "$(dirname "$0")/environment"
set +a
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 # torchrun's own list lacks SIGUSR1
export PET_SHUTDOWN_TIMEOUT=${INTERLACE_GRACE_SECONDS:-600}          # 30 seconds of its own are too few for a large checkpoint
command -v torchrun > /dev/null || {
  echo "error: torchrun is not on PATH: activate the environment (source .venv/bin/activate)" >&2
  exit 2
}
exec torchrun "$@"
