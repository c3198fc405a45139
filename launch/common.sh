# shellcheck shell=bash
# What the scripts of this folder share; they source it.

# The exit code of a preempted training, which has saved (EX_TEMPFAIL of sysexits.h). SIGTERM ends everything else with 143.
# Runs that end with one of these codes are restarted. Any other failure would only repeat.
PREEMPTED=75
TERMINATED=143

# Whether $1 is the exit code of a preemption.
is_preempted() { [ "$1" = "$PREEMPTED" ] || [ "$1" = "$TERMINATED" ]; }

dry_run=
own='--dry-run'

# The comment at the head of a script is its help.
usage() { sed -n '2,${/^#/!q;s/^# \{0,1\}//p}' "$0"; }

die() {
    echo "${0##*/}: $*" >&2
    exit 2
}

# Runs a command, or only prints it.
run() {
    if [ -n "$dry_run" ]; then show "$@"; else "$@"; fi
}

# In a dry run, when what follows would be run.
remark() { [ -z "$dry_run" ] || echo "# $*:"; }

# Waits for child $1, whose exit code is its own. A signal for which there is a trap ends `wait` early, with a code that says nothing
# about the child; so each such trap counts in `signals`. The shell remembers the code of a child that has ended meanwhile.
signals=0
await() {
    local before code
    while :; do
        before=$signals code=0
        wait "$1" || code=$?
        [ "$signals" != "$before" ] || return "$code"
    done
}

# A command as it could be typed: quoted only where it must be.
show() {
    local word quote="'\\''" text=()
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then text+=("$word"); else text+=("'${word//\'/$quote}'"); fi
    done
    echo "${text[*]}"
}

# The script's own options, which are in `own`, are none of rar_jax: behind its flags they would be passed on to it, --dry-run too.
need_own_first() {
    local word
    for word in "$@"; do
        [[ " $own " != *" ${word%%=*} "* ]] || die "$word must stand before --config; see --help"
    done
}

# `rar_jax run` needs both.
need_experiment() {
    need_own_first "$@"
    [[ " $* " == *" --config"[\ =]* && " $* " == *" --workdir"[\ =]* ]] || die "give --config and --workdir; see --help"
}

# Each of these variables, which have the names of options, has a value.
need() {
    local name
    for name in "$@"; do [ -n "${!name}" ] || die "give --$name; see --help"; done
}

# The value of an option, $1 being the option and $2 what follows it.
value() {
    [ $# -ge 2 ] || die "$1 needs a value; see --help"
    echo "$2"
}
