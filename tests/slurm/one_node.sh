#!/usr/bin/env bash
# A real Slurm of one node on this machine, for trials; as root. Debian: apt-get install slurm-wlm munge
#   one_node.sh start DIR    writes DIR/slurm.conf, starts munged, slurmctld, slurmd; then: export SLURM_CONF=DIR/slurm.conf
#   one_node.sh stop DIR     stops what start began
set -eu
dir=$(readlink -m "$2") host=$(hostname -s)
case $1 in
start)
  mkdir -p "$dir"/{state,spool,log} /run/munge
  cat >"$dir/slurm.conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobRequeue=1
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(($(getconf _PHYS_PAGES) * $(getconf PAGE_SIZE) / 1048576 - 512)) State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
  chown -R munge: /run/munge /etc/munge /var/log/munge /var/lib/munge
  if [ ! -S /run/munge/munge.socket.2 ]; then
    runuser -u munge -- munged --pid-file=/run/munge/munged.pid
    touch "$dir/munged"
  fi
  export SLURM_CONF=$dir/slurm.conf
  slurmctld
  sleep 2
  slurmd
  sleep 2
  sinfo
  ;;
stop)
  for pid in "$dir/slurmd.pid" "$dir/slurmctld.pid"; do [ ! -f "$pid" ] || kill "$(cat "$pid")"; done
  [ ! -f "$dir/munged" ] || { kill "$(cat /run/munge/munged.pid)" && rm "$dir/munged"; }
  ;;
esac
