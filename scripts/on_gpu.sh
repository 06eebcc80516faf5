#!/usr/bin/env bash
# Everything worth doing on a borrowed CUDA machine, in order of worth, within a time budget, resumably:
# the tests, then benches, then named runs; records are gathered into one folder. Run it again to go on where it stood.
#
#   scripts/on_gpu.sh [-t MINUTES] [-o FOLDER] [-d DATA] [-p PYTHON] [-g cuda|cpu] [-T] [-- "implicit-bench words" ...]
#
# -g cpu tries the script out without a GPU; -T leaves the tests out.
# Each word group after -- is one command ("bench model=neural_ode,cdeq dataset=cifar10 recipe.batch=128"), gpu=cuda is added.
# A command that has succeeded is not repeated; `train` also resumes inside a run. Needs no network.
set -uo pipefail

minutes=30 out=gpu-results data=data gpu=cuda tests=yes python=${PYTHON:-python3}
usage() { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit "${1:-0}"; }
while getopts "t:o:d:p:g:Th" flag; do
  case $flag in
    t) minutes=$OPTARG ;; o) out=$OPTARG ;; d) data=$OPTARG ;; p) python=$OPTARG ;; g) gpu=$OPTARG ;;
    T) tests=no ;; h) usage ;; *) usage 2 ;;
  esac
done
shift $((OPTIND - 1)); [ "${1:-}" = "--" ] && shift

cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out/done" "$out/logs" || exit 1
[ "$gpu" = cpu ] || "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
  echo "on_gpu: torch sees no CUDA device; run this on a machine with a GPU (-p names its Python)" >&2; exit 1; }
end=$(($(date +%s) + minutes * 60))

step() { # step NAME COMMAND...: run once, within what is left of the budget; its log is kept
  local name=$1; shift
  local left=$((end - $(date +%s)))
  if [ -e "$out/done/$name" ]; then echo "on_gpu: $name is done"; return; fi
  if [ "$left" -lt 20 ]; then echo "on_gpu: no time left for $name; run me again"; return; fi
  echo "on_gpu: $name ($left s left)"
  # SIGINT lets a run save itself; ten seconds later nothing is spared
  if timeout -s INT -k 10 "$left" "$@" >"$out/logs/$name.log" 2>&1; then touch "$out/done/$name"
  else echo "on_gpu: $name ended with $?; see $out/logs/$name.log"; fi
  tail -n 4 "$out/logs/$name.log" | sed 's/^/        /'
}

if [ $# -eq 0 ]; then
  set -- "bench model=neural_ode,cdeq,skip_cdeq,skip_reg_cdeq,deq,explicit rounds=60" \
         "bench model=neural_ode,cdeq,skip_cdeq,explicit dataset=mnist recipe.batch=128 rounds=60" \
         "train model=skip_deq dataset=mnist recipe.epochs=5"
fi

[ "$tests" = no ] || step tests "$python" -m pytest -q
for words in "$@"; do
  name=$(printf %s "$words" | tr -c 'A-Za-z0-9.\n' '_' | cut -c1-100)
  # shellcheck disable=SC2086  # a group is meant to be split into words
  step "$name" "$python" -m implicit_bench $words "gpu=$gpu" logger=none "paths.runs=$out/runs" "paths.data=$data"
done

hardware=$("$python" -c 'import torch
print(torch.cuda.get_device_name(0).replace(" ", "_") if torch.cuda.is_available() else "cpu")')
mkdir -p "$out/results/$hardware"
for record in "$out"/runs/*/record.json; do
  [ -e "$record" ] || continue
  cp "$record" "$out/results/$hardware/$(basename "$(dirname "$record")").record.json"
done
echo "on_gpu: records in $out/results/$hardware; copy that folder into results/ and commit it"
