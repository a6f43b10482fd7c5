#!/bin/sh
# Runs the tests in the virtual machine of tests/kernels/__main__.py, which reads the lines KERNEL, RESULT and FAILED.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root ALLOW_ROOT=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PYTHONPATH="$project${site:+:$site}" LANG=C.UTF-8 HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mkdir -p /dev/shm /dev/pts && mount -t tmpfs shm /dev/shm && mount -t devpts pts /dev/pts
ip link set lo up
for card in virtio_net vmxnet3 igb e1000e; do modprobe "$card"; done
echo "KERNEL $(uname -r)"
step() {
    name=$1; shift
    case "${steps:-$name}" in *$name*) ;; *) return ;; esac
    timeout 400 "$python" -m pytest -q --tb=short --timeout 100 --durations 5 -p no:cacheprovider "$@" 2>&1 | tee /tmp/out
    echo "RESULT $name $(tail -n 1 /tmp/out | tr -d =)"
}
if cd "$project"; then
    step vectors tests/offload/test_program.py -k "kernel and not each_byte"
    step cards tests/kernels/nics.py
fi
echo o >/proc/sysrq-trigger
while :; do :; done
