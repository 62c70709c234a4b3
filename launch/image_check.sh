#!/usr/bin/env bash
# Builds launch/Dockerfile for both stacks, kills a run in each image and resumes it: make image-check
#
# Needs docker or podman. The images keyfold-check:3.11 and :3.13 stay, as does pip's cache.

set -euo pipefail
cd "$(dirname "$0")/.."

engine=
for candidate in docker podman; do
  if "$candidate" info >/dev/null 2>&1; then engine=$candidate && break; fi
done
if [[ ! $engine ]]; then
  echo 'error: no container engine answers: expected docker info or podman info to succeed;' \
    'start one, or run this where one is' >&2
  exit 2
fi

for python in 3.11 3.13; do
  image=keyfold-check:$python
  volume=keyfold-check-$python
  "$engine" build --file launch/Dockerfile --build-arg PYTHON="$python" --tag "$image" .
  inside=("$engine" run --rm --volume "$volume:/runs" --entrypoint bash "$image" -c)
  train='.venv/bin/python train.py --config=configs/reviews.py --workdir=/runs/check
    --config.num_steps=40 --config.checkpoint_every=10 --config.eval_every=40'
  "${inside[@]}" "[[ \$(id -u) == 1000 && \$(.venv/bin/python -V) == 'Python $python'* ]]"
  "${inside[@]}" "$train & until [[ -e /runs/check/checkpoints/10 ]]; do
    kill -0 \$! || exit 1; sleep 0.1; done; kill -9 \$!"
  output=$("${inside[@]}" "$train" | tee /dev/stderr)
  [[ $output == *'resumed after step '[1-9]* ]]
  "$engine" volume rm "$volume" >/dev/null
  echo "$image: built, trained, killed and resumed"
done
