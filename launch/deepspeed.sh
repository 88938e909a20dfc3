#!/usr/bin/env bash
# Runs a script of train/ on all hosts of a hostfile with the deepspeed launcher, and adds what that launcher lacks: signals that reach the ranks and leave them
# time to save, the variables of launch/environment on every host, an end when a host is gone. launch/README.md explains.
# usage: launch/deepspeed.sh HOSTFILE [deepspeed options] train/SCRIPT.py CONFIG.json [--key value ...]
set -euo pipefail
fail() {
  echo "error: $1" >&2
  exit 2
}
[ $# -ge 2 ] || fail "usage: launch/deepspeed.sh HOSTFILE [deepspeed options] train/SCRIPT.py CONFIG.json [--key value ...]"
hostfile=$1
shift
[ -r "$hostfile" ] || fail "$hostfile cannot be read; expected a file with one line per machine, such as: node-a slots=8"
command -v deepspeed > /dev/null || fail 'deepspeed is not on PATH: activate the environment, with pip install -e ".[deepspeed]" in it'
command -v pdsh > /dev/null || fail "pdsh is not on PATH: apt-get install pdsh; on a single machine launch/torchrun.sh --standalone needs neither it nor ssh"
hosts=$(sed -E '/^[[:space:]]*(#|$)/d; s/^[[:space:]]*([^[:space:]]+).*/\1/' "$hostfile" | paste -sd, -)

[ -n "$hosts" ] || fail "$hostfile names no machine; expected one line for each, such as: node-a slots=8"

# deepspeed passes on what stands in this file and little else; a blank line or a comment in it is a crash. It also prints all of it, so no secrets.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as torchrun does: processes that take all cores each stand in each other's way
trap 'rm -f "$DS_ENV_FILE"' EXIT
mark=$(cat /proc/sys/kernel/random/uuid)
{
  for name in $(compgen -e | grep -E '^(PATH|(OMP|HF|INTERLACE|WANDB|TORCH|GLOO|NCCL)_.*)$' | grep -vE 'TOKEN|KEY|SECRET|PASSWORD' || true); do
    printf '%s=%s\n' "$name" "${!name}"
  done
  grep -E '^[A-Za-z_][A-Za-z0-9_]*=' "$(dirname "$0")/environment" || true
  echo "INTERLACE_LAUNCH=$mark"
} > "$DS_ENV_FILE"

# a host that does not answer for 15 seconds is lost: without this, ssh waits for hours
export PDSH_SSH_ARGS_APPEND="-o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3 ${PDSH_SSH_ARGS_APPEND:-}"

# deepspeed's own answer to SIGTERM is to end the ranks after 30 seconds, and to SIGUSR1 to leave them alone in the world: the ranks are told instead
tell_ranks() {
  told=1
  # shellcheck disable=SC2016 # the hosts expand it
  pdsh -R ssh -w "$hosts" 'for pid in $(pgrep -f "[d]eepspeed.launcher.launch"); do
    if grep -qzxF INTERLACE_LAUNCH='"$mark"' "/proc/$pid/environ"; then pkill -'"$1"' -P "$pid"; fi; done; true' || true
}
trap 'tell_ranks TERM' TERM HUP
trap 'tell_ranks USR1' USR1
trap 'tell_ranks INT' INT

set -m # a process group of its own: Ctrl-C comes here alone
deepspeed --hostfile "$hostfile" "$@" < /dev/null &
while :; do
  told='' code=0
  wait $! || code=$?
  [ -n "$told" ] || exit "$code" # else the signal ended the waiting, not the launcher
done
