#!/bin/bash
# A real Slurm on one machine: every node has its own network address, host name, processes, /tmp and
# /dev/shm (Linux namespaces), so that they meet over addresses as machines do.  Root; no systemd.
#
#   apt-get install -y --no-install-recommends munge slurmctld slurmd slurm-client iproute2
#       ACCOUNTING=yes (sacct, `launch --wait`) also wants: slurmdbd mariadb-server
#   cluster.sh up            start login + NODES nodes, wait until all are idle
#   cluster.sh run CMD...    on the login node
#   cluster.sh on node2 CMD...       on a node
#   cluster.sh power-off node2       the machine stops answering, and its processes are gone
#   cluster.sh cut node2 | join node2    its cable is out / in again; its processes live
#   cluster.sh boot node2            the machine again after power-off
#   cluster.sh restart node2         its slurmd, or login's slurmctld
#   cluster.sh down          everything ends, nothing is left but $SLURM_HOME
#
# Environment, read by `up` and kept for the other commands:
#   SLURM_HOME   where all files are (prepo-slurm in the temporary folder); clusters of several do not meet
#   NODES        2
#   SHARED       directories of /tmp that all nodes see, beside SLURM_HOME ("the shared file system")
#   ACCOUNTING   no | yes: slurmdbd on mariadb
#   KILL_WAIT 30, SLURMD_TIMEOUT 300, CRED_EXPIRE 120, PERIOD 0.3 s: Slurm's own defaults; smaller is quicker
#   EXTRA        further lines of slurm.conf
#   DISK_MB      0: none; else a file system of this size at $SLURM_HOME/disk, to be filled or made read-only
#   OWN_NAME     address that a node's /etc/hosts has for its own name (Debian, Ubuntu: 127.0.1.1)
set -Eeuo pipefail
export PATH=$PATH:/usr/sbin:/sbin
DIR=${SLURM_HOME:-${TMPDIR:-/tmp}/prepo-slurm}
NET=10.77.0
[ "${1:-}" = up ] || { [ -f "$DIR/settings" ] && . "$DIR/settings"; }
NODES=${NODES:-2} ACCOUNTING=${ACCOUNTING:-no} SHARED=${SHARED:-} OWN_NAME=${OWN_NAME:-}
export SLURM_CONF=$DIR/etc/slurm.conf

say() { echo "cluster: $*" >&2; }
hosts() { echo login; for i in $(seq "$NODES"); do echo "node$i"; done; }
address() { case $1 in login) echo $NET.1 ;; node*) echo $NET.$((10 + ${1#node})) ;; esac; }
TAG=prepo-$(cksum <<<"$DIR" | cut -d" " -f1)
space() { echo "$TAG-$1"; }
alive() { [ -f "$DIR/pid/$1" ] && kill -0 "$(cat "$DIR/pid/$1")" 2>/dev/null; }
inside() {  # host, command: in all namespaces of a running host
    local host=$1 init
    shift
    init=$(tr -d ' ' <"/proc/$(cat "$DIR/pid/$host")/task/$(cat "$DIR/pid/$host")/children")
    ${EXEC:-} nsenter --target "$init" --net --uts --pid --mount --wdns="$PWD" -- \
        env SLURM_CONF="$SLURM_CONF" HOSTNAME="$host" "$@"
}
wait_for() {  # seconds, what, command
    local seconds=$1 what=$2 until
    shift 2
    until=$(($(date +%s) + seconds))
    until "$@" >/dev/null 2>&1; do
        [ "$(date +%s)" -lt "$until" ] || { say "no $what within $seconds s; logs are in $DIR/log"; return 1; }
        sleep 0.2
    done
}

network() {  # a bridge in a namespace of its own, and a cable to each host
    ip netns add "$(space switch)"
    ip -n "$(space switch)" link add bridge0 type bridge
    ip -n "$(space switch)" link set bridge0 up
    for host in $(hosts); do
        ip netns add "$(space "$host")"
        ip link add "eth0" netns "$(space "$host")" type veth peer name "$host" netns "$(space switch)"
        ip -n "$(space switch)" link set "$host" master bridge0 up
        ip -n "$(space "$host")" address add "$(address "$host")/24" dev eth0
        ip -n "$(space "$host")" link set eth0 up
        ip -n "$(space "$host")" link set lo up
    done
}

configure() {
    mkdir -p "$DIR"/{etc,log,pid,ctld,spool,dev,munge,local}
    chmod 755 "$DIR" "$DIR"/{munge,log,etc}
    dd if=/dev/urandom of="$DIR/munge/key" bs=1024 count=1 status=none
    chmod 400 "$DIR/munge/key"
    for i in {0..7}; do  # GPUs for Slurm to count: each is /dev/null
        [ -c "$DIR/dev/gpu$i" ] || mknod "$DIR/dev/gpu$i" c 1 3 2>/dev/null ||
            { touch "$DIR/dev/gpu$i"; mount --bind /dev/null "$DIR/dev/gpu$i"; }  # in a user namespace
    done
    { echo "127.0.0.1 localhost"; for host in $(hosts); do echo "$(address "$host") $host"; done; } >"$DIR/etc/hosts"
    cat >"$DIR/etc/slurm.conf" <<END
ClusterName=prepo
SlurmctldHost=login($(address login))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket,cred_expire=${CRED_EXPIRE:-120}
StateSaveLocation=$DIR/ctld
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/pid/slurmctld.own
SlurmdPidFile=$DIR/pid/slurmd.%n.own
SlurmctldLogFile=$DIR/log/slurmctld
SlurmdLogFile=$DIR/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=${KILL_WAIT:-30}
SlurmdTimeout=${SLURMD_TIMEOUT:-300}
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
NodeName=node[1-$NODES] NodeAddr=$NET.[11-$((10 + NODES))] CPUs=8 RealMemory=8000 Gres=gpu:8 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP
END
    [ "$NODES" -gt 1 ] || sed -i "s/node\[1-1\]/node1/; s/\.\[11-11\]/.11/" "$DIR/etc/slurm.conf"
    echo "NodeName=node[1-$NODES] Name=gpu File=$DIR/dev/gpu[0-7]" >"$DIR/etc/gres.conf"
    printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$DIR/etc/cgroup.conf"  # named, so that none is looked for
    if [ "$ACCOUNTING" = yes ]; then
        cat >>"$DIR/etc/slurm.conf" <<END
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=login
AccountingStoragePass=$DIR/munge/socket
END
        cat >"$DIR/etc/slurmdbd.conf" <<END
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket
DbdHost=login
SlurmUser=root
PidFile=$DIR/pid/slurmdbd.own
LogFile=$DIR/log/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
END
        chmod 600 "$DIR/etc/slurmdbd.conf"
    fi
    printf '%s\n' "${EXTRA:-}" >>"$DIR/etc/slurm.conf"
    if [ "${DISK_MB:-0}" -gt 0 ]; then
        mkdir -p "$DIR/disk"
        mount -t tmpfs -o "size=${DISK_MB}m" none "$DIR/disk"
    fi
    declare -p NODES ACCOUNTING SHARED OWN_NAME >"$DIR/settings"
}

boot() {  # host, daemons as a shell line: an init of its own that reaps; its end is the host's
    local host=$1 line=$2 own=$DIR/local/$1
    mkdir -p "$own"/tmp "$own"/shm
    chmod 1777 "$own"/tmp
    cat >"$own/init" <<END
set -e
hostname $host
cp $DIR/etc/hosts $own/hosts
[ -z "$OWN_NAME" ] || sed -i "s/^.* $host\$/$OWN_NAME $host/" $own/hosts
mount --bind $own/hosts /etc/hosts
mount -t tmpfs none /dev/shm
for shared in $DIR $SHARED; do
    case \$shared in /tmp/*) mkdir -p $own/tmp\${shared#/tmp}; mount --rbind \$shared $own/tmp\${shared#/tmp} ;; esac
done
mount --rbind $own/tmp /tmp
export SLURM_CONF=$SLURM_CONF
$line
wait
END
    setsid ip netns exec "$(space "$host")" unshare --uts --mount --pid --fork --kill-child --mount-proc \
        bash "$own/init" </dev/null >"$DIR/log/init.$host" 2>&1 &
    echo $! >"$DIR/pid/$host"
}
boot_node() { mkdir -p "$DIR/spool/$1"; boot "$1" "sleep infinity & slurmd -D &"; }
restart() {  # host: end its daemon of Slurm, and start it again; jobs live on
    local daemon=slurmd
    [ "$1" != login ] || daemon=slurmctld
    inside "$1" pkill -x "$daemon"
    wait_for 60 "end of $daemon" not inside "$1" pgrep -x "$daemon"
    inside "$1" bash -c "$daemon -D >>$DIR/log/init.$daemon.$1 2>&1 </dev/null &"
}
not() { ! "$@"; }

database() {
    say "accounting: mariadb, slurmdbd"
    mkdir -p "$DIR/sql"
    mariadb-install-db --user=root --datadir="$DIR/sql" --skip-test-db --auth-root-authentication-method=socket >"$DIR/log/sql_install" 2>&1
    inside login bash -c "exec mariadbd --no-defaults --user=root --datadir=$DIR/sql --socket=$DIR/sql.sock \
        --bind-address=127.0.0.1 --pid-file=$DIR/pid/sql.own --innodb-buffer-pool-size=16M --innodb-lock-wait-timeout=900 \
        --innodb-flush-log-at-trx-commit=0 >$DIR/log/sql 2>&1 </dev/null &"
    wait_for 180 database inside login mariadb --no-defaults --socket="$DIR/sql.sock" --user=root -e 'select 1'
    inside login mariadb --no-defaults --socket="$DIR/sql.sock" --user=root -e "create database slurm; \
        create user slurm@'127.0.0.1' identified by 'slurm'; create user slurm@localhost identified by 'slurm'; \
        grant all on slurm.* to slurm@'127.0.0.1'; grant all on slurm.* to slurm@localhost"
    inside login bash -c "slurmdbd -D >$DIR/log/init.slurmdbd 2>&1 </dev/null &"
    wait_for 180 slurmdbd inside login sacctmgr --noheader list cluster
    inside login sacctmgr --immediate --quiet add cluster prepo >/dev/null
    inside login sacctmgr --immediate --quiet add account lab >/dev/null
    inside login sacctmgr --immediate --quiet add user root account=lab >/dev/null
}

up() {
    [ ! -f "$DIR/settings" ] || down
    trap 'say "not up"; down' ERR
    configure
    network
    munged --key-file="$DIR/munge/key" --socket="$DIR/munge/socket" --pid-file="$DIR/munge/pid" \
        --log-file="$DIR/log/munged" --seed-file="$DIR/munge/seed" --num-threads=2 --force >"$DIR/log/init.munge" 2>&1
    boot login "sleep infinity &"
    wait_for 60 "login node" inside login true
    [ "$ACCOUNTING" = no ] || database
    inside login bash -c "slurmctld -D >$DIR/log/init.slurmctld 2>&1 </dev/null &"
    for host in $(hosts); do [ "$host" = login ] || boot_node "$host"; done
    wait_for 180 "$NODES idle nodes" all_idle
    trap - ERR
    inside login sinfo
}
all_idle() { [ "$(inside login sinfo --noheader --Node --partition=batch --format=%T | grep -cx idle)" = "$NODES" ]; }

end_host() {  # its init is killed by the kernel with its parent, and all processes with their init
    local pid
    [ -f "$DIR/pid/$1" ] || return 0
    pid=$(cat "$DIR/pid/$1")
    kill -KILL "$pid" 2>/dev/null || true
    rm -f "$DIR/pid/$1"
}

down() {
    [ -d "$DIR/pid" ] || return 0
    for host in $(hosts); do end_host "$host"; done
    [ ! -f "$DIR/munge/pid" ] || kill "$(cat "$DIR/munge/pid")" 2>/dev/null || true
    for host in switch $(hosts); do ip netns delete "$(space "$host")" 2>/dev/null || true; done
    ! mountpoint -q "$DIR/disk" || umount --lazy "$DIR/disk"
    rm -rf "${DIR:?}"/{ctld,spool,munge,sql,sql.sock,pid,settings,local}
}

case ${1:-} in
    up | down) "$1" ;;
    restart) restart "$2" ;;
    run) shift; EXEC="exec" inside login "$@" ;;
    on) shift; EXEC="exec" inside "$@" ;;
    cut) ip -n "$(space switch)" link set "$2" down ;;
    join) ip -n "$(space switch)" link set "$2" up ;;
    power-off) ip -n "$(space switch)" link set "$2" down; end_host "$2" ;;
    boot) ip -n "$(space switch)" link set "$2" up; boot_node "$2" ;;
    *) sed -n '2,/^set/p' "$0" | grep '^#'; exit 2 ;;
esac
