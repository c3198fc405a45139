# shellcheck shell=bash disable=SC2034,SC2154
# What tpu_pod.sh and tpu_multislice.sh share: the actions, over functions that each defines (create, describe, delete, on_all,
# on_one, copy_to_all) and the states that it calls ready and gone.

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
        echo "$told"
    elif [[ $told != *NOT_FOUND* ]]; then
        echo UNKNOWN
    fi
}

is_gone() { [[ " $gone " == *" $1 "* ]]; }

# Makes the machines, or takes those that are there.
up() {
    local now
    if [ -n "$dry_run" ]; then
        state
        create
        return
    fi
    now=$(state)
    [ "$now" != UNKNOWN ] || die "gcloud cannot describe $name: $(describe 2>&1)"
    # What was preempted stands in the way of its successor.
    if is_gone "$now"; then
        delete
        now=
    fi
    [ -n "$now" ] || create
    until [ "$now" = "$ready" ]; do
        now=$(state)
        if is_gone "$now"; then die "$name is $now: no machines were given"; fi
        [ "$now" = "$ready" ] || sleep 30
    done
}

# The committed files of this repository, and an environment for them: the machines' own Python is older than 3.11.
copy() {
    local archive=/tmp/rar_jax_$name.tar.gz
    run git -C "$(dirname "$0")/.." archive --format=tar.gz -o "$archive" HEAD
    copy_to_all "$archive" rar_jax.tar.gz
    on_all 'rm -rf rar_jax && mkdir rar_jax && tar xzf rar_jax.tar.gz -C rar_jax && python3 -m pip install -q --user uv && ~/.local/bin/uv venv -q --clear --python 3.11 ~/rar_jax_venv && ~/.local/bin/uv pip install -q --python ~/rar_jax_venv/bin/python -c rar_jax/requirements.lock -e "./rar_jax[tpu]"'
    [ -z "$nfs" ] || on_all "sudo apt-get install -qy nfs-common && sudo mkdir -p /mnt/rar_jax && (mountpoint -q /mnt/rar_jax || sudo mount -t nfs $nfs /mnt/rar_jax)"
}

# On all workers, in the background, so that it goes on when the connection ends.
start() { on_all "cd rar_jax && bash launch/background.sh $(show python -m rar_jax run "${flags[@]}")"; }

logs() { on_one 'tail -n 100 -F rar_jax.log'; }

stop() { on_all 'cd rar_jax && bash launch/background.sh --stop'; }

down() { delete; }

# Looks once a minute. Machines that were preempted are made anew, and the run goes on from its last checkpoint; a run that left
# with the exit code of a preemption is started again.
watch() {
    local now code
    while :; do
        now=$(state)
        if [ -z "$now" ] || is_gone "$now"; then
            echo "$name is ${now:-gone}: it is made anew"
            up
            copy
            start
        elif [ "$now" = "$ready" ]; then
            code=$(on_one 'cat rar_jax.exit 2>/dev/null || true') || code= # no connection: asked again
            case $code in
                '') ;;
                0) echo "done; '${0##*/} down' gives the machines back"; return ;;
                "$PREEMPTED") echo "preempted: started again"; start ;;
                *) on_one 'tail -n 40 rar_jax.log'; echo "failed with exit code $code" >&2; return "$code" ;;
            esac
        fi
        sleep 60
    done
}

act() {
    case $action in
        run)
            up
            copy
            start
            [ -n "$dry_run" ] || watch
            ;;
        watch)
            # A dry run shows what a preemption would bring.
            [ -z "$dry_run" ] || { state; delete; create; copy; start; return; }
            watch
            ;;
        *) "$action" ;;
    esac
}
