#!/usr/bin/env bash
# A SLURM job, one task per GPU; a preempted or timed-out job saves, goes back into the queue and resumes by itself. launch/README.md explains.
# Submit it with the environment active: its PATH goes along.
# usage: sbatch [sbatch options] launch/slurm.sh train/SCRIPT.py CONFIG.json [--key value ...]
#SBATCH --job-name=interlace
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@600
set -euo pipefail
set -a
# shellcheck source=/dev/null
source "$SLURM_SUBMIT_DIR/launch/environment"
set +a
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun no longer takes it from sbatch

code=0
# shellcheck disable=SC2016 # the tasks expand it
srun --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec python "$@"' rank \
  "$@" --resume_from_checkpoint true || code=$?
[ "$code" != 143 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
