#!/bin/sh
# The first process of Twinstep's guests. What it is to do comes from the kernel's command line:
#   twinstep.run=shell    a shell on the console (the default)
#   twinstep.run=redis    a Redis server on port 6379, nothing stored on disk
#   twinstep.run=loop     count in the shell, twinstep.rounds times (default 100000)
#   twinstep.run=sum      SHA-256 of twinstep.rounds MiB of zeros (default 64)
#   twinstep.run=idle     nothing, until somebody presses the power button
#   twinstep.run=none     power off at once
#   twinstep.ip=A.B.C.D/N, twinstep.gw=A.B.C.D: address of eth0 and its gateway
# It says what it has reached in lines that begin with "TWINSTEP": MODULES, NET, READY (with seconds since power-on), DONE, OFF.

export PATH=/bin:/usr/bin HOME=/root TERM=linux

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts && mount -t devpts pts /dev/pts

run=shell ip= gw= rounds=
for word in $(cat /proc/cmdline); do
    case $word in
    twinstep.run=*) run=${word#*=} ;;
    twinstep.ip=*) ip=${word#*=} ;;
    twinstep.gw=*) gw=${word#*=} ;;
    twinstep.rounds=*) rounds=${word#*=} ;;
    esac
done

say() {
    read -r up rest < /proc/uptime
    echo "TWINSTEP $* at $up s"
}

# The order is the order of the file.
while read -r module; do
    insmod "/lib/modules/$module.ko" || say "MODULE $module FAILED"
done < /lib/modules/order
say MODULES

ip link set lo up
if [ -n "$ip" ]; then
    if [ -e /sys/class/net/eth0 ]; then
        # Announce the address (a gratuitous ARP): passt sends to everyone's address until it has heard the guest's, and
        # the guest rightly ignores a connection that is opened to everyone.
        echo 1 > /proc/sys/net/ipv4/conf/eth0/arp_notify
        ip addr add "$ip" dev eth0
        ip link set eth0 up
        [ -z "$gw" ] || ip route add default via "$gw"
        say "NET $ip"
    else
        say "NET MISSING: there is no eth0 for $ip"
    fi
fi

# The power button: acpid reads the button's events and ends this process's child, which ends the guest in good order.
if ls /dev/input/event* > /dev/null 2>&1; then
    acpid -c /etc/acpi -l /dev/null
fi

off() {
    say OFF
    # Wait until the last line has left the serial port: stty sets its values only after the output has drained.
    stty -echo < /dev/console
    poweroff -f
}

case $run in
shell)
    say READY shell
    # A session of its own with the serial port as its terminal, so that Ctrl-C and job control work.
    setsid cttyhack sh -i
    ;;
redis)
    echo 1 > /proc/sys/vm/overcommit_memory
    redis-server /etc/redis.conf &
    redis=$!
    echo $redis > /run/workload
    # Ready is when the kernel lists the port (18EB is 6379) as listening (0A). A server that died will never be.
    until grep -q ':18EB 00000000:0000 0A' /proc/net/tcp; do
        kill -0 $redis 2> /dev/null || break
        usleep 10000
    done
    kill -0 $redis 2> /dev/null && say READY redis
    wait $redis
    say "DONE redis, exit status $?"
    ;;
loop)
    say READY loop
    i=0 sum=0
    while [ $i -lt "${rounds:-100000}" ]; do
        sum=$(((sum * 31 + i) % 65521))
        i=$((i + 1))
    done
    say "DONE loop $sum"
    ;;
sum)
    say READY sum
    digest=$(dd if=/dev/zero bs=1048576 count="${rounds:-64}" 2> /dev/null | sha256sum)
    say "DONE sum ${digest%% *}"
    ;;
idle)
    say READY idle
    sleep 2147483647 &
    echo $! > /run/workload
    wait
    ;;
none) ;;
*) say "UNKNOWN twinstep.run=$run (shell, redis, loop, sum, idle, none)" ;;
esac
off
