#!/usr/bin/env bash
# Train on Slurm: sbatch [--nodes=N] sbatch.sh CONFIG [key=value ...]      one node of 8 GPUs unless told otherwise
# Three minutes before a time limit, and at a preemption, every process finishes its step, saves and ends; the job is then queued again
# and goes on from there, at most DEEP3D_REQUEUES times (100), until the run folder holds DONE. The folder must be shared by the nodes.
#SBATCH --job-name=deep3d --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
#SBATCH --output=%x-%j.log --open-mode=append --requeue --signal=B:USR1@180
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: sbatch [--nodes=N] sbatch.sh CONFIG [key=value ...]" >&2; exit 2; }
out=$(python -c 'import sys; from config import load_config; print(load_config(sys.argv[1], sys.argv[2:]).out)' "$@") || exit 2
gpus=${SLURM_GPUS_ON_NODE:-8}
MASTER_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_HOST MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) PROCESSES=$((SLURM_NNODES * gpus)) ARGUMENTS="$(printf '%q ' "$@")"
# The launcher forwards these signals to its processes, and waits so many seconds for them before it kills them (30 by itself).
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=150
# One launcher a node; --machine_rank must be expanded there, so the command is quoted. num_processes is the total.
srun --kill-on-bad-exit=1 bash -c 'eval "exec accelerate launch --multi_gpu --num_machines $SLURM_NNODES --num_processes $PROCESSES \
  --machine_rank $SLURM_NODEID --main_process_ip $MASTER_HOST --main_process_port $MASTER_PORT \
  --mixed_precision no --dynamo_backend no train.py $ARGUMENTS"' &
job=$!
signalled=
trap 'signalled=1; kill -USR1 $job 2>/dev/null' USR1 TERM
code=0
while kill -0 $job 2>/dev/null; do wait $job; code=$?; done # a trapped signal ends wait, not the job
[ $code -eq 0 ] && [ -e "$out/DONE" ] && exit 0
# Launchers end with 1 even when their processes were asked to stop and saved; a preemption may signal those only: STOPPED tells.
if { [ -n "$signalled" ] || [ -e "$out/STOPPED" ]; } && [ "${SLURM_RESTART_COUNT:-0}" -lt "${DEEP3D_REQUEUES:-100}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$((code ? code : 1))"
