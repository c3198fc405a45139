# shellcheck shell=bash disable=SC2034,SC2154
# What tpu_pod.sh and tpu_multislice.sh share: the actions, over functions that each defines (create, describe, delete, on_all,
# on_one, copy_to_all) and the states that it calls ready and gone.

own+=' --spot --name --zone --type --runtime --nfs --slices'

parse() {
    action=${1:-}
    [ $# -eq 0 ] || shift
    case $action in
        --help | '') usage; exit ;;
        run | up | copy | start | watch | logs | stop | down) ;;
        *) die "no action '$action'; see --help" ;;
    esac
    name='' zone='' type='' runtime='' nfs='' slices='' spot=()
    while [ $# -gt 0 ]; do
        case $1 in
            --help) usage; exit ;;
            --dry-run) dry_run=1; shift ;;
            --spot) spot=(--spot); shift ;;
            --name) name=$(value "$@"); shift 2 ;;
            --zone) zone=$(value "$@"); shift 2 ;;
            --type) type=$(value "$@"); shift 2 ;;
            --runtime) runtime=$(value "$@"); shift 2 ;;
            --nfs) nfs=$(value "$@"); shift 2 ;;
            --slices) slices=$(value "$@"); shift 2 ;;
            *) break ;;
        esac
    done
    need name zone
    flags=("$@")
    case $action in run | start | watch) need_experiment "$@" ;; *) [ $# -eq 0 ] || die "$action takes no '$1'; see --help" ;; esac
    case $action in run | up | watch) need type runtime ;; esac
}

# What state the machines are in; nothing if there are none; UNKNOWN if that cannot be told now, which is no reason to touch them.
state() {
    local told
    if [ -n "$dry_run" ]; then
        describe
    elif told=$(describe 2>&1); then
        echo "${told:-UNKNOWN}"
    elif [[ $told != *NOT_FOUND* ]]; then
        echo UNKNOWN
    fi
}

is_gone() { [ -z "$1" ] || [[ " $gone " == *" $1 "* ]]; }

# Makes the machines, or takes those that are there. This and what follows says itself where it ends: `watch` goes on after a
# failure, and there `set -e` does nothing.
up() {
    local now
    if [ -n "$dry_run" ]; then
        state
        create
        return
    fi
    now=$(state)
    if [ "$now" = UNKNOWN ]; then
        echo "gcloud cannot describe $name: $(describe 2>&1)" >&2
        return 1
    fi
    if is_gone "$now"; then
        # What was preempted stands in the way of its successor.
        [ -z "$now" ] || delete || return
        create || return
    fi
    until [ "$now" = "$ready" ]; do
        now=$(state)
        if is_gone "$now"; then
            echo "$name is ${now:-gone}: no machines were given" >&2
            return 1
        fi
        [ "$now" = "$ready" ] || sleep 30
    done
}

# A machine that has just begun updates itself.
WAIT='-o DPkg::Lock::Timeout=600'

# The committed files of this repository, and an environment for them: the machines' own Python is older than 3.11. A run that is
# alive keeps what it has, since Python reads some files late.
copy() {
    local archive=/tmp/rar_jax_$name.tar.gz
    run git -C "$(dirname "$0")/.." archive --format=tar.gz -o "$archive" HEAD || return
    copy_to_all "$archive" rar_jax.tar.gz || return
    on_all 'bash rar_jax/launch/background.sh --status 2>/dev/null | grep -qx running || (rm -rf rar_jax && mkdir rar_jax && tar xzf rar_jax.tar.gz -C rar_jax && python3 -m pip install -q --user uv && ~/.local/bin/uv venv -q --clear --python 3.11 ~/rar_jax_venv && ~/.local/bin/uv pip install -q --python ~/rar_jax_venv/bin/python -c rar_jax/requirements.lock -e "./rar_jax[tpu]")' || return
    [ -z "$nfs" ] || on_all "(command -v mount.nfs || (sudo apt-get $WAIT update -q && sudo apt-get $WAIT install -qy nfs-common)) && sudo mkdir -p /mnt/rar_jax && (mountpoint -q /mnt/rar_jax || sudo mount -t nfs $nfs /mnt/rar_jax)"
}

# On all workers, in the background, so that it goes on when the connection ends.
start() { on_all "cd rar_jax && bash launch/background.sh $(show python -m rar_jax run "${flags[@]}")"; }

logs() { on_one 'tail -n 100 -F rar_jax.log'; }

stop() { on_all 'cd rar_jax && bash launch/background.sh --stop'; }

down() { delete; }

# What became of the run; dead where nothing was copied yet. By process 0, and by all.
STATUS='bash rar_jax/launch/background.sh --status || echo dead'
status() { on_one "$STATUS"; }
statuses() { on_all "$STATUS"; }

last_words() { on_one 'tail -n 40 rar_jax.log'; }

anew() { up && copy && start; }

# Looks once a minute. Machines that were preempted are made anew, and the run goes on from its last checkpoint; a run that left
# with the exit code of a preemption is started again. What is due is tried until it works: just after a preemption there are often
# no machines, and others go away while they are spoken to.
watch() {
    local now told all due=''
    [ -z "$dry_run" ] || { rehearse; return; }
    while :; do
        now=$(state)
        if is_gone "$now"; then
            echo "$name is ${now:-gone}: it is made anew"
            due=anew
        elif [ "$now" = "$ready" ] && [ -z "$due" ]; then
            told=$(status) || told= # no connection: asked again
            case $told in
                '' | running) ;;
                0) echo "done; '${0##*/} down' gives the machines back"; return ;;
                "$PREEMPTED" | "$TERMINATED") echo "preempted: started again"; due=start ;;
                # A host that was rebooted has lost what `copy` mounted, too.
                dead) echo "process 0 is gone, without an exit code: started again"; due=anew ;;
                stopped) echo "stopped; '${0##*/} start' goes on" >&2; return 1 ;;
                *)
                    # When a host is lost, its peers leave with the code of a failure. If it was taken away, gcloud says so later.
                    if ! all=$(statuses) || [ "$(state)" != "$ready" ]; then
                        echo "exit code $told, and not all hosts answer: asked again"
                    elif grep -qxE "dead|$PREEMPTED|$TERMINATED" <<<"$all"; then
                        echo "the process of a host is gone or was preempted: all are started again"
                        due=anew
                    else
                        last_words || true
                        echo "failed with exit code $told" >&2
                        return "$told"
                    fi
                    ;;
            esac
        fi
        if [ -n "$due" ]; then
            if "$due"; then due=; else echo "it did not work; it is tried again in a minute" >&2; fi
        fi
        sleep 60
    done
}

# What `watch` would run.
rehearse() {
    remark "each minute"
    state
    status
    remark "after a preemption"
    delete
    anew
    remark "after exit code $PREEMPTED or $TERMINATED"
    start
    remark "after another one"
    statuses
    last_words
}

act() {
    if [ "$action" = run ]; then
        if ! anew; then
            echo "it could not be begun; '${0##*/} down' gives machines back, if there are any" >&2
            return 1
        fi
        watch
    else
        "$action"
    fi
}
