#!/usr/bin/env bash
# Runs a command on this machine in the background: ~/rar_jax.log is what it says, ~/rar_jax.exit its exit code once it has one.
#
#   launch/background.sh [--dry-run] COMMAND...     e.g. python -m rar_jax run --config CONFIG --workdir DIR
#   launch/background.sh --stop                     SIGTERM to it
#   launch/background.sh --status                   running, its exit code, stopped (by --stop), or dead (ended without a code)
#
# ~/rar_jax_venv is its Python, if there is one. What runs already is left alone.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
case ${1:-} in
    --help | '') usage; exit ;;
    --dry-run) dry_run=1; shift ;;
esac
alive() { [ -f ~/rar_jax.pid ] && kill -0 "$(cat ~/rar_jax.pid)" 2>/dev/null; }
case ${1:-} in
    --stop)
        # The code of a run that was stopped is that of a preemption; the mark tells them apart.
        run touch ~/rar_jax.stopped
        ! alive || run kill -TERM "$(cat ~/rar_jax.pid)"
        exit
        ;;
    --status)
        if alive; then
            echo running
        elif [ -e ~/rar_jax.stopped ]; then
            echo stopped
        elif [ -s ~/rar_jax.exit ]; then
            cat ~/rar_jax.exit
        else
            echo dead
        fi
        exit
        ;;
esac
if [ -n "$dry_run" ]; then show "$@"; exit; fi
if alive; then echo "it runs already"; exit; fi
export PATH="$HOME/rar_jax_venv/bin:$PATH"
rm -f ~/rar_jax.exit ~/rar_jax.stopped
# The shell in between, whose $0 is common.sh, writes the exit code, and hands SIGTERM on to the command.
# shellcheck disable=SC2016
setsid nohup bash -c '
    . "$0"
    "$@" & child=$!
    trap "signals=\$((signals + 1)); kill -TERM $child" TERM
    await $child
    echo $? > ~/rar_jax.exit
' "$(dirname "$0")/common.sh" "$@" >>~/rar_jax.log 2>&1 </dev/null &
echo $! >~/rar_jax.pid
