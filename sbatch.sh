#!/usr/bin/env bash
# Train on Slurm: sbatch [OPTIONS] sbatch.sh [CONFIG.py] [key=value ...]       8 GPUs of one node, a process on each, unless OPTIONS say
#   --nodes=4                                           4 x 8 GPUs; the nodes share this folder and out=
#   --gpus-per-node=1 --cpus-per-task=8                 one GPU, whose process has 8 cores
#   --gpus-per-node=0 --ntasks-per-node=2               no GPUs, or none that Slurm knows of: two processes on the CPU
# Three minutes before the time limit, and when a preemption's grace period begins, all processes finish their step, save and end, and
# the job, an array's task alone, is queued again and goes on until out= holds DONE. scancel ends it; what 30 s suffice for is saved.
#SBATCH --job-name=deep3d --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64
#SBATCH --output=%x-%j.log --open-mode=append --requeue --signal=USR1@180
began=$(date +%s)
gpus=${SLURM_GPUS_ON_NODE:-0}
[ "$gpus" -eq 0 ] && export ACCELERATE_USE_CPU=true
tasks=$((gpus ? gpus : SLURM_NTASKS_PER_NODE)) cores=$((SLURM_CPUS_PER_TASK * SLURM_NTASKS_PER_NODE))
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) LOCAL_WORLD_SIZE=$tasks OMP_NUM_THREADS=$((cores / tasks))
# srun is the launcher: a process's signals, exit code and last words are its own. One alone needs no variables to find the others.
srun --ntasks=$((SLURM_NNODES * tasks)) --ntasks-per-node=$tasks --cpus-per-task=$((cores / tasks)) --kill-on-bad-exit=1 \
  bash -c '[ $SLURM_NTASKS -eq 1 ] || export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  exec python train.py "$@"' bash "$@"
code=$?
out=$(python -c 'import sys, train; print(train.load_config(*train.parse_arguments(sys.argv[1:])).out)' "$@" 2>/dev/null) || exit $code
[ -e "$out/DONE" ] && exit $code
id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
id=${id:-$SLURM_JOB_ID}
# A run that a signal ended leaves STOPPED; with 138 and 143 it came before Python had a handler. What Slurm itself takes down it
# queues again, or not, by itself, and says COMPLETING.
stopped=$(stat -c %Y "$out/STOPPED" 2>/dev/null || echo 0)
if [[ $stopped -ge $began || $code = 138 || $code = 143 ]] && [ "$(squeue -h -j "$id" -o %T)" = RUNNING ]; then
  scontrol requeue "$id"
  exit 0
fi
exit $((code ? code : 1))
