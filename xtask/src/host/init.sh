#!/bin/busybox sh
# The first process of a test host. It mounts what programs expect, runs /run/command and says how that ended.
#
# The first serial port has the kernel's messages and what is printed here. The command's stdout, stderr and /out go
# through virtio ports of their own, each ended by a mark (a secret of this run, in /mark) and the exit status; a dot
# on the fourth port every few seconds says that the host is alive.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/busybox HOME=/root TERM=linux SHELL=/bin/sh
/bin/busybox --install -s /busybox
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o mode=620,ptmxmode=666,gid=5 devpts /dev/pts
for folder in /dev/shm /tmp /run; do mount -t tmpfs -o mode=1777 tmpfs $folder; done
mount -t debugfs debugfs /sys/kernel/debug
mount -t cgroup2 cgroup2 /sys/fs/cgroup && echo "+cpu +memory +pids" >/sys/fs/cgroup/cgroup.subtree_control
ln -s /proc/self/fd /dev/fd
ip link set lo up 2>/dev/null
hostname "$(cat /name)"
[ -e /dev/kvm ] || modprobe kvm-amd

. /settings

port() { ls /dev/vport*p"$1"; }

if [ "$interactive" ]; then
    export rows columns TERM="$term"
    cd /root && setsid -c sh -c 'stty rows $rows cols $columns; exec busybox sh -l' </dev/hvc0 >/dev/hvc0 2>&1
    poweroff -f
fi

(while :; do echo . && sleep 5; done) >"$(port 4)" &

# ended PORT: what comes in, then the mark and the status.
ended() { { cat && printf '%s%03d' "$(cat /mark)" "$(cat /run/status)"; } >"$(port "$1")"; }

mkfifo /run/stdout /run/stderr
ended 1 </run/stdout &
ended 2 </run/stderr &
exec 5>/run/stdout 6>/run/stderr
cd /root
# Not in the background: there a shell has its commands ignore SIGINT.
setsid sh -c 'echo $$ >/run/group && exec sh /command' </dev/null >/run/stdout 2>/run/stderr 5>&- 6>&-
echo $? >/run/status
# What it left running would hold the streams open.
kill -9 -"$(cat /run/group)"
tar -C /out -cf - . | ended 3
exec 5>&- 6>&-
# The machine is switched off from outside, once everything has arrived.
while :; do sleep 60; done
