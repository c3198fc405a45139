#!/usr/bin/env bash
# Runs a command on this machine in the background: ~/rar_jax.log is what it says, ~/rar_jax.exit its exit code once it has one.
#
#   launch/background.sh [--dry-run] COMMAND...     e.g. python -m rar_jax run --config CONFIG --workdir DIR
#   launch/background.sh --stop                     SIGTERM to it
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
if [ "${1:-}" = --stop ]; then
    ! alive || run kill -TERM "$(cat ~/rar_jax.pid)"
    exit
fi
if [ -n "$dry_run" ]; then show "$@"; exit; fi
if alive; then echo "it runs already"; exit; fi
export PATH="$HOME/rar_jax_venv/bin:$PATH"
rm -f ~/rar_jax.exit
# The shell in between writes the exit code, and hands SIGTERM on to the command.
# shellcheck disable=SC2016
setsid nohup bash -c '
    "$@" & child=$!
    trap "kill -TERM $child" TERM
    code=0; wait $child || code=$?
    if kill -0 $child 2>/dev/null; then code=0; wait $child || code=$?; fi
    echo $code > ~/rar_jax.exit
' background "$@" >>~/rar_jax.log 2>&1 </dev/null &
echo $! >~/rar_jax.pid
