#!/usr/bin/env bash
# Trains this checkout on a TPU slice of Google Cloud, v4 to v6e, through preemptions.
#
#   launch/tpu_vm.sh COMMAND [FLAGS] -- --config=FILE --workdir=gs://BUCKET/FOLDER
#
# This is the Cloud TPU API, which Google only maintains. TPU7x needs launch/tpu_mig.sh or
# launch/gke.sh, which have v5p and v6e too.
#
# create   request the slice and wait until it is ready
# setup    copy the files that git tracks, as they are now, to all workers; run make setup there
# run      start train.py on all workers unless it is running, and follow its log
# resume   create and setup if necessary, then run: the first time and after a preemption
# watch    resume until the run is finished; after crashes on an intact slice, three times
# logs     follow the log of the run on worker 0
# status   show the state of the slice, and of the run on each worker
# stop     ask the run to save and exit, which it does with exit code 75
# delete   delete the slice; until then it costs money
#
# Flags, each with the environment variable that can replace it:
#   --name=NAME              TPU_NAME          name of the slice (default: keyfold)
#   --project=PROJECT        PROJECT_ID
#   --zone=ZONE              ZONE
#   --accelerator-type=TYPE  ACCELERATOR_TYPE  create: such as v5litepod-16
#   --runtime-version=NAME   RUNTIME_VERSION   create: such as v2-alpha-tpuv5-lite
#   --spot                   SPOT=1            create: cheaper, but may be preempted at any time
#   --queued                 QUEUED=1          use a queued resource, which waits for capacity
#   --dry-run                DRY_RUN=1         print the commands and run none
#                            POLL_SECONDS      seconds between checks of the slice (30)
#
# The flags after ` -- ` go to train.py. The run needs no connection: Ctrl-C only ends following its
# log. The exit code is that of train.py on worker 0, or of gcloud, or 2 for a mistake.

set -euo pipefail
# shellcheck source=launch/slice.sh
source "$(dirname "$0")/slice.sh"

COMMANDS='create setup run resume watch logs status stop delete'
FOLLOWED=0 # the worker whose log is followed
accelerator=${ACCELERATOR_TYPE:-}
runtime=${RUNTIME_VERSION:-}
queued=${QUEUED:-}

# tpus GROUP VERB WORDS...: runs gcloud on this slice, or on this project's slices.
tpus() {
  act gcloud compute tpus "$@" --project="$project" --zone="$zone" --quiet
}

on_workers() {
  tpus tpu-vm ssh "$name" --worker="$1" "${ALIVE[@]/#/--ssh-flag=}" --command="$2"
}

copy_to_workers() {
  tpus tpu-vm scp "$1" "$name:$2" --worker=all "${ALIVE[@]/#/--scp-flag=}"
}

# Prints the state of the slice, or else of the request for it; nothing if there is neither.
state() {
  local kind now=
  for kind in tpu-vm:state ${queued:+queued-resources:state.state}; do
    now=$(tpus "${kind%:*}" list --format="value(name.basename(),${kind#*:})" |
      awk -v name="$name" '$1 == name { print $2 }') || return
    if [[ $now ]]; then break; fi
  done
  echo "$now"
}

ask_for_slice() {
  local kind=(tpu-vm create "$name" --version="$runtime")
  if [[ $queued ]]; then
    kind=(queued-resources create "$name" --node-id="$name" --runtime-version="$runtime")
  fi
  tpus "${kind[@]}" --accelerator-type="$accelerator" ${spot:+--spot}
}

delete_slice() {
  if [[ $queued ]]; then
    tpus queued-resources delete "$name" --force
  else
    tpus tpu-vm delete "$name"
  fi
}

own_flag() {
  case $1 in
    --accelerator-type=*) accelerator=${1#*=} ;;
    --runtime-version=*) runtime=${1#*=} ;;
    --queued) queued=1 ;;
    *) return 1 ;;
  esac
}

check_own() {
  [[ $queued =~ ^1?$ ]] || refuse "QUEUED=$queued: expected 1 or nothing"
  [[ $zone ]] || refuse '--zone=ZONE, or ZONE, is missing'
  case $1 in
    create | resume | watch)
      [[ $accelerator ]] || refuse '--accelerator-type=TYPE, or ACCELERATOR_TYPE, is missing'
      [[ $accelerator != tpu7x* ]] ||
        refuse "--accelerator-type=$accelerator: this API ends at v6e; use launch/tpu_mig.sh"
      [[ $runtime ]] || refuse '--runtime-version=NAME, or RUNTIME_VERSION, is missing'
      ;;
  esac
}

main "$@"
