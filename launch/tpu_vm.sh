#!/usr/bin/env bash
# Trains this checkout on a TPU slice of Google Cloud, through preemptions.
#
#   launch/tpu_vm.sh COMMAND [FLAGS] -- --config=configs/reviews.py --workdir=gs://BUCKET/reviews
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

PROJECT_FOLDER=$(cd "$(dirname "$0")/.." && pwd)
FINAL=' 0 2 3 4 5 ' # exit codes of train.py after which a restart would not help
ASKED_TO_STOP=75
ALIVE=(-oServerAliveInterval=20 -oConnectTimeout=20)
RESTARTS=3

name=${TPU_NAME:-keyfold}
project=${PROJECT_ID:-}
zone=${ZONE:-}
accelerator=${ACCELERATOR_TYPE:-}
runtime=${RUNTIME_VERSION:-}
spot=${SPOT:-}
queued=${QUEUED:-}
dry_run=${DRY_RUN:-}
poll=${POLL_SECONDS:-30}
train_flags=()

refuse() {
  echo "error: $*" >&2
  exit 2
}

say() {
  echo "$name: $*" >&2
}

# Prints words quoted for any POSIX shell.
quote() {
  local word space=
  for word; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,-]*)
        word=\'$(printf '%s.' "$word" | sed "s/'/'\\\\''/g")
        word=${word%.}\'
        ;;
    esac
    printf '%s' "$space$word"
    space=' '
  done
  echo
}

# Runs a command, or prints it in a dry run.
act() {
  if [[ $dry_run ]]; then
    quote "$@" >&3
  else
    "$@" </dev/null
  fi
}

# tpus GROUP VERB WORDS...: runs gcloud on this slice, or on this project's slices.
tpus() {
  act gcloud compute tpus "$@" --project="$project" --zone="$zone" --quiet
}

# on WORKERS WORDS...: calls launch/tpu_worker.sh on worker 0 or on all. A connection to a preempted
# slice ends after a minute.
on() {
  local workers=$1
  shift
  tpus tpu-vm ssh "$name" --worker="$workers" "${ALIVE[@]/#/--ssh-flag=}" \
    --command="$(quote bash keyfold/launch/tpu_worker.sh "$@")"
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

# Brings the slice from any state to READY. A preempted slice can only be replaced.
create() {
  local now
  while :; do
    now=$(state) || return
    say "the slice is ${now:-missing}"
    case $now in
      READY) return ;;
      '') ask_for_slice || return ;;
      PREEMPTED | TERMINATED | STOPPED | SUSPENDED) delete_slice || return ;;
      FAILED) refuse "Google cannot provide this slice; delete it, and create another" ;;
      *) sleep "$poll" ;;
    esac
    if [[ $dry_run ]]; then return; fi
  done
}

# Packs the tracked files as they are now, even if that is not committed.
pack() {
  local tree='' left
  archive=$(git -C "$PROJECT_FOLDER" rev-parse --absolute-git-dir 2>/dev/null) ||
    refuse "$PROJECT_FOLDER is not a git checkout, and only files that git tracks are copied"
  archive=$archive/$name.tar.gz
  [[ $dry_run ]] || tree=$(git -C "$PROJECT_FOLDER" -c user.name=- -c user.email=- stash create)
  left=$(git -C "$PROJECT_FOLDER" ls-files --others --exclude-standard | head -n 3 | tr '\n' ' ')
  if [[ $left ]]; then say "not copied, since git does not track them: $left ..."; fi
  act git -C "$PROJECT_FOLDER" archive --format=tar.gz --output="$archive" "${tree:-HEAD}"
}

setup() {
  local unpack='mkdir -p keyfold && find keyfold -mindepth 1 -maxdepth 1 ! -name .venv'
  unpack+=' -exec rm -rf {} + && tar -xzf keyfold.tar.gz -C keyfold'
  tpus tpu-vm scp "$archive" "$name:keyfold.tar.gz" --worker=all "${ALIVE[@]/#/--scp-flag=}" ||
    return
  tpus tpu-vm ssh "$name" --worker=all "${ALIVE[@]/#/--ssh-flag=}" --command="$unpack" || return
  on all setup
}

running() {
  [[ ! $dry_run ]] && on all running 2>/dev/null
}

run() {
  running || on all start "${train_flags[@]}" || return
  on 0 follow
}

resume() {
  create || return
  running || setup || return
  run
}

watch() {
  local code crashes=0
  while :; do
    code=0
    resume || code=$?
    if [[ $dry_run || $FINAL == *" $code "* ]]; then return "$code"; fi
    say "exit code $code; checking again in $poll s (Ctrl-C to leave it)"
    sleep "$poll"
    if ((code != ASKED_TO_STOP)) && [[ $(state) == READY ]] && ((++crashes > RESTARTS)); then
      return "$code"
    fi
  done
}

status() {
  local now
  now=$(state) || return
  [[ $dry_run ]] || echo "$name: ${now:-missing}"
  on all status
}

# The workdir of a run must outlive the slice, and all hosts of a pod must share it.
check_train_flags() {
  local word given='' workdir=''
  for word in ${train_flags[@]+"${train_flags[@]}"}; do
    case $word in
      --workdir=*) workdir=${word#*=} ;;
      --config=*) given=1 ;;
    esac
  done
  [[ $given ]] || refuse "--config=FILE is missing; the flags of train.py come after ' -- '"
  case $workdir in
    gs://?*) ;;
    /*) say "warning: all workers must mount the file system of --workdir=$workdir" ;;
    *) refuse "--workdir=$workdir: expected gs://BUCKET/PATH, or an absolute path that all" \
      "workers mount; a slice's own disk is deleted with the slice" ;;
  esac
}

check_gcloud() {
  command -v gcloud >/dev/null || refuse 'gcloud is not on PATH: install the Google Cloud CLI'
  [[ $(gcloud auth list --filter=status:ACTIVE --format='value(account)' 2>/dev/null) ]] ||
    refuse 'gcloud has no credentials: run gcloud auth login'
}

# check COMMAND: reports mistakes before anything is done.
check() {
  [[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    refuse "--name=$name: expected lower-case letters, digits and hyphens"
  [[ "$spot$queued$dry_run" =~ ^1*$ ]] ||
    refuse "SPOT=$spot, QUEUED=$queued, DRY_RUN=$dry_run: expected 1 or nothing"
  [[ $poll =~ ^[0-9]+$ ]] || refuse "POLL_SECONDS=$poll: expected a whole number"
  [[ $project ]] || refuse '--project=PROJECT, or PROJECT_ID, is missing'
  [[ $zone ]] || refuse '--zone=ZONE, or ZONE, is missing'
  if [[ $1 == create || $1 == resume || $1 == watch ]]; then
    [[ $accelerator ]] || refuse '--accelerator-type=TYPE, or ACCELERATOR_TYPE, is missing'
    [[ $runtime ]] || refuse '--runtime-version=NAME, or RUNTIME_VERSION, is missing'
  fi
  case $1 in run | resume | watch) check_train_flags ;; esac
  if [[ ! $dry_run ]]; then check_gcloud; fi
}

read_flags() {
  while (($#)); do
    case $1 in
      --name=*) name=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --zone=*) zone=${1#*=} ;;
      --accelerator-type=*) accelerator=${1#*=} ;;
      --runtime-version=*) runtime=${1#*=} ;;
      --spot) spot=1 ;;
      --queued) queued=1 ;;
      --dry-run) dry_run=1 ;;
      --)
        shift
        train_flags=("$@")
        return
        ;;
      *) refuse "$1: no such --FLAG=VALUE (see --help); the flags of train.py come after ' -- '" ;;
    esac
    shift
  done
}

main() {
  local command=${1:---help}
  case $command in
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
    create | setup | run | resume | watch | logs | status | stop | delete) shift ;;
    *) refuse "$command: no such command (see --help)" ;;
  esac
  read_flags "$@"
  check "$command"
  case $command in setup | resume | watch) pack ;; esac
  case $command in
    logs) on 0 follow ;;
    stop) on all stop ;;
    delete) delete_slice ;;
    *) "$command" ;;
  esac
}

exec 3>&1
main "$@"
