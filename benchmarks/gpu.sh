#!/usr/bin/env bash
# A whole visit to a machine with a GPU: environment, measurements, GPU tests; at most 12 minutes.
#
#   benchmarks/gpu.sh OUT        writes OUT/report.md, and the full output of each part below OUT
#
# The machine needs torch, torchvision and the packages of tests/minimal.py; WHEELS=FOLDER installs missing ones from a
# folder of wheels. Each part has a time limit and may fail without ending the visit. PARTS chooses some of: environment
# step tests train upscale validation checkpoint stages. Where a single command may take less than 12 minutes, call the
# script twice. PHOTOS=FOLDER, made by models/photos.py, adds the last part: both stages compared with BasicSR's, at most
# 4 minutes more. DEVICE=cpu TINY=1 tries it on a machine without a GPU.
set -u
cd "$(dirname "$0")/.." || exit 1
out=${1:?usage: benchmarks/gpu.sh OUT}
mkdir -p "$out" && out=$(cd "$out" && pwd)
all="environment step tests train upscale validation checkpoint"
parts=${PARTS:-$all ${PHOTOS:+stages}}
for part in $parts; do
  if [[ " $all stages " != *" $part "* ]]; then
    echo "PARTS: unknown part $part" >&2
    exit 2
  fi
done
[[ " $parts " != *" stages "* || -d ${PHOTOS:-} ]] || { echo "PHOTOS: the part stages needs a folder" >&2; exit 2; }
device=${DEVICE:-cuda}
tiny=${TINY:+--tiny}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=0

# part NAME SECONDS COMMAND...: runs it if it is chosen, and appends the end of its output to the report.
part() {
  local name=$1 limit=$2 began=$SECONDS code
  shift 2
  [[ " $parts " == *" $name "* ]] || return 0
  if [[ $2 == *.py && ! -f $2 ]]; then
    printf '\n## %s\nskipped: %s does not exist\n' "$name" "$2" | tee -a "$out/report.md"
    return 0
  fi
  echo "== $name (at most $limit s): $*"
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.txt" 2>&1
  code=$?
  tail -n 40 "$out/$name.txt"
  [[ $code == 0 ]] || failed=1
  {
    printf '\n## %s\n`%s`: exit code %s' "$name" "$*" "$code"
    [[ $code == 124 || $code == 137 ]] && printf ' (time limit)'
    printf ', %s s\n```\n' "$((SECONDS - began))"
    tail -n 120 "$out/$name.txt"
    printf '```\n'
  } >>"$out/report.md"
}

if [[ -n ${WHEELS:-} ]]; then
  "$python" -m pip install --quiet --no-index --find-links "$WHEELS" pydantic pydantic-settings safetensors pyyaml \
    >"$out/wheels.txt" 2>&1 || tail -n 5 "$out/wheels.txt"
fi
printf '# GPU visit of %s\n' "$(date -u +%FT%TZ)" >"$out/report.md"

part environment 40 "$python" benchmarks/gpu_environment.py --device "$device"
# The host decides how long BasicSR's sequence takes, 2 minutes at most so far.
part step 180 "$python" benchmarks/gpu_step.py --device "$device" ${tiny:+"$tiny"} --out "$out"
mark=gpu
[[ $device == cpu ]] && mark="not gpu and not slow"
"$python" -m pytest -o addopts= --help 2>/dev/null | grep -q numprocesses && processes="-n 6 --dist loadfile"
# Without the project's options, which are an error where pytest-timeout is not installed.
part tests 180 "$python" -m pytest -o addopts=-ra tests/test_gpu_*.py tests/test_model_trunk_kernels.py \
  tests/test_tracking_system.py tests/test_training_discriminate.py -m "$mark" -q -p no:cacheprovider \
  ${processes:-} --junitxml="$out/tests.xml"
part train 130 "$python" benchmarks/gpu_train.py --device "$device" ${tiny:+"$tiny"} --out "$out"
part upscale 70 "$python" benchmarks/upscale.py --device "$device" --precision bf16 ${tiny:+"$tiny" --images 4 --rounds 1}
part validation 40 "$python" benchmarks/validation.py --device "$device" ${tiny:+--size 64 80}
part checkpoint 60 "$python" benchmarks/checkpoint.py --device "$device" --batch 16 ${tiny:+--batch 1 --blocks 1 --rounds 2}
sizes="--psnr.steps 2000 --gan.steps 400"
[[ -n $tiny ]] && sizes='--use_gpu false --model.num_block 1 --model.num_feat 8 --model.num_grow_ch 4
  --model.discriminator_num_feat 4 --batch_size 2 --psnr.steps 4 --psnr.schedule.warmup_steps 1 --gan.steps 2
  --perceptual.weights random --perceptual.layers {"conv1_2":1} --validation.metrics [psnr_y] --gan.select_by psnr_y'
part stages 240 "$python" benchmarks/both_stages.py --out "$out/stages" --config configs/photos_x4.yaml \
  --data.source "${PHOTOS:-}/train" --data.held_out "${PHOTOS:-}/held_out" --data.root "$out/stages/data" $sizes

echo "== report: $out/report.md ($SECONDS s)"
exit $failed
