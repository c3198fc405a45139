#!/usr/bin/env bash
# Runs a verb as N processes on this machine: to try on a desk what a pod does.
#
#   launch/local.sh [options] N [VERB] --config CONFIG --workdir DIR [flags of the verb]
#   launch/local.sh --devices 2 2 --config digits --workdir runs/digits
#
# VERB is run (default), train, tokenize, evaluate or sample. Process 0 talks here, the others into files, whose ends are shown
# if one fails, upon which all stop.
#
#   --devices D   pretend that each process has D CPU devices
#   --port P      of process 0 (default: one that is free)
#   --dry-run     print the commands and run nothing
#   --help
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

own+=' --devices --port'
devices='' port=''
while [ $# -gt 0 ]; do
    case $1 in
        --help) usage; exit ;;
        --dry-run) dry_run=1; shift ;;
        --devices) devices=$(value "$@"); shift 2 ;;
        --port) port=$(value "$@"); shift 2 ;;
        *) break ;;
    esac
done
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || die "give the number of processes; see --help"
count=$1 verb=run
shift
if [ $# -gt 0 ] && [[ $1 != --* ]]; then verb=$1; shift; fi
if [ "$verb" = run ]; then need_experiment "$@"; else need_own_first "$@"; fi

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
# What stands before the command of process $1.
settings() {
    words=(env "RAR_JAX_PROCESS_COUNT=$count" "RAR_JAX_PROCESS_INDEX=$1" "RAR_JAX_COORDINATOR_ADDRESS=127.0.0.1:$2")
    if [ -n "$devices" ]; then
        words+=(JAX_PLATFORMS=cpu "XLA_FLAGS=--xla_force_host_platform_device_count=$devices")
    fi
}

if [ -n "$dry_run" ]; then
    for ((k = 0; k < count; k++)); do
        settings "$k" "${port:-PORT}"
        run "${words[@]}" python -m rar_jax "$verb" "$@"
    done
    exit
fi

logs=$(mktemp -d)
pids=()
# shellcheck disable=SC2317,SC2329  # traps call it
stop() { [ "${#pids[@]}" = 0 ] || kill "${pids[@]}" 2>/dev/null || true; }
trap 'signals=$((signals + 1)); stop' INT TERM
trap 'stop; rm -rf "$logs"' EXIT

# Starts all and waits. Its code is that of a preempted process, or else of the first that failed: a lost one ends the others.
once() {
    local address=${port:-$(free_port)} code=0 failed k
    pids=()
    for ((k = 0; k < count; k++)); do
        settings "$k" "$address"
        if [ "$k" = 0 ]; then
            "${words[@]}" python -m rar_jax "$verb" "$@" &
        else
            "${words[@]}" python -m rar_jax "$verb" "$@" >"$logs/$k" 2>&1 &
        fi
        pids+=($!)
    done
    for ((k = 0; k < count; k++)); do
        failed=0
        await "${pids[k]}" || failed=$?
        unset "pids[k]" # a second SIGTERM would find another process, or end a save
        if [ "$code" = 0 ] || is_preempted "$failed"; then code=$failed; fi
    done
    [ "$code" != 0 ] || return 0
    for ((k = 1; k < count; k++)); do
        echo "---- process $k:" >&2
        tail -n 20 "$logs/$k" >&2
    done
    return "$code"
}

code=0
once "$@" || code=$?
while is_preempted "$code" && [ "$signals" = 0 ]; do
    code=0
    once "$@" || code=$?
done
exit "$code"
