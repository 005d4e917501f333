#!/bin/busybox sh
# The first process of a Linux guest of the tests. It looks at its machine, prints a line `check WHAT: RESULT` for each
# thing that it looked at and `check done` after the last, and then does what a word of the kernel's command line asks for:
#   bantam.do=poweroff|reboot|asked|panic|shell|top|stay|disk    [default: poweroff]
#   bantam.busy=SECONDS      how long all CPUs are to be busy at once [default: 1]
#   bantam.checks=none       look at nothing
# What is printed is for a test to judge: nothing here knows what is right. busybox's shell finds all its commands in
# itself; there is nothing else in this file system but the kernels' modules.
/bin/busybox mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
export PATH=/bin HOME=/ TERM=linux

act=poweroff busy=1 checks=all
for word in $(cat /proc/cmdline); do
    case $word in
    bantam.do=*) act=${word#*=} ;;
    bantam.busy=*) busy=${word#*=} ;;
    bantam.checks=*) checks=${word#*=} ;;
    esac
done
# What follows is not to be torn apart by the kernel's own messages; they are counted at the end.
dmesg -n 1

check() { echo "check $*"; }

online() { grep -c ^processor /proc/cpuinfo; }

# The RAM that the kernel was told of, in KiB: /proc/meminfo has only what is left of it.
ram() {
    sum=0
    while read -r range _ what; do
        [ "$what" = "System RAM" ] && sum=$((sum + 0x${range#*-} - 0x${range%-*} + 1))
    done </proc/iomem
    echo $((sum / 1024))
}

# How often each CPU's own timer has come, in the order of the CPUs.
ticks() { awk '/^ *LOC:|arch_timer/ { for (i = 2; $i ~ /^[0-9]+$/; i++) n[i] += $i } END { for (i = 2; i in n; i++) print n[i] }' /proc/interrupts; }

load_modules() {
    loaded=
    for module in $(cat /modules); do
        file=/lib/modules/$(uname -r)/$module.ko
        [ -e "$file" ] && insmod "$file" && loaded="$loaded $module"
    done
    check "modules:${loaded:- none}"
}

# device DRIVER NAME: is there a device for a driver, and the driver at all?
pvpanic() {
    ls /lib/modules/"$(uname -r)"/pvpanic.ko >/dev/null 2>&1 || { check pvpanic: no driver && return; }
    for device in /sys/bus/platform/drivers/pvpanic-mmio/*/driver /sys/bus/pci/drivers/pvpanic-pci/*/driver; do
        [ -e "$device" ] && check pvpanic: ready && return
    done
    check pvpanic: no device
}

rtc() {
    cd /sys/class/rtc/rtc0 || { check rtc: none && return; }
    check "rtc: $(cat date)T$(cat time) $(cat since_epoch)"
    cd /
}

# All CPUs busy at once, each with a process that stays on it. Every one's timer must go on ticking.
stall() {
    before=$(ticks) spinners=
    for cpu in $(seq 0 $((cpus - 1))); do
        taskset "$(printf %x $((1 << cpu)))" /bin/busybox sh -c 'while :; do :; done' &
        spinners="$spinners $!"
    done
    sleep "$busy"
    kill $spinners
    wait
    after=$(ticks) cpu=0 still=
    for count in $after; do
        set -- $before
        shift $cpu
        [ "$count" -gt "${1:-0}" ] || still="$still $cpu"
        cpu=$((cpu + 1))
    done
    if [ $cpu != "$cpus" ]; then
        check "timer: $cpu counts for $cpus CPUs"
    elif [ "$still" ]; then
        check "timer: none on CPU$still"
    else
        check timer: every cpu
    fi
    if dmesg | grep -E 'stall|lockup|hung task|blocked for more'; then
        check stall: the lines above
    else
        check stall: none
    fi
}

hotplug() {
    switch=/sys/devices/system/cpu/cpu1/online
    [ -e $switch ] || { check hotplug: one cpu && return; }
    echo 0 >$switch
    without=$(online)
    echo 1 >$switch
    again=$(online)
    if [ "$without $again" = "$((cpus - 1)) $cpus" ]; then
        check hotplug: ok
    else
        check "hotplug: $cpus CPUs, then $without, then $again"
    fi
}

look() {
    cpus=$(online)
    check "kernel: $(uname -r)"
    check "cpus: $cpus"
    check "memory: $(($(ram) / 1024)) MiB"
    rtc
    check "clock: $(date -u +%s)"
    check "clocksource: $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
    if timeout 20 dd if=/dev/random of=/dev/null bs=16 count=1 2>/dev/null; then
        check random: ready
    else
        check random: not ready
    fi
    load_modules
    pvpanic
    stall
    hotplug
    # Errors and warnings of the kernel, with their levels.
    dmesg -r | grep '^<[0-4]>' | sed 's/^/check dmesg: /'
}

# A key of any keyboard powers the machine off: the only one that there can be is its power button.
button() {
    for keys in /dev/input/event*; do
        [ -e "$keys" ] || continue
        # Opened before it is said: a key pressed while nobody has it open is lost.
        exec 3<"$keys"
        check button: ready
        dd of=/dev/null bs=24 count=1 <&3 2>/dev/null
        echo the power button was pressed
        poweroff -f
    done
    check button: none
}

# A file system made, filled, taken away and looked at again; and a second disk that can only be read.
disk() {
    [ -b /dev/vda ] || { check disk: none && return; }
    check "disk size: $(cat /sys/block/vda/size)"
    check "disk serial: $(cat /sys/block/vda/serial)"
    check "disk cache: $(cat /sys/block/vda/queue/write_cache)"
    mkdir /disk
    mke2fs /dev/vda >/dev/null 2>&1 && mount -t ext4 /dev/vda /disk || { check disk: no file system && return; }
    for file in 1 2 3 4 5 6 7 8; do
        dd if=/dev/urandom of=/disk/$file bs=64k count=16 2>/dev/null
    done
    before=$(cat /disk/? | md5sum)
    rm /disk/3 && fstrim /disk && cp /disk/4 /disk/3
    again=$(cat /disk/1 /disk/2 /disk/4 /disk/4 | md5sum)
    sync && umount /disk && echo 3 >/proc/sys/vm/drop_caches
    mount -t ext4 -o ro /dev/vda /disk
    if [ "$again" = "$(cat /disk/1 /disk/2 /disk/3 /disk/4 | md5sum)" ] && [ "$before" ]; then
        check disk: the same
    else
        check disk: not the same
    fi
    umount /disk
    check "second disk: $(head -c 6 /dev/vdb), read-only $(cat /sys/block/vdb/ro)"
    dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=fsync 2>/dev/null && check second disk: written
    check "disk errors: $(dmesg | grep -cE 'I/O error|EXT4-fs (error|warning)')"
}

[ "$checks" = none ] || look
check done

case $act in
reboot) reboot -f ;;
# Once a line has come: until then the machine is as it is.
asked) read -r _ && reboot -f ;;
panic)
    [ "$checks" = none ] && load_modules
    echo 1 >/proc/sys/kernel/sysrq
    echo c >/proc/sysrq-trigger
    ;;
disk)
    for module in virtio_mmio virtio_blk; do
        file=/lib/modules/$(uname -r)/$module.ko
        [ -e "$file" ] && insmod "$file"
    done
    disk
    ;;
shell) setsid cttyhack /bin/busybox sh ;;
top) setsid cttyhack top ;;
stay)
    [ "$checks" = none ] && load_modules
    button
    while :; do sleep 60; done
    ;;
esac
poweroff -f
