#!/usr/bin/env bash
# Runs an experiment on one Cloud TPU slice, its hosts included, with gcloud.
#
#   launch/tpu_pod.sh ACTION --name NAME --zone ZONE [options] --config CONFIG --workdir DIR [--progress] [flags of rar_jax run]
#   launch/tpu_pod.sh run --name mine --zone us-west4-a --type v5litepod-16 --runtime v2-alpha-tpuv5-lite --spot \
#       --nfs 10.0.0.2:/share --config rar_b --workdir /mnt/rar_jax/rar_b --config.generator.remat=True
#
#   run     up, copy, start, watch
#   up      create the slice, or take the one of this name
#   copy    the committed files of this repository and their environment, to all hosts where no run is alive; mounts --nfs
#   start   the experiment on all hosts, in the background
#   watch   until it ends; a slice that was preempted is made anew, and the run goes on from its last checkpoint
#   logs    follow process 0
#   stop    end the experiment, and what watches it; the slice stays
#   down    delete the slice
#
#   --type T      accelerator type: v5litepod-16, v4-32, v6e-16
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
ready=READY gone='PREEMPTED TERMINATED STOPPED'
parse "$@"
[ -z "$slices" ] || die "--slices is tpu_multislice.sh's"

vm() { run gcloud compute tpus tpu-vm "$@" --zone="$zone"; }
create() { vm create "$name" --accelerator-type="$type" --version="$runtime" "${spot[@]}"; }
describe() { vm describe "$name" --format='value(state)'; }
delete() { vm delete "$name" --quiet; }
on_all() { vm ssh "$name" --worker=all --command="$1"; }
on_one() { vm ssh "$name" --worker=0 --command="$1"; }
copy_to_all() { vm scp "$1" "$name:$2" --worker=all; }
act
