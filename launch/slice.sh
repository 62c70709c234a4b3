# shellcheck shell=bash
# What the launchers of TPU slices share; each sources this file, and none of it runs by itself.
#
# A launcher sets COMMANDS and FOLLOWED, and defines own_flag, check_own, state, ask_for_slice,
# delete_slice, on_workers (runs a command on workers) and copy_to_workers.
# shellcheck disable=SC2034 # the launchers use the variables

PROJECT_FOLDER=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
FINAL=' 0 2 3 4 5 ' # exit codes of train.py after which a restart would not help
ASKED_TO_STOP=75
ALIVE=(-oServerAliveInterval=20 -oConnectTimeout=20)
RESTARTS=3

name=${TPU_NAME:-keyfold}
project=${PROJECT_ID:-}
zone=${ZONE:-}
topology=${TOPOLOGY:-}
machine=${MACHINE_TYPE:-tpu7x-standard-4t}
spot=${SPOT:-}
dry_run=${DRY_RUN:-}
poll=${POLL_SECONDS:-30}
train_flags=()
workdir= # among them

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

compute() {
  act gcloud compute "$@" --project="$project" --quiet
}

# Returns whether our name is a line of standard input.
listed() {
  grep -xF "$name" >/dev/null
}

# exists PLACE KIND...: returns whether there is a resource with our name. Never in a dry run.
exists() {
  local place=$1
  shift
  compute "$@" list ${place:+"$place"} --format='value(name)' | listed
}

# Makes the policy by which machines are placed together as a slice, unless it exists.
make_policy() {
  local region=${zone%-*}
  exists --regions="$region" resource-policies ||
    compute resource-policies create workload-policy "$name" --region="$region" \
      --type=HIGH_THROUGHPUT --accelerator-topology="$topology"
}

delete_policy() {
  local region=${zone%-*}
  if [[ $dry_run ]] || exists --regions="$region" resource-policies; then
    compute resource-policies delete "$name" --region="$region"
  fi
}

# on WORKERS WORDS...: calls launch/tpu_worker.sh on worker 0 or on all. A connection to a preempted
# slice ends after a minute, or where gcloud retries it, after some five.
on() {
  local workers=$1
  shift
  on_workers "$workers" "$(quote bash keyfold/launch/tpu_worker.sh "$@")"
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
  unpack+=' -exec rm -rf {} + && tar -xzf keyfold.tar.gz -C keyfold || exit 1'
  copy_to_workers "$archive" keyfold.tar.gz || return
  on_workers all "$unpack" || return
  on all setup
}

# Sets `running` if the run goes on on all workers. They have no copy of the project at first, and
# one that cannot be reached says nothing: what may still run is not set up again.
look() {
  local found probe='bash keyfold/launch/tpu_worker.sh running 2>/dev/null'
  running=
  if [[ $dry_run ]]; then return; fi
  found=$(on_workers all "$probe && echo running || echo idle") || return
  if [[ $found == *running* && $found != *idle* ]]; then running=1; fi
}

run() {
  look || return
  start_and_follow
}

start_and_follow() {
  [[ $running ]] || on all start "${train_flags[@]}" || return
  logs
}

resume() {
  create || return
  look || return
  [[ $running ]] || setup || return
  start_and_follow
}

# A run that is found running has not crashed: the connection to it was lost.
watch() {
  local code crashes=0
  trap 'exit 130' INT # gcloud may survive Ctrl-C, and then bash would go on
  while :; do
    code=0
    resume || code=$?
    if [[ $dry_run || $FINAL == *" $code "* ]]; then return "$code"; fi
    if [[ $running ]]; then crashes=0; fi
    say "exit code $code; checking again in $poll s (Ctrl-C to leave it)"
    sleep "$poll"
    if ((code != ASKED_TO_STOP)) && [[ $(state) == READY ]] && ((++crashes > RESTARTS)); then
      return "$code"
    fi
  done
}

logs() {
  on "$FOLLOWED" follow
}

status() {
  local now
  now=$(state) || return
  [[ $dry_run ]] || echo "$name: ${now:-missing}"
  on all status
}

stop() {
  on all stop
}

delete() {
  delete_slice
}

# The workdir of a run must outlive the slice, and all hosts of a pod must share it.
check_train_flags() {
  local word given=''
  for word in ${train_flags[@]+"${train_flags[@]}"}; do
    case $word in
      --workdir=*) workdir=${word#*=} ;;
      --config=*) given=1 ;;
    esac
  done
  [[ $given ]] || refuse "--config=FILE is missing; the flags of train.py come after ' -- '"
  case $workdir in
    gs://?*/?*) ;;
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

# Sets `chips` of the machine, and `hosts`, the machines of the topology: 2x2x2 on tpu7x-standard-4t
# has two.
count_hosts() {
  local all_chips
  [[ $topology ]] || refuse '--topology=CHIPS, or TOPOLOGY, is missing'
  [[ $machine =~ -[1248]t$ ]] ||
    refuse "--machine-type=$machine: expected one that ends in its chips, such as tpu7x-standard-4t"
  [[ $topology =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] ||
    refuse "--topology=$topology: expected the chips of the slice, such as 2x2x2"
  chips=${machine##*-}
  chips=${chips%t}
  all_chips=$((10#${topology//x/ * 10#}))
  hosts=$((all_chips / chips))
  ((hosts > 0)) || refuse "--topology=$topology: fewer chips than one $machine has"
  ((all_chips % chips == 0)) ||
    refuse "--topology=$topology: expected a multiple of the $chips chips of one $machine"
}

# check COMMAND: reports mistakes before anything is done.
check() {
  [[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    refuse "--name=$name: expected up to 40 lower-case letters, digits and hyphens, a letter first"
  [[ "$spot$dry_run" =~ ^1*$ ]] ||
    refuse "SPOT=$spot, DRY_RUN=$dry_run: expected 1 or nothing"
  [[ $poll =~ ^[0-9]+$ ]] || refuse "POLL_SECONDS=$poll: expected a whole number"
  [[ $project ]] || refuse '--project=PROJECT, or PROJECT_ID, is missing'
  check_own "$1"
  case $1 in run | resume | watch) check_train_flags ;; esac
  if [[ ! $dry_run ]]; then check_gcloud; fi
}

read_flags() {
  while (($#)); do
    case $1 in
      --name=*) name=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --zone=*) zone=${1#*=} ;;
      --spot) spot=1 ;;
      --dry-run) dry_run=1 ;;
      --)
        shift
        train_flags=("$@")
        return
        ;;
      *) own_flag "$1" ||
        refuse "$1: no such --FLAG=VALUE (see --help); the flags of train.py come after ' -- '" ;;
    esac
    shift
  done
}

main() {
  local command=${1:---help}
  if [[ $command == -h || $command == --help ]]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit
  fi
  [[ " $COMMANDS " == *" $command "* ]] || refuse "$command: no such command (see --help)"
  shift
  read_flags "$@"
  check "$command"
  exec 3>&1
  case $command in setup | resume | watch) pack ;; esac
  "$command"
}
