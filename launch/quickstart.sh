#!/usr/bin/env bash
# From an empty clone to a scored adapter:   bash launch/quickstart.sh [RUN_DIR]          default: runs/quickstart
#
# Sets up Python packages, composes the demo speech, builds a tiny Voxtral, packs shards, trains ASR, SQA and TQA
# together on DeepSpeed ZeRO-2 (2 ranks without a GPU), decodes before and after, and checks that the audio is heard.
# Call it again with the same RUN_DIR: it goes on where it was, or says that the run is finished. SEED=1 changes the seed.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
run="$(realpath -m "${1:-$here/../runs/quickstart}")"
seed="${SEED:-0}"
started=$SECONDS
say() { printf '\n== %s (%d s)\n' "$*" $((SECONDS - started)); }

say "1/6 Python packages"
. "$here/setup.sh" run
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
gpus="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
if [ "$gpus" -eq 0 ]; then export DS_ACCELERATOR=cpu TORCHDYNAMO_DISABLE=1; fi # nothing here is compiled
ranks="${NPROC:-$((gpus > 0 ? gpus : 2))}"

say "2/6 demo speech and a tiny Voxtral in $run"
mkdir -p "$run"
"$PYTHON" "$here/../tools/compose_demo.py" "$run/demo"
"$PYTHON" "$here/../tools/build_tiny_voxtral.py" "$run/base_model"

say "3/6 shards"
for split in train dev; do
    "$PYTHON" "$here/../tools/build_shards.py" --out "$run/shards" --split "$split" --model_id "$run/base_model" \
        --jsonl "$run/demo/asr.$split.jsonl,$run/demo/sqa.$split.jsonl,$run/demo/tqa.$split.jsonl"
done
"$PYTHON" "$here/../tools/build_shards.py" --out "$run/shards" --split unseen_voice --model_id "$run/base_model" \
    --jsonl "$run/demo/asr.unseen_voice.jsonl"
shards() { echo "$run/shards/asr/$1,$run/shards/sqa/$1,$run/shards/tqa/$1"; }

say "4/6 training on $ranks rank(s)"
common=(--model_id "$run/base_model" --per_device_bsz 34 --max_len 128 --num_workers 1)
NPROC="$ranks" bash "$here/train.sh" "${common[@]}" --output_dir "$run" --seed "$seed" \
    --train_shards "$(shards train)" --val_shards "$(shards dev)" \
    --global_batch_size 68 --max_steps 500 --task_weights asr=20,sqa=18,tqa=30 --learning_rate 3e-3 --warmup_ratio 0.06 \
    --lora_r 32 --lora_alpha 64 --lora_dropout 0 --eval_max_new_tokens 16 --eval_steps 250

say "5/6 is the audio heard? the same dev rows with the audio of other rows"
NPROC="$ranks" bash "$here/evaluate.sh" "${common[@]}" --lora_dir "$run" --output_dir "$run/evaluations/audio_probe" \
    --val_shards "$(shards dev)" --gen_max_new_tokens 16 --audio_probe

say "6/6 a voice that training never heard"
NPROC="$ranks" bash "$here/evaluate.sh" "${common[@]}" --lora_dir "$run" --output_dir "$run/evaluations/unseen_voice" \
    --val_shards "$run/shards/asr/unseen_voice" --gen_max_new_tokens 16

say "done"
"$PYTHON" -m voxtral_dist.report "$run/eval"
"$PYTHON" "$here/../tools/report_run.py" "$run" # again, with the two evaluations
cat <<END

Look at (all below $run):
  report.html                     all of the below on one page, for a browser
  metrics.jsonl                   every step: loss per task, learning rate, gradient norm, speed
  tensorboard/                    the same as curves: $PYTHON -m tensorboard.main --logdir $run/tensorboard
  eval/step-*/predictions.jsonl   reference beside prediction, before and after training
  eval/step-*/metrics.json        all scores
  checkpoints/ best latest        adapters (peft format) with their optimizer state
  evaluations/                    the audio probe and the unseen voice
END
