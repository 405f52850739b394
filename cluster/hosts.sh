#!/usr/bin/env bash
# Bare hosts by ssh: starts Ray on a head and its workers, and stops what it started and nothing else.
#
#     cluster/hosts.sh start 192.0.2.10 192.0.2.11 192.0.2.12     # the head first; USER@ADDRESS works too
#     ssh -N -L 8265:127.0.0.1:8265 192.0.2.10 &
#     export RAY_AUTH_MODE=token
#     mkdir -p job && cp my.yaml job/
#     ray job submit --address http://localhost:8265 --working-dir job -- emloc-ray run my.yaml ray.address=auto
#     cluster/hosts.sh stop 192.0.2.10 192.0.2.11 192.0.2.12
#
# Hosts are named by the addresses under which they reach each other, and ssh reaches them without a password. The package is
# installed at the same place on each, whose bin folder EMLOC_BIN names ($HOME/emloc-ray/bin by default):
#     python3 -m venv ~/emloc-ray && ~/emloc-ray/bin/pip install '/path/to/checkout[cluster,s3]'
#
# my.yaml: run_dir on a file system that all hosts share, as an absolute path (or s3://bucket/runs/mine), no ray.num_cpus. Ray
# finds each host's CPUs and GPUs; stages take what their sections ask for. After a lost head, the same commands go on.
#
# Other settings: RAY_PORT (6379), DASHBOARD_PORT (8265) and CLIENT_PORT (10001, of Ray's client), which two users of one head set
# to ports of their own; SCRATCH, a folder of yours on a local disk for Ray's session and spilled objects, which others then
# cannot open (/tmp/emloc-ray-UID; Ray takes no more than 39 characters); RAY_OPTIONS, more options of ray start. The token is made
# here where there is none, kept in ~/.ray/auth_token, and goes to the hosts through ssh's standard input. Credentials of a
# bucket, and HF_TOKEN for a gated model, belong into the hosts' own environment or ~/.aws, not here.
set -euo pipefail

usage() {
    echo "usage: $0 start|stop HEAD [WORKER]..." >&2
    exit 2
}

# Runs this file's own text on a host, as: hosts.sh on-host ACTION ADDRESS HEAD.
on_host() {
    local action=$1 host=$2 name command settings=()
    for name in EMLOC_BIN SCRATCH RAY_PORT DASHBOARD_PORT CLIENT_PORT RAY_OPTIONS; do
        [ -z "${!name:-}" ] || settings+=("$name=${!name}")
    done
    printf -v command '%q ' env "${settings[@]}" bash -s -- on-host "$action" "${host#*@}" "${head#*@}"
    ssh -o BatchMode=yes "$host" "$command" <"$0"
}

send_token() {
    ssh -o BatchMode=yes "$1" 'umask 077 && mkdir -p ~/.ray && cat >~/.ray/auth_token.new && mv ~/.ray/auth_token.new ~/.ray/auth_token' <~/.ray/auth_token
}

start_here() {
    local address=$1 head=$2 options=()
    if [ "$address" = "$head" ]; then
        options=(--head "--port=$port" --dashboard-host=127.0.0.1 "--dashboard-port=${DASHBOARD_PORT:-8265}")
        options+=("--ray-client-server-port=${CLIENT_PORT:-10001}")
    else
        options=("--address=$head:$port")
    fi
    (umask 077 && mkdir -p "$scratch") # what workers write elsewhere follows your own umask
    check_owner
    mkdir -p "$scratch/spill"
    if is_running; then
        echo "$address: runs already" >&2
        return
    fi
    : >"$scratch/ray.log" # that of an earlier start says that Ray started
    # RAY_OPTIONS is a list of words.
    # shellcheck disable=SC2086
    RAY_AUTH_MODE=token setsid nohup ray start "${options[@]}" --block "--node-ip-address=$address" \
        "--temp-dir=$scratch/ray" "--object-spilling-directory=$scratch/spill" ${RAY_OPTIONS:-} \
        >"$scratch/ray.log" 2>&1 </dev/null &
    echo $! >"$scratch/ray.pid"
    for _ in $(seq 120); do
        if grep -q 'Ray runtime started' "$scratch/ray.log"; then
            echo "$address: started"
            return
        fi
        is_running || break
        sleep 0.5
    done
    echo "$address: Ray did not start:" >&2
    tail -n 20 "$scratch/ray.log" >&2
    exit 1
}

# Whoever owns the folder decides what is written there and which processes are stopped.
check_owner() {
    if [ -L "$scratch" ] || [ ! -O "$scratch" ]; then
        echo "$scratch is another user's, or a link: remove it, or set SCRATCH to another folder" >&2
        exit 1
    fi
    chmod 700 "$scratch"
}

is_running() {
    [ -f "$scratch/ray.pid" ] && kill -0 "$(cat "$scratch/ray.pid")" 2>/dev/null
}

# The whole session of processes that start_here made: Ray's own first, politely.
stop_here() {
    local address=$1 leader
    if [ -f "$scratch/ray.pid" ]; then
        check_owner
        leader=$(cat "$scratch/ray.pid")
        pkill -TERM --session "$leader" || true
        for _ in $(seq 20); do
            pgrep --session "$leader" >/dev/null || break
            sleep 0.5
        done
        pkill -KILL --session "$leader" || true
        rm -rf "$scratch/ray.pid" "$scratch/ray" "$scratch/spill"
    fi
    echo "$address: stopped"
}

if [ "${1:-}" = on-host ]; then
    port=${RAY_PORT:-6379}
    scratch=${SCRATCH:-/tmp/emloc-ray-$(id -u)}
    PATH=${EMLOC_BIN:-$HOME/emloc-ray/bin}:$PATH
    "$2_here" "$3" "$4"
    exit
fi

[ $# -ge 2 ] || usage
action=$1 head=$2
shift
case $action in
start)
    if [ ! -s ~/.ray/auth_token ]; then
        (umask 077 && mkdir -p ~/.ray && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >~/.ray/auth_token)
    fi
    for host in "$@"; do
        send_token "$host"
        on_host start "$host"
    done
    ;;
stop)
    for host in "$@"; do
        on_host stop "$host" || echo "$host: not reached" >&2
    done
    ;;
*) usage ;;
esac
