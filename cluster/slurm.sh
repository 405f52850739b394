#!/usr/bin/env bash
# One run as a Slurm job: a head and workers by srun, the driver beside the head.
#
#     python3 -m venv ~/emloc-ray && ~/emloc-ray/bin/pip install '/path/to/checkout[cluster,s3]'     # once, on shared storage
#     source ~/emloc-ray/bin/activate
#     sbatch cluster/slurm.sh my.yaml               # then key.path=value … as for emloc-ray run
#     tail -f emloc-ray-JOBID.out
#
# my.yaml: run_dir on the shared file system, as an absolute path (or s3://bucket/runs/mine), no
# ray.num_cpus. A lost worker node is survived (--no-kill); a job that is preempted or
# loses its first node is put back into the queue (--requeue) and goes on from what run_dir holds.
#
# The job has two parts: nodes without GPUs, for the head and the stages whose section says gpus_per_worker: 0
# (merge always), and nodes with GPUs. For one kind of node, delete the part from "hetjob" on.
#
# Objects spill to the nodes' local disk, $SLURM_TMPDIR or /tmp; Ray's session and logs are in /tmp/emloc-ray-JOBID (RAY_TMPDIR
# for /tmp; Ray takes no more than 43 characters). The cluster's token is made here and lives in the job's environment alone; so
# do credentials of a bucket, and HF_TOKEN for a gated model, that you export before sbatch. Where a node knows its own name as a
# loopback address (Debian's 127.0.1.1), export HEAD_ADDRESS.
#SBATCH --job-name=emloc-ray
#SBATCH --output=emloc-ray-%j.out
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --no-kill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --mem=128G
#SBATCH hetjob
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --mem=256G
set -euo pipefail

[ $# -ge 1 ] || {
    echo "usage: sbatch $0 CONFIG [KEY.PATH=VALUE]..." >&2
    exit 2
}

port=$((20000 + SLURM_JOB_ID % 20000))
head=$(scontrol show hostnames "${SLURM_JOB_NODELIST_HET_GROUP_0:-$SLURM_JOB_NODELIST}" | head -n 1)
address=${HEAD_ADDRESS:-$(getent ahostsv4 "$head" | awk 'NR == 1 {print $1}')}

RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

# Ray on every node of a step, with what Slurm gave it there.
# shellcheck disable=SC2016
start_ray='session=${RAY_TMPDIR:-/tmp}/emloc-ray-$SLURM_JOB_ID
    spill=${SLURM_TMPDIR:-/tmp}/emloc-ray-$SLURM_JOB_ID
    for folder in "$session" "$spill"; do
        (umask 077 && mkdir -p "$folder") # what workers write elsewhere follows your own umask
        if [ -L "$folder" ] || [ ! -O "$folder" ]; then
            echo "$folder is of another user, or a link: remove it, or set RAY_TMPDIR and SLURM_TMPDIR" >&2
            exit 1
        fi
        chmod 700 "$folder"
    done
    mkdir -p "$spill/spill"
    # Ray itself sees the whole node, not what Slurm gave the job of it.
    memory=$(python -c "from emloc_ray.io.available_memory import memory_bytes; print(int(memory_bytes()))")
    shared=$(df --output=avail --block-size=1 /dev/shm | tail -n 1)
    objects=$((memory * 3 / 10 < shared * 9 / 10 ? memory * 3 / 10 : shared * 9 / 10))
    exec ray start "$@" --block "--num-cpus=${SLURM_CPUS_PER_TASK:-1}" "--num-gpus=${SLURM_GPUS_ON_NODE:-0}" \
        "--memory=$((memory * 6 / 10))" "--object-store-memory=$objects" \
        "--temp-dir=$session" "--object-spilling-directory=$spill/spill"'

# Waits until so many nodes have joined, five minutes at most: a run looks at its cluster as it begins.
# shellcheck disable=SC2016
wait_for_nodes='import sys, time, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
end = time.monotonic() + 300
while (there := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[2]) and time.monotonic() < end:
    time.sleep(1)
if there < int(sys.argv[2]):
    print(f"{there} of {sys.argv[2]} nodes have joined: the run begins with these", file=sys.stderr)'

# srun takes a task's CPUs from its own option alone.
cpus_per_task() {
    local of_group=SLURM_CPUS_PER_TASK_HET_GROUP_$1
    echo "${!of_group:-${SLURM_CPUS_PER_TASK:-1}}"
}

steps=()
trap 'kill "${steps[@]}" 2>/dev/null; wait' EXIT

srun --overlap --nodes=1 --ntasks=1 "--cpus-per-task=$(cpus_per_task 0)" "--nodelist=$head" bash -c "$start_ray" ray \
    --head "--node-ip-address=$address" "--port=$port" "--ray-client-server-port=$((port + 20000))" --dashboard-host=127.0.0.1 --include-dashboard=false &
steps+=($!)
until ray health-check --address "$address:$port" 2>/dev/null; do
    kill -0 "${steps[0]}" || exit 1
    sleep 1
done

expected=1
for ((group = 0; group < ${SLURM_HET_SIZE:-1}; group++)); do
    nodes=SLURM_JOB_NODELIST_HET_GROUP_$group
    mapfile -t workers < <(scontrol show hostnames "${!nodes:-$SLURM_JOB_NODELIST}" | grep -vxF "$head")
    [ ${#workers[@]} -gt 0 ] || continue
    expected=$((expected + ${#workers[@]}))
    options=(--overlap --no-kill --kill-on-bad-exit=0 --wait=0)
    options+=("--nodes=${#workers[@]}" --ntasks-per-node=1 "--cpus-per-task=$(cpus_per_task "$group")")
    [ "${SLURM_HET_SIZE:-1}" -eq 1 ] || options+=("--het-group=$group")
    list=$(IFS=, && echo "${workers[*]}")
    srun "${options[@]}" "--nodelist=$list" bash -c "$start_ray" ray "--address=$address:$port" &
    steps+=($!)
done

python -c "$wait_for_nodes" "$address:$port" "$expected"
emloc-ray run "$@" "ray.address=$address:$port"
