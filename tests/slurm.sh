#!/usr/bin/env bash
# sbatch.sh on a real Slurm of two nodes, brought up in a temporary folder from Debian's packages, which are not installed, and gone when
# this ends:  bash tests/slurm.sh      a quarter of an hour; exit code 0 where all went as it should, 77 where it cannot run
# Each row is a job, or two where the first was to end early: what became of it, how often it was queued again, whether its last weights
# and moments are those of a run that nobody stopped, to the last bit.
set -u
cd "$(dirname "$0")/.." || exit 1
skip() { echo "skipped: $1" && exit 77; }
[ "$(id -u)" -eq 0 ] || skip "needs root, for namespaces"
for tool in apt-get dpkg unshare; do command -v $tool >/dev/null || skip "needs Debian's $tool"; done
if [ $$ -ne 1 ]; then # the daemons end with their namespace, and /etc/hosts is a file of its own there
  unshare --mount --pid --fork --kill-child --mount-proc bash "$0" "$@"
  exit $?
fi
folder=$(mktemp -d /tmp/deep3d-slurm.XXXXXX)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true PAUSE=0.7

# ---- Slurm: a controller, two nodes on this machine, two GPUs each that are empty files
mkdir "$folder"/{packages,state,spool-n1,spool-n2}
(cd "$folder/packages" && apt-get download slurm-client slurmctld slurmd slurm-wlm-basic-plugins munge libmunge2 libhwloc15) \
  >"$folder/apt" 2>&1 || skip "apt-get download: $(tail -n 1 "$folder/apt") (apt-get update?)"
for package in "$folder"/packages/*.deb; do dpkg -x "$package" "$folder/slurm"; done
for path in "$folder"/slurm/usr/sbin/*-wlm; do ln -s "$path" "${path%-wlm}"; done
libraries=$(dirname "$(find "$folder/slurm" -name libmunge.so.2 | head -n 1)") host=$(hostname -s)
export PATH=$folder/slurm/usr/bin:$folder/slurm/usr/sbin:$PATH LD_LIBRARY_PATH=$libraries:$libraries/slurm-wlm SLURM_CONF=$folder/slurm.conf
echo "127.0.0.1 localhost $host n1 n2" >"$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts
touch "$folder"/gpu{0..3}
printf 'NodeName=%s Name=gpu File=%s\n' n1 "$folder/gpu[0-1]" n2 "$folder/gpu[2-3]" >"$folder/gres.conf"
cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$host
SlurmUser=root
SlurmctldPort=16817
AuthInfo=socket=$folder/munge.socket,cred_expire=5
PluginDir=$libraries/slurm-wlm
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdLogFile=$folder/slurmd-%n.log
SlurmctldLogFile=$folder/slurmctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
MinJobAge=7200
NodeName=n1 NodeHostname=$host Port=16818 CPUs=32 RealMemory=8000 Gres=gpu:2
NodeName=n2 NodeHostname=$host Port=16819 CPUs=32 RealMemory=8000 Gres=gpu:2
PartitionName=main Nodes=n[1-2] Default=YES
PartitionName=grace Nodes=n[1-2] GraceTime=60
PartitionName=urgent Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF
END
dd if=/dev/urandom of="$folder/munge.key" bs=1 count=1024 2>/dev/null && chmod 400 "$folder/munge.key" && chmod 755 "$folder"
munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
  --seed-file="$folder/munge.seed" --log-file="$folder/munged.log" 2>/dev/null &
slurmctld -D 2>/dev/null &
for node in n1 n2; do slurmd -D -d "$folder/slurm/usr/sbin/slurmstepd" -N $node 2>/dev/null & done
for _ in $(seq 60); do [ "$(sinfo -h -o %T 2>/dev/null | sort -u)" = idle ] && break || sleep 1; done
[ "$(sinfo -h -o %T | sort -u)" = idle ] || { tail -n 5 "$folder"/*.log && exit 1; }
sinfo --version

# ---- a run of a minute that hardly computes: each of its 60 steps sleeps for PAUSE seconds
cat >"$folder/config.py" <<END
import os, sys, time
from dataclasses import replace
from configs.synthetic import config as base
from data import DataConfig, Source
from model import ModelConfig
from engine.optimizer import lr_at

def slow(*arguments):
    time.sleep(float(os.environ["PAUSE"]))
    return lr_at(*arguments)

sys.modules["__main__"].lr_at = slow
out = f"$folder/{os.environ.get('SLURM_JOB_NAME', 'run')}{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
sources = [Source(kind="synthetic", split=(split,), world_frames=count) for split, count in (("train", 8), ("val", 4))]
data = DataConfig(root="$folder/world", train=(sources[0],), val=(sources[1],), workers=1)
train = replace(base.train, batch_size=2, steps=60, log_every=1, save_every=10, eval_every=0, warmup=3)
config = replace(base, out=out, data=data, model=ModelConfig(backbone="test_resnet", size=(96, 320), channels=32), train=train)
END
declare -A ids
submit() { # NAME [OPTION ...]
  local name=$1
  shift
  ids[$name]=$(sbatch --parsable --job-name="$name" --output="$folder/$name.log" --time=10 --cpus-per-task=1 --gpus-per-node=0 "$@" \
    sbatch.sh "$folder/config.py")
}
field() { scontrol -o show job "$1" | head -n 1 | grep -o " $2=[^ ]*" | cut -d= -f2; }
await() { # CONDITION NAME [...], for at most 15 minutes
  for _ in $(seq 900); do "$@" && return || sleep 1; done
  local job=${ids[$2]:-${ids[array]}}
  echo "waited in vain: $*, $(field "$job" JobState)" && tail -n 20 "$folder"/"$2"*.log "$folder/slurmctld.log"
  return 1
}
running() { [ "$(field "${ids[$1]}" JobState)" = RUNNING ]; }
over() { [[ "$(field "${ids[$1]}" JobState)" =~ ^(COMPLETED|FAILED|CANCELLED|TIMEOUT|PREEMPTED|NODE_FAIL)$ ]]; }
reached() { [ "$(cat "$folder/$1/log.jsonl" 2>/dev/null | wc -l)" -ge "$2" ]; }
saved() { basename "$(ls -d "$folder/$1"/checkpoints/step_* 2>/dev/null | tail -n 1)" | sed 's/step_0*//'; }
outcome() { # NAME: how its job ended, and the last step that is saved
  echo "$(field "${ids[$1]}" JobState), queued again $(field "${ids[$1]}" Restarts) times, step $(saved "$1") saved"
}
digest() { # FOLDER: of weights and moments after the last step
  python -c 'import pathlib, sys; sys.path.insert(0, "tests"); import test_train; print(test_train.hashes(pathlib.Path(sys.argv[1])))' \
    "$folder/$1/checkpoints/step_00000060" 2>&1
}
row() { # WHAT NAME REFERENCE PATTERN OUTCOME: a line of the table; the outcome has to match
  local same=no
  [ -e "$folder/$2/DONE" ] && [ "$(digest "$2")" = "$(cat "$folder/$3.digest")" ] && same=yes
  [[ $same = yes && $5 =~ $4 ]] || failed=1
  printf '%-34s %-62s %s\n' "$1" "$5" "$same"
}
failed=0

for count in 1 2; do # the runs that nobody stops, without Slurm
  command="python train.py"
  [ $count -eq 1 ] || command="accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no train.py"
  SLURM_JOB_NAME=alone$count PAUSE=0 $command "$folder/config.py" >"$folder/alone$count.log" 2>&1 || { tail -n 20 "$folder/alone$count.log" && exit 1; }
  digest alone$count >"$folder/alone$count.digest"
done

printf '%-34s %-62s %s\n' job "what became of it" "same weights"

# ---- one process
for name in end 'one_gpu --gpus-per-node=1' 'limit --time=3 --signal=USR1@60 --export=ALL,PAUSE=2' requeue kill; do submit $name; done
await reached requeue 15 && scontrol requeue "${ids[requeue]}"
await reached kill 25 && kill -9 "$(pgrep -P "$(pgrep -f "slurmstepd: \[${ids[kill]}.0\]")" | head -n 1)"
await over kill && killed=$(outcome kill) && submit kill
for name in end one_gpu limit requeue kill; do await over $name; done
row "nothing" end alone1 "COMPLETED, queued again 0 " "$(outcome end)"
row "one GPU" one_gpu alone1 "COMPLETED, queued again 0 " "$(outcome one_gpu)"
row "time limit" limit alone1 "COMPLETED, queued again [1-9]" "$(outcome limit)"
row "scontrol requeue" requeue alone1 "COMPLETED, queued again 1 " "$(outcome requeue)"
row "kill -9; the same command" kill alone1 "FAILED, queued again 0 times, step 20 " "$killed"

for name in cancel_at_once cancel_later 'array --array=0-1'; do submit $name; done
await running cancel_at_once && sleep 1 && scancel "${ids[cancel_at_once]}"
await over cancel_at_once && at_once=$(outcome cancel_at_once)
await reached array1 10 && scancel --signal=USR1 "${ids[array]}_1"
await reached cancel_later 30 && scancel "${ids[cancel_later]}"
await over cancel_later && later=$(outcome cancel_later)
sleep 10 # in which something might queue them again
over cancel_at_once && over cancel_later || failed=1
submit cancel_at_once && submit cancel_later
for task in 0 1; do ids[array$task]=${ids[array]}_$task; done
for name in cancel_at_once cancel_later array0 array1; do await over $name; done
row "scancel at once; the same command" cancel_at_once alone1 "CANCELLED, queued again 0 times, step  saved" "$at_once"
row "scancel after a minute; the same" cancel_later alone1 "CANCELLED, queued again 0 times, step 3[0-9] " "$later"
row "task 0 of an array" array0 alone1 "COMPLETED, queued again 0 " "$(outcome array0)"
row "task 1, signalled" array1 alone1 "COMPLETED, queued again 1 " "$(outcome array1)"

# ---- two processes, on two nodes but for the first
for name in 'one_node --ntasks-per-node=2' 'two_nodes --nodes=2' 'two_nodes_limit --nodes=2 --time=3 --signal=USR1@60 --export=ALL,PAUSE=2'; do submit $name; done
for name in one_node two_nodes two_nodes_limit; do await over $name; done
row "two processes on one node" one_node alone2 "COMPLETED, queued again 0 " "$(outcome one_node)"
row "two nodes" two_nodes alone2 "COMPLETED, queued again 0 " "$(outcome two_nodes)"
row "two nodes, time limit" two_nodes_limit alone2 "COMPLETED, queued again [1-9]" "$(outcome two_nodes_limit)"

# ---- jobs that a more urgent one, for which there is no room, takes the nodes from
for name in preempted 'preempted_grace --partition=grace'; do submit $name --export=ALL,PAUSE=2; done
await reached preempted 5 && await reached preempted_grace 5
submit preempted_at_once --partition=grace
await running preempted_at_once
sbatch --partition=urgent --nodes=2 --exclusive --output=/dev/null --gpus-per-node=0 --wrap 'sleep 5' >/dev/null
for name in preempted preempted_grace preempted_at_once; do await over $name; done
row "preemption" preempted alone1 "COMPLETED, queued again 1 " "$(outcome preempted)"
row "preemption with a minute's grace" preempted_grace alone1 "COMPLETED, queued again 1 " "$(outcome preempted_grace)"
row "the same, before it has begun" preempted_at_once alone1 "COMPLETED, queued again 1 " "$(outcome preempted_at_once)"
exit $failed
