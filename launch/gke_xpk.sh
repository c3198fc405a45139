#!/usr/bin/env bash
# Runs an experiment on a GKE cluster's TPUs with xpk, in the image of launch/Dockerfile.tpu.
#
#   launch/gke_xpk.sh [options] --config CONFIG --workdir DIR [--progress] [flags of rar_jax run]
#   launch/gke_xpk.sh --cluster mine --zone us-west4-a --project P --name rar-b --type v5litepod-16 --image REGISTRY/rar_jax \
#       --config rar_b --workdir /mnt/rar_jax/rar_b --config.generator.remat=True
#
# DIR must lie on storage that the cluster's pods mount (xpk storage attach). xpk starts a workload again after the exit code of
# a preemption, and after 42 and 127 to 255, which is how a pod ends whose node was taken away.
#
#   --cluster C, --zone Z, --project P
#   --name W        of the workload
#   --type T        TPU of each slice: v5litepod-16
#   --slices N      (default 1)
#   --image I       built, pushed and run; with --no-build only run
#   --restarts N    at most (default 100)
#   --stop          delete the workload instead
#   --dry-run       print the commands and run nothing
#   --help
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

own+=' --cluster --zone --project --name --type --slices --image --no-build --restarts --stop'
cluster='' zone='' project='' name='' type='' image='' slices=1 restarts=100 build=1 stop=''
while [ $# -gt 0 ]; do
    case $1 in
        --help) usage; exit ;;
        --dry-run) dry_run=1; shift ;;
        --no-build) build=''; shift ;;
        --stop) stop=1; shift ;;
        --cluster) cluster=$(value "$@"); shift 2 ;;
        --zone) zone=$(value "$@"); shift 2 ;;
        --project) project=$(value "$@"); shift 2 ;;
        --name) name=$(value "$@"); shift 2 ;;
        --type) type=$(value "$@"); shift 2 ;;
        --image) image=$(value "$@"); shift 2 ;;
        --slices) slices=$(value "$@"); shift 2 ;;
        --restarts) restarts=$(value "$@"); shift 2 ;;
        *) break ;;
    esac
done
need cluster zone project name
where=(--cluster="$cluster" --zone="$zone" --project="$project" --workload="$name")
if [ -n "$stop" ]; then
    run xpk workload delete "${where[@]}"
    exit
fi
need_experiment "$@"
need type image
if [ -n "$build" ]; then
    root=$(dirname "$0")/..
    run docker build -f "$root/launch/Dockerfile.tpu" -t "$image" "$root"
    run docker push "$image"
fi
run xpk workload create "${where[@]}" --tpu-type="$type" --num-slices="$slices" --docker-image="$image" \
    --max-restarts="$restarts" --restart-on-exit-codes="$PREEMPTED" --command="$(show python -m rar_jax run "$@")"
