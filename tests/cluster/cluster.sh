#!/usr/bin/env bash
# A Slurm cluster of simulated nodes on one machine. Each node has its own network, host name, process ids, /tmp,
# /dev/shm and boot id; all other folders are those of this machine, as on a parallel file system. This machine is the
# login node.
#   cluster.sh hold [N]             start a cluster of N nodes (2), print "ready", and end it when stdin closes
#   cluster.sh up [N]               start a cluster, which stays until `down`
#   cluster.sh down                 end all processes of the cluster, and remove all that belongs to it
#   cluster.sh kill|start NODE      cut the power of a node: its peers get no message | boot the node again
#   cluster.sh cut|mend NODE        disconnect the network of a node | connect it again
#   cluster.sh exec NODE COMMAND... run a command on a node
#   cluster.sh controller stop|start
# Variables:
#   CLUSTER_ID      a number up to 255 (0); clusters of different numbers run side by side. The folder is
#                   /run/simcluster$CLUSTER_ID, the network 10.77.$CLUSTER_ID.0/24, and the nodes are c${CLUSTER_ID}node1,
#                   c${CLUSTER_ID}node2, ...
#   CLUSTER_CPUS, CLUSTER_MEMORY, CLUSTER_GPUS
#                   what Slurm believes of each node: 2 cores, 8000 MB, 0 GPUs; may exceed what the machine has
#   CLUSTER_CONF    further lines of slurm.conf
# Needs root, and Debian's slurmctld slurmd slurm-client munge iproute2 util-linux procps.
set -euo pipefail
id=${CLUSTER_ID:-0}
root=/run/simcluster$id bridge=brsim$id network=10.77.$id login=$(hostname) prefix=c${id}node
export SLURM_CONF=$root/slurm.conf PATH=$PATH:/usr/sbin:/sbin
pmix=/usr/lib/$(uname -m)-linux-gnu/pmix2/lib/libpmix.so # the path that Slurm's PMIx plugin opens

# In a new mount namespace: else a file system that another test has below /tmp stays in use after its end.
release_mounts='findmnt --noheadings --raw --output TARGET | grep ^/tmp/ | xargs --no-run-if-empty umount --lazy || true'

address() { echo "$network.$((10 + ${1#"$prefix"}))"; }
init_of() { pgrep -P "$(cat "$root/$1/outer")" -f "_init $1\$" 2>/dev/null; } # process 1 of the node, as seen from outside

end_daemon() { # NAME PIDFILE; a process that has got the id of an ended daemon stays
  local pid
  pid=$(cat "$2" 2>/dev/null) && [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "$1" ]] || return 0
  kill -CONT "$pid"; kill "$pid"
  for ((i = 0; i < 100; i++)); do [[ -e /proc/$pid ]] || return 0; sleep 0.1; done
  kill -9 "$pid"
}

write_configuration() {
  local nodes=$1 i track=linuxproc gpus=${CLUSTER_GPUS:-0}
  [[ ! -f /sys/fs/cgroup/freezer/release_agent ]] || track=cgroup # as on real clusters: finds daemons too
  echo CgroupMountpoint=/sys/fs/cgroup >"$root/cgroup.conf" # without this file slurmd makes a folder "freezer(null)"
  for ((i = 0; i < gpus; i++)); do mknod "$root/gpu$i" c 1 3; echo "Name=gpu File=$root/gpu$i"; done >"$root/gres.conf"
  cat >"$root/slurm.conf" <<END
ClusterName=sim$id
SlurmctldHost=$login($network.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$root/munge/socket
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation=$root/slurmctld
SlurmdSpoolDir=$root/%n/spool
SlurmctldPidFile=$root/slurmctld.pid
SlurmdPidFile=$root/%n/slurmd.pid
SlurmctldLogFile=$root/slurmctld.log
SlurmdLogFile=$root/%n/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/$track
TaskPlugin=task/affinity
ReturnToService=2
SlurmdTimeout=20
KillWait=30
MinJobAge=600
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PropagateResourceLimits=NONE
GresTypes=gpu
JobCompType=jobcomp/filetxt
JobCompLoc=$root/jobs.txt
${CLUSTER_CONF:-}
END
  for ((i = 1; i <= nodes; i++)); do
    echo "NodeName=$prefix$i NodeAddr=$(address "$prefix$i") CPUs=${CLUSTER_CPUS:-2} RealMemory=${CLUSTER_MEMORY:-8000} Gres=gpu:$gpus"
  done >>"$root/slurm.conf"
  cat >>"$root/slurm.conf" <<END
PartitionName=batch Nodes=ALL Default=YES MaxTime=60 GraceTime=10
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
END
}

start_munged() { # ADDRESS; each host has its own, because the address in a credential is where slurmctld calls a srun back
  local folder=$root/munge
  munged --socket="$folder/socket" --key-file="$root/munge.key" --pid-file="$folder/pid" --log-file="$folder/log" \
    --seed-file="$folder/seed" --origin="$1"
}

controller() {
  if [[ $1 == stop ]]; then
    end_daemon slurmctld "$root/slurmctld.pid"
  else # slurmctld looks up the names of nodes: it gets a separate /etc/hosts
    nohup unshare --mount bash -c "$release_mounts; mount --bind $root/hosts /etc/hosts; exec slurmctld -D" \
      >"$root/slurmctld.out" 2>&1 </dev/null &
  fi
}

up() {
  local nodes=$1 i
  for i in slurmctld slurmd munged ip nsenter pgrep; do
    command -v "$i" >/dev/null || { echo "$i is missing" >&2; return 1; }
  done
  down # what a killed run left
  mkdir -p "$root/slurmctld" "$root/munge" "$root/shared"; chmod 755 "$root" "$root/munge"
  mount -t tmpfs -o size=2g tmpfs "$root/shared" # a file system of its own, which a test can fill
  ip link add "$bridge" type bridge; ip addr add "$network.1/24" dev "$bridge"; ip link set "$bridge" up
  { echo "127.0.0.1 localhost"; echo "$network.1 $login"
    for ((i = 1; i <= nodes; i++)); do echo "$(address "$prefix$i") $prefix$i"; done; } >"$root/hosts"
  head -c 128 /dev/urandom >"$root/munge.key"; chmod 600 "$root/munge.key"
  start_munged "$network.1"; write_configuration "$nodes"
  # libpmix-dev brings this link too, with a PMIx on the loader's path that Dragon does not work with
  [[ -e $pmix || ! -e $pmix.2 ]] || { ln -s libpmix.so.2 "$pmix"; touch "$root/pmix"; }
  for ((i = 1; i <= nodes; i++)); do start_node "$prefix$i"; done
  controller start
  for ((i = 0; i < 480; i++)); do
    [[ $(sinfo -h -t idle -o %D -p batch 2>/dev/null) != "$nodes" ]] || return 0
    sleep 0.5
  done
  echo "the nodes did not come up:" >&2; sinfo -N -l >&2 || cat "$root/slurmctld.out" >&2; return 1
}

hold() {
  trap down EXIT
  trap '' INT HUP TERM
  up "$1"
  echo ready
  cat >/dev/null # until the owner closes the pipe, or dies
}

start_node() {
  local node=$1 i pid
  mkdir -p "$root/$node/cgroup" "$root/$node/spool"; rm -f "$root/$node/ready"
  env -i PATH="$PATH" HOME="$HOME" CLUSTER_ID="$id" nohup unshare --net --uts --mount --pid --ipc --fork \
    bash "$(readlink -f "$0")" _init "$node" >"$root/$node/out" 2>&1 </dev/null &
  echo $! >"$root/$node/outer"
  for ((i = 0; i < 1200; i++)); do pid=$(init_of "$node") && break; sleep 0.05; done
  ip link add "v$id-$node" type veth peer name eth0 netns "$pid"
  ip link set "v$id-$node" master "$bridge" up
  for ((i = 0; i < 1200; i++)); do [[ ! -s $root/$node/ready ]] || return 0; sleep 0.05; done
  echo "$node did not start:" >&2; cat "$root/$node/out" >&2; return 1
}

node_init() { # process 1 of a node
  local node=$1
  hostname "$node"
  eval "$release_mounts"
  mount -t proc proc /proc
  mount --rbind /sys/fs/cgroup "$root/$node/cgroup"; mount -t sysfs sysfs /sys
  mount --rbind "$root/$node/cgroup" /sys/fs/cgroup
  mount -t tmpfs -o size=8g tmpfs /dev/shm; mount -t tmpfs -o size=1g,mode=1777 tmpfs /tmp
  cat /proc/sys/kernel/random/uuid >"$root/$node/boot_id"
  mount --bind "$root/$node/boot_id" /proc/sys/kernel/random/boot_id
  mount --bind "$root/hosts" /etc/hosts
  mount --bind /dev/null /etc/resolv.conf # the lookup of an unknown name fails at once
  until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
  ip addr add "$(address "$node")/24" dev eth0; ip link set eth0 up; ip link set lo up
  ip route add default via "$network.1"
  mount -t tmpfs -o mode=755 tmpfs "$root/munge"; start_munged "$(address "$node")"
  cd /; slurmd -D & echo $$ >"$root/$node/ready"
  trap : TERM INT HUP
  while :; do sleep 1000000 & wait; done # bash reaps the orphans
}

stop_node() {
  local node=$1 pid i
  ip link set "v$id-$node" down 2>/dev/null || true # before the kill: the kernel closes the connections of killed processes
  if pid=$(init_of "$node"); then
    kill -9 "$pid"
    for ((i = 0; i < 100; i++)); do [[ -e /proc/$pid ]] || break; sleep 0.1; done
  fi
  ip link del "v$id-$node" 2>/dev/null || true
  find /sys/fs/cgroup/*/"slurm_$node" -depth -type d -exec rmdir {} + 2>/dev/null || true
  rm -f "$root/$node/outer"
}

down() {
  local folder
  end_daemon slurmctld "$root/slurmctld.pid"; end_daemon munged "$root/munge/pid"
  for folder in "$root/$prefix"*/; do [[ ! -d $folder ]] || stop_node "$(basename "$folder")"; done
  ip link del "$bridge" 2>/dev/null || true
  [[ ! -e $root/pmix ]] || rm -f "$pmix"
  umount --lazy "$root/shared" 2>/dev/null || true
  rm -rf "$root"
}

case ${1:-} in
  hold) hold "${2:-2}" ;;
  up) up "${2:-2}" ;;
  down) down ;;
  kill) stop_node "$2" ;;
  start) start_node "$2" ;;
  cut) ip link set "v$id-$2" down ;;
  mend) ip link set "v$id-$2" up ;;
  controller) controller "$2" ;;
  exec) pid=$(init_of "$2"); shift 2; exec nsenter -t "$pid" -n -u -m -p -i "$@" ;;
  _init) node_init "$2" ;;
  *) sed -n 2,12p "$0"; exit 2 ;;
esac
