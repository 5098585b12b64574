#!/usr/bin/env bash
# Train on Slurm: sbatch [--nodes=N] sbatch.sh CONFIG [key=value ...]      one node of 8 GPUs unless told otherwise
#SBATCH --job-name=deep3d --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
#SBATCH --output=%x-%j.log --open-mode=append --requeue
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: sbatch [--nodes=N] sbatch.sh CONFIG [key=value ...]" >&2; exit 2; }
gpus=${SLURM_GPUS_ON_NODE:-8}
export MASTER_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) PROCESSES=$((SLURM_NNODES * gpus)) ARGUMENTS="$(printf '%q ' "$@")"
# One launcher a node; --machine_rank must be expanded there, so the command is quoted. num_processes is the total.
srun --kill-on-bad-exit=1 bash -c 'eval "exec accelerate launch --multi_gpu --num_machines $SLURM_NNODES --num_processes $PROCESSES \
  --machine_rank $SLURM_NODEID --main_process_ip $MASTER_HOST --main_process_port $MASTER_PORT \
  --mixed_precision no --dynamo_backend no train.py $ARGUMENTS"'
