#!/usr/bin/env bash
# Runs on each worker of a slice, in its copy of the project; launch/tpu_vm.sh and launch/tpu_mig.sh
# call it.

set -euo pipefail
cd "$(dirname "$0")/.."

RUN=../keyfold-run # log, process and exit code; outside the copy, which a set-up replaces
STOP_SECONDS=60    # for train.py to save; its own limit is --stop_timeout

usable() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Prints the first Python that can set up the project. Older TPU VM images have none: install one.
python_for_setup() {
  local python
  for python in python3 python3.13 python3.12 python3.11; do
    if usable "$python"; then
      printf '%s\n' "$python"
      return
    fi
  done
  {
    sudo add-apt-repository --yes ppa:deadsnakes/ppa
    sudo apt-get -o DPkg::Lock::Timeout=300 install --yes python3.12-venv
  } >&2
  printf '%s\n' python3.12
}

setup() {
  command -v make >/dev/null || sudo apt-get -o DPkg::Lock::Timeout=300 install --yes make
  local python
  python=$(python_for_setup)
  make setup ACCELERATOR=tpu PYTHON="$python" || exit 1 # its 2 would be bad input, and final
}

# The run has its own session, so that it outlives the connection: a shell that notes the exit code,
# and train.py. Signals go to both.
signal_run() {
  kill "-$1" -- "-$(cat "$RUN/pid" 2>/dev/null)" 2>/dev/null
}

running() {
  signal_run 0
}

start() {
  stop
  mkdir -p "$RUN"
  rm -f "$RUN/exit"
  # shellcheck disable=SC2016 # the new shell expands it
  PYTHONUNBUFFERED=1 setsid bash -c \
    'trap : TERM; .venv/bin/python train.py "$@"; echo $? >"$0/exit"' "$RUN" "$@" \
    </dev/null >>"$RUN/log" 2>&1 &
  echo $! >"$RUN/pid"
}

# Sends SIGTERM, and SIGKILL if that takes too long.
stop() {
  local second
  signal_run TERM || return 0
  for ((second = 0; second < STOP_SECONDS; second++)); do
    running || return 0
    sleep 1
  done
  signal_run KILL || true
}

exit_code() {
  cat "$RUN/exit" 2>/dev/null || echo 137 # no exit code noted: killed
}

follow() {
  [[ -e $RUN/pid ]] || { echo 'no run was started on this worker' >&2 && exit 1; }
  tail -n 20 -F -s 0.2 --pid="$(cat "$RUN/pid")" "$RUN/log"
  exit "$(exit_code)"
}

status() {
  local state='no run was started'
  if running; then
    state=running
  elif [[ -e $RUN/pid ]]; then
    state="ended with exit code $(exit_code)"
  fi
  echo "$(hostname): $state; $(tail -n 1 "$RUN/log" 2>/dev/null)"
}

"$@"
