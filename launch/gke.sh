#!/usr/bin/env bash
# Trains on a TPU slice of Google Kubernetes Engine, v4 to TPU7x, by a JobSet.
#
#   launch/gke.sh COMMAND [FLAGS] -- --config=FILE --workdir=gs://BUCKET/FOLDER
#
# create   make a node pool that is the slice, unless it exists (not on Autopilot)
# run      fill in launch/k8s/tpu_jobset.yaml, apply it, and follow the log of host 0 until the
#          JobSet ends: it restarts its pods by itself after a preemption
# logs     follow the log again
# status   show the JobSet and its pods
# stop     delete the JobSet: the run saves and exits; the same run command resumes it
# delete   stop, and delete the node pool; until then it costs money
#
# Flags, each with the environment variable that can replace it:
#   --name=NAME             TPU_NAME         of JobSet, node pool and policy (default: keyfold)
#   --project=PROJECT       PROJECT_ID
#   --cluster=NAME          CLUSTER          create, delete: the cluster
#   --location=PLACE        LOCATION         create, delete: the cluster's region or zone
#   --zone=ZONE             ZONE             create, delete: where the chips are
#   --topology=CHIPS        TOPOLOGY         of the slice, such as 2x2x2: two hosts with four chips
#   --machine-type=TYPE     MACHINE_TYPE     (default: tpu7x-standard-4t)
#   --spot                  SPOT=1           create: cheaper, but may be preempted at any time
#   --image=IMAGE           IMAGE            run: built from launch/Dockerfile with ACCELERATOR=tpu
#   --service-account=NAME  SERVICE_ACCOUNT  run: one that may write to the bucket (default: default)
#   --queue=NAME            QUEUE            run: the local queue of Kueue that admits the JobSet
#   --dry-run               DRY_RUN=1        print the commands and run none
#                           POLL_SECONDS     seconds between looks at the JobSet (30)
#
# kubectl must be connected to the cluster: gcloud container clusters get-credentials. The flags
# after ` -- ` go to train.py. The exit code is 0 if the run finished, 1 if the JobSet failed, or 2
# for a mistake.

set -euo pipefail
# shellcheck source=launch/slice.sh
source "$(dirname "$0")/slice.sh"

COMMANDS='create run logs status stop delete'
JOBSET=$PROJECT_FOLDER/launch/k8s/tpu_jobset.yaml
cluster=${CLUSTER:-}
location=${LOCATION:-}
image=${IMAGE:-}
account=${SERVICE_ACCOUNT:-default}
queue=${QUEUE:-}
pods=jobset.sigs.k8s.io/jobset-name

pools() {
  act gcloud container node-pools "$@" --cluster="$cluster" --location="$location" \
    --project="$project" --quiet
}

# The hosts of a slice of TPU7x are placed by a workload policy, those of older ones by GKE.
create() {
  local place=()
  if pools list --format='value(name)' | listed; then
    say 'the node pool exists'
    return
  fi
  if [[ $machine == tpu7x-* ]]; then place=(--disk-type=hyperdisk-balanced); fi
  if [[ $machine == tpu7x-* ]] && ((hosts > 1)); then
    place+=(--placement-policy="$name")
    make_policy || return
  elif ((hosts > 1)); then
    place=(--tpu-topology="$topology")
  fi
  pools create "$name" --node-locations="$zone" --machine-type="$machine" --num-nodes="$hosts" \
    --workload-metadata=GKE_METADATA ${place[@]+"${place[@]}"} ${spot:+--spot}
}

# Prints a string as YAML.
yaml() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  printf '"%s"\n' "${text//$'\n'/\\n}"
}

# Prints the JobSet with what the flags say in the lines that a person would change.
filled_in() {
  local line start word beside=${workdir%/}
  while IFS= read -r line; do
    start=${line%%[! ]*}
    case $line in
      *' name: keyfold #'*)
        echo "${start}name: $(yaml "$name")"
        if [[ $queue ]]; then
          printf '%s\n' "${start}labels:" "$start  $QUEUE_LABEL: $(yaml "$queue")"
        fi
        ;;
      *' parallelism: '* | *' completions: '*) echo "${line%%:*}: $hosts" ;;
      *' serviceAccountName: '*) echo "${line%%:*}: $(yaml "$account")" ;;
      */gke-tpu-accelerator:*) echo "${line%:*}: $accelerator" ;;
      */gke-tpu-topology:*) echo "${line%:*}: $topology" ;;
      *' image: '*) echo "${line%%:*}: $(yaml "$image")" ;;
      *' google.com/tpu: '*) echo "${line%%:*}: $chips" ;;
      *' value: gs://BUCKET/'*) echo "${line%%:*}: $(yaml "${beside%/*}/compiled")" ;;
      *' - --config='*) for word in "${train_flags[@]}"; do echo "$start- $(yaml "$word")"; done ;;
      *' - --config.num_shards='* | *' - --workdir='*) ;; # left to the flags
      *) printf '%s\n' "$line" ;;
    esac
  done <"$JOBSET"
}
QUEUE_LABEL=kueue.x-k8s.io/queue-name

run() {
  if [[ $dry_run ]]; then
    printf '%s\n' "kubectl apply --filename=- <<'JOBSET'" "$(filled_in)" JOBSET >&3
  else
    filled_in | kubectl apply --filename=- || return
  fi
  logs
}

# Follows one host 0 after the other.
logs() {
  local end
  while :; do
    act kubectl logs --follow --tail=20 \
      --selector="$pods=$name,batch.kubernetes.io/job-completion-index=0" || true
    end=$(act kubectl get jobset "$name" --output='jsonpath={.status.terminalState}') || return
    case $dry_run$end in
      1 | Completed) return ;;
      Failed) say "the JobSet failed: see above, and $0 status; run it again after $0 stop" && return 1 ;;
    esac
    sleep "$poll"
  done
}

status() {
  act kubectl get jobset "$name"
  act kubectl get pods --selector="$pods=$name" --output=wide
}

stop() {
  act kubectl delete jobset "$name" --ignore-not-found --cascade=foreground
}

delete() {
  stop || return
  if [[ $dry_run ]] || pools list --format='value(name)' | listed; then
    pools delete "$name" || return
  fi
  delete_policy
}

own_flag() {
  case $1 in
    --cluster=*) cluster=${1#*=} ;;
    --location=*) location=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --machine-type=*) machine=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --service-account=*) account=${1#*=} ;;
    --queue=*) queue=${1#*=} ;;
    *) return 1 ;;
  esac
}

check_own() {
  if [[ $1 == create || $1 == run ]]; then
    count_hosts
    case $machine in
      tpu7x-*) accelerator=tpu7x ;;
      ct6e-*) accelerator=tpu-v6e-slice ;;
      ct5p-*) accelerator=tpu-v5p-slice ;;
      ct5lp-*) accelerator=tpu-v5-lite-podslice ;;
      ct4p-*) accelerator=tpu-v4-podslice ;;
      *) refuse "--machine-type=$machine: expected tpu7x-, ct6e-, ct5p-, ct5lp- or ct4p-..." ;;
    esac
  fi
  if [[ $1 == create || $1 == delete ]]; then
    [[ $cluster ]] || refuse '--cluster=NAME, or CLUSTER, is missing'
    [[ $location ]] || refuse '--location=PLACE, or LOCATION, is missing'
    [[ $zone ]] || refuse '--zone=ZONE, or ZONE, is missing'
  fi
  if [[ $1 == run ]]; then [[ $image ]] || refuse '--image=IMAGE, or IMAGE, is missing'; fi
  if [[ ! $dry_run ]]; then
    command -v kubectl >/dev/null || refuse 'kubectl is not on PATH: install it'
  fi
}

main "$@"
