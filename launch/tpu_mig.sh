#!/usr/bin/env bash
# Trains this checkout on a TPU slice of Compute Engine, v5p to TPU7x, through preemptions.
#
#   launch/tpu_mig.sh COMMAND [FLAGS] -- --config=FILE --workdir=gs://BUCKET/FOLDER
#
# A slice is a managed instance group (MIG) whose machines are made all together, as a workload
# policy with the slice's topology says.
#
# create   request the slice and wait until it is ready
# setup    copy the files that git tracks, as they are now, to all workers; run make setup there
# run      start train.py on all workers unless it is running, and follow its log
# resume   create and setup if necessary, then run: the first time and after a preemption
# watch    resume until the run is finished; after crashes on an intact slice, three times
# logs     follow the logs of the run on all workers
# status   show the state of the slice, and of the run on each worker
# stop     ask the run to save and exit, which it does with exit code 75
# delete   delete group, template and policy; until then the slice costs money
#
# Flags, each with the environment variable that can replace it:
#   --name=NAME          TPU_NAME      of group, template and policy (default: keyfold)
#   --project=PROJECT    PROJECT_ID
#   --zone=ZONE          ZONE
#   --topology=CHIPS     TOPOLOGY      of the slice, such as 2x2x2: two machines with four chips
#   --machine-type=TYPE  MACHINE_TYPE  (default: tpu7x-standard-4t)
#   --image-family=NAME  IMAGE_FAMILY  of ubuntu-os-accelerator-images (default: the one for TPU7x)
#   --spot               SPOT=1        create: cheaper, but may be preempted at any time
#   --template-flag=F                  create: a flag more for gcloud compute instance-templates
#                                      create, such as --reservation=NAME; may be repeated
#   --dry-run            DRY_RUN=1     print the commands and run none
#                        POLL_SECONDS  seconds between checks of the slice (30)
#
# The flags after ` -- ` go to train.py. The run needs no connection: Ctrl-C only ends following its
# log. The exit code is the highest of train.py on any worker, or of gcloud, or 2 for a mistake.

set -euo pipefail
# shellcheck source=launch/slice.sh
source "$(dirname "$0")/slice.sh"

COMMANDS='create setup run resume watch logs status stop delete'
FOLLOWED=all # the group does not say which of its machines is worker 0
family=${IMAGE_FAMILY:-ubuntu-accel-2404-amd64-tpu-tpu7x}
template_flags=()

in_zone() {
  compute "$@" --zone="$zone"
}

# Prints a line for each machine of the slice: its name and state.
machines() {
  in_zone instance-groups managed list-instances "$name" --format='value(name,instanceStatus)'
  if [[ $dry_run ]]; then echo "$name-MACHINE"; fi
}

# on_each WORDS...: runs gcloud for all machines at once, with their names for INSTANCE. Returns the
# highest exit code, but before all others one from 2 to 5, after which a restart would not help.
on_each() {
  local instance rest now code=0 found pids=()
  found=$(machines) && [[ $found ]] || return 1
  trap 'trap "" TERM && kill 0 && exit 130' INT # what runs in the background does not hear Ctrl-C
  while read -r instance rest; do
    in_zone "${@//INSTANCE/$instance}" &
    pids+=($!)
  done <<<"$found"
  for instance in "${pids[@]}"; do
    now=0
    wait "$instance" || now=$?
    if ((code < 2 || code > 5)) && ((now > code || (now >= 2 && now <= 5))); then code=$now; fi
  done
  return "$code"
}

on_workers() {
  on_each ssh INSTANCE "${ALIVE[@]/#/--ssh-flag=}" --command="$2"
}

copy_to_workers() {
  on_each scp "$1" "INSTANCE:$2" "${ALIVE[@]/#/--scp-flag=}"
}

# Prints READY if all machines run, and nothing without a group. Lost machines that are not Spot are
# restarted by Compute Engine, all of a slice together.
state() {
  local found
  if ! exists --zones="$zone" instance-groups managed; then return; fi
  found=$(machines) || return
  awk -v hosts="$hosts" -v lost="${spot:+PREEMPTED}" '
    $2 ~ /^(STOPPING|STOPPED|TERMINATED|SUSPENDING|SUSPENDED)$/ { down = 1 }
    $2 == "RUNNING" { running++ }
    END { print down && lost ? lost : running == hosts ? "READY" : "WAITING" }' <<<"$found"
}

# A slice of one machine has no links between machines, and so no policy.
ask_for_slice() {
  local policy=''
  if ((hosts > 1)); then
    policy=projects/$project/regions/${zone%-*}/resourcePolicies/$name
    make_policy || return
  fi
  exists '' instance-templates || compute instance-templates create "$name" \
    --machine-type="$machine" --image-project=ubuntu-os-accelerator-images \
    --image-family="$family" --boot-disk-type=hyperdisk-balanced --boot-disk-size=100GB \
    --maintenance-policy=TERMINATE --scopes=cloud-platform \
    ${spot:+--provisioning-model=SPOT --instance-termination-action=STOP} \
    ${template_flags[@]+"${template_flags[@]}"} || return
  in_zone instance-groups managed create "$name" --template="$name" --size="$hosts" \
    --default-action-on-vm-failure=do-nothing \
    ${policy:+--target-size-policy-mode=bulk --workload-policy="$policy"}
}

delete_slice() {
  in_zone instance-groups managed delete "$name"
}

delete() {
  if [[ $dry_run ]] || exists --zones="$zone" instance-groups managed; then
    delete_slice || return
  fi
  if [[ $dry_run ]] || exists '' instance-templates; then
    compute instance-templates delete "$name" || return
  fi
  delete_policy
}

own_flag() {
  case $1 in
    --topology=*) topology=${1#*=} ;;
    --machine-type=*) machine=${1#*=} ;;
    --image-family=*) family=${1#*=} ;;
    --template-flag=*) template_flags+=("${1#*=}") ;;
    *) return 1 ;;
  esac
}

check_own() {
  [[ $zone ]] || refuse '--zone=ZONE, or ZONE, is missing'
  case $1 in
    create | resume | watch | status) count_hosts ;;
  esac
}

main "$@"
