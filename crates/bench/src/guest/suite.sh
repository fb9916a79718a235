#!/bin/sh
# Does the workloads of /bench/plan ("NAME SIZE" lines), one after the other; the same script in every guest and natively.
# Before each it says "BENCH ready NAME" and waits for a line, so that several machines can take turns. Around each it says
# "BENCH begin NAME" and "BENCH end NAME STATUS"; whoever listens takes the time. Afterwards comes "BENCH digest NAME HEX", a
# digest of what the workload printed, which must be the same everywhere.
# setup_NAME and cleanup_NAME are not timed.

export PATH=/bin:/usr/bin HOME=/tmp LC_ALL=C PYTHONHASHSEED=0 OPENSSL_CONF=/dev/null
# What a processor of the level x86-64-v2 offers: no PCLMULQDQ, FMA, XOP, MOVBE, AES, XSAVE, AVX, F16C, RDRAND; nothing of leaf 7.
V2='~0x7e40180200000000:0'
cd /tmp

python() { python3 -I -S -E -B "$@"; }

run_shell() {
    i=0 sum=0
    while [ $i -lt "$1" ]; do
        sum=$(((sum * 31 + i) % 65521))
        i=$((i + 1))
    done
    echo $sum
}

run_pyint() { python /bench/fannkuch.py "$1"; }
run_pyfloat() { python /bench/nbody.py "$1"; }

setup_sqlite() { sed "s/SIZE/$1/" /bench/queries.sql > queries.sql; }
run_sqlite() { sqlite3 -batch :memory: < queries.sql; }

# Zeros cost as much as anything else to hash and to encrypt.
zeros() { dd if=/dev/zero bs=65536 count=$(($1 * 16)) 2> /dev/null; }
setup_sha256() { zeros "$1" > input; }
run_sha256() { openssl dgst -sha256 -r input; }
setup_aes() { zeros "$1" > input; }
run_aes() { openssl enc -aes-128-cbc -nosalt -K 000102030405060708090a0b0c0d0e0f -iv 00 -in input -out /dev/null && echo "$1"; }
# One RSA signature a signer; the signers are all the same.
setup_rsa() {
    echo "sign this" > input
    signers=
    while [ ${#signers} -lt $(($1 * 23)) ]; do signers="$signers -signer /bench/rsa.pem"; done
}
run_rsa() { openssl cms -sign -binary -noattr -nocerts -in input -outform DER $signers; }
setup_sha256v2() { setup_sha256 "$1"; }
run_sha256v2() { OPENSSL_ia32cap=$V2 openssl dgst -sha256 -r input; }
setup_aesv2() { setup_aes "$1"; }
run_aesv2() { (export OPENSSL_ia32cap=$V2; run_aes "$1"); }
setup_rsav2() { setup_rsa "$1"; }
run_rsav2() { (export OPENSSL_ia32cap=$V2; run_rsa "$1"); }

setup_gzip() { /bench/kernels text "$1" > input; }
# By path: busybox's shell would take its own.
run_gzip() { /usr/bin/gzip -9 -n < input; }
setup_xz() { /bench/kernels text "$1" > input; }
run_xz() { /usr/bin/xz -6 -T1 < input; }

run_int() { /bench/kernels integer "$1"; }
run_chase() { /bench/kernels chase "$1"; }
run_stream() { /bench/kernels stream "$1"; }
run_pipe() { /bench/kernels pipe "$1"; }
run_fork() { /bench/kernels fork "$1"; }

setup_tcc() { /bench/kernels source "$1" > input.c; }
run_tcc() { tcc -B/usr/lib/tcc -nostdinc -c input.c -o output.o && cat output.o; }

setup_redis() {
    redis-server --save '' --appendonly no --port 7379 --bind 127.0.0.1 > /dev/null &
    until redis-cli -p 7379 ping > /dev/null 2>&1; do
        kill -0 $! || return 1
        usleep 20000
    done
}
# The rates it prints are the guest's opinion and are not used; how many requests were served must be right.
redis() { redis-benchmark -p 7379 -t set,get -n "$1" -c 10 -P "$2" -q > /dev/null && redis-cli -p 7379 info commandstats | grep -o -E 'cmdstat_(set|get):calls=[0-9]+' | sort; }
cleanup_redis() {
    redis-cli -p 7379 shutdown nosave
    wait
}
setup_redis1() { setup_redis; }
run_redis1() { redis "$1" 1; }
cleanup_redis1() { cleanup_redis; }
setup_redis16() { setup_redis; }
run_redis16() { redis "$1" 16; }
cleanup_redis16() { cleanup_redis; }

has() { type "$1" > /dev/null 2>&1; }

while read -r name size <&3; do
    if has "setup_$name"; then "setup_$name" "$size" 2> errors < /dev/null; fi
    echo "BENCH ready $name"
    read -r turn
    echo "BENCH begin $name"
    "run_$name" "$size" > output 2>> errors < /dev/null
    status=$?
    echo "BENCH end $name $status"
    if has "cleanup_$name"; then "cleanup_$name" > /dev/null 2>> errors < /dev/null; fi
    digest=$(sha256sum output)
    echo "BENCH digest $name ${digest%% *}"
    if [ $status -ne 0 ]; then tail -n 5 errors | sed "s/^/BENCH note $name /"; fi
    rm -f ./*
done 3< /bench/plan
echo "BENCH done"
