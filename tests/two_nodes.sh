#!/usr/bin/env bash
# Two "machines" on one: network namespaces joined by a virtual cable, each with its own `accelerate launch` (root and iproute2).
# usage: tests/two_nodes.sh LOG_FOLDER TOTAL_PROCESSES [train.py's arguments]
# Meanwhile, in another shell: kill one node's processes, or cut the cable with `ip netns exec deep3d1 ip link set d3v1 down`
# (noticed after train.timeout minutes). The same command again resumes.
set -u
logs=$1 total=$2
shift 2
clean() { for i in 0 1; do ip netns del deep3d$i 2>/dev/null; done; }
trap clean EXIT
clean
for i in 0 1; do ip netns add deep3d$i; done
ip link add d3v0 type veth peer name d3v1
for i in 0 1; do
  ip link set d3v$i netns deep3d$i
  ip netns exec deep3d$i ip link set lo up
  ip netns exec deep3d$i ip addr add 10.77.0.$((i + 1))/24 dev d3v$i
  ip netns exec deep3d$i ip link set d3v$i up
done
launchers=()
for i in 0 1; do
  ip netns exec deep3d$i env OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true GLOO_SOCKET_IFNAME=d3v$i \
    accelerate launch --multi_gpu --num_machines 2 --num_processes "$total" --machine_rank $i --main_process_ip 10.77.0.1 \
    --main_process_port 29500 --mixed_precision no --dynamo_backend no train.py "$@" >"$logs/node$i.log" 2>&1 &
  launchers+=($!)
done
code=0
for launcher in "${launchers[@]}"; do wait "$launcher" || code=$?; done
[ $code -eq 0 ] || tail -n 30 "$logs"/node?.log
exit $code
