#!/usr/bin/env bash
# Installs what the tests on two hosts need: as root on a machine with apt, else says so and leaves it to the tests to skip.
set -euo pipefail
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "openssh-server, pdsh and iproute2 are installed by root, with apt-get: what is missing skips its tests"
  exit 0
fi
missing=()
command -v pdsh > /dev/null || missing+=(pdsh)
command -v ip > /dev/null || missing+=(iproute2)
command -v pgrep > /dev/null || missing+=(procps)
command -v ssh > /dev/null || missing+=(openssh-client)
[ -x /usr/sbin/sshd ] || missing+=(openssh-server)
{ command -v slurmctld && command -v slurmd; } > /dev/null || missing+=(slurm-wlm)
command -v munged > /dev/null || missing+=(munge)
[ "${#missing[@]}" = 0 ] && exit 0
export DEBIAN_FRONTEND=noninteractive
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } > /dev/null || echo "not all of ${missing[*]} could be installed"
