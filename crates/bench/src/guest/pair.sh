#!/bin/sh
# The guest of the pair's benchmark: serves Redis (6379) and HTTP (80), and does the jobs it is told on the console, "NAME SIZE" a line. Around each it says
# "PAIR begin NAME" and "PAIR end NAME RESULT"; whoever listens takes the time.
export PATH=/bin:/usr/bin
stty -echo
echo 1 > /proc/sys/vm/overcommit_memory

redis-server /etc/redis.conf &
mkdir -p /www
# 16 MiB that are the same in every guest.
/bench/kernels text 17000 | head -c 16777216 > /www/file
httpd -p 80 -h /www

loop() {
    i=0 sum=0
    while [ $i -lt "$1" ]; do
        sum=$(((sum * 31 + i) % 65521))
        i=$((i + 1))
    done
    echo $sum
}

# 18EB is 6379, 0A is listening.
until grep -q ':18EB 00000000:0000 0A' /proc/net/tcp; do usleep 10000; done
echo "PAIR ready"
while read -r job size; do
    echo "PAIR begin $job"
    case $job in
    shell) result=$(loop "$size") ;;
    kernel) result=$(/bench/kernels integer "$size") ;;
    busy) /bench/kernels busy "$size" ;;
    *) result=unknown ;;
    esac
    echo "PAIR end $job $result"
done
