#!/usr/bin/env bash
# Runs an experiment on several Cloud TPU slices, joined by the data centre's network, with gcloud's queued resources.
#
#   launch/tpu_multislice.sh ACTION --name NAME --zone ZONE [options] --config CONFIG --workdir DIR [--progress] [flags of rar_jax run]
#   launch/tpu_multislice.sh run --name mine --zone us-west4-a --slices 2 --type v5litepod-16 --runtime v2-alpha-tpuv5-lite \
#       --nfs 10.0.0.2:/share --config rar_b --workdir /mnt/rar_jax/rar_b --config.generator.remat=True
#
# ACTION is run, up, copy, start, watch, logs, stop or down, as in tpu_pod.sh. The mesh's data axis reaches over the slices:
# fsdp x tensor must lie within one.
#
#   --slices N    how many, at least 2
#   --type T      accelerator type of each: v5litepod-16, v4-32, v6e-16
#   --runtime R   version of the machines' software: v2-alpha-tpuv5-lite, tpu-ubuntu2204-base
#   --spot        cheaper, and can be taken away
#   --nfs H:/P    share to mount on /mnt/rar_jax; DIR must lie where all hosts see it
#   --dry-run     print the commands and run nothing
#   --help
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
# shellcheck source=launch/tpu.sh
. "$(dirname "$0")/tpu.sh"
# shellcheck disable=SC2034
ready=ACTIVE gone='SUSPENDED SUSPENDING FAILED'
parse "$@"
case $action in run | up | watch) [[ $slices =~ ^[0-9]+$ && $slices -ge 2 ]] || die "--slices must be at least 2; see --help" ;; esac

queued() { run gcloud compute tpus queued-resources "$@" --zone="$zone"; }
create() {
    queued create "$name" --node-count="$slices" --node-prefix="$name" --accelerator-type="$type" \
        --runtime-version="$runtime" "${spot[@]}"
}
describe() { queued describe "$name" --format='value(state.state)'; }
delete() { queued delete "$name" --force --quiet; }
on_all() { queued ssh "$name" --node=all --worker=all --command="$1"; }
on_one() { queued ssh "$name" --node=0 --worker=0 --command="$1"; }
copy_to_all() { queued scp "$1" "$name:$2" --node=all --worker=all; }
act
