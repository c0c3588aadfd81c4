#!/usr/bin/env bash
# Trains the built-in models again, from nothing, in the order in which they were trained; weights/tabletop/README.md says
# how long each part took. Pictures that a part learns from are drawn before it, by the models so far. Every part is a run
# folder of its own in runs/: what is finished is skipped, what was interrupted goes on.
#   scripts/retrain.sh [DEVICE]     # cpu, cuda, metal or auto, the default
# It replaces what is in weights/. `REHEARSE=10 scripts/retrain.sh cpu`, in a copy of the repository, goes the same way in miniature,
# two steps for each part and so many prompts for each drawing: it shows that the parts fit together.
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-auto}
rlrig=target/release/rlrig
# Every tenth prompt is held out, and there has to be one.
[ "${REHEARSE:-10}" -ge 10 ] || { echo "REHEARSE=$REHEARSE: give 10 or more prompts" >&2; exit 2; }

train() {
    local run=runs/$1 what=(--config "configs/tabletop/$1.toml" --out "runs/$1")
    # Whether it has a model says nothing: that is written at every checkpoint. A finished run returns at once.
    [ ! -e "$run/config.toml" ] || what=(--resume "$run")
    [ -z "${REHEARSE:-}" ] || what+=(--set train.steps=2)
    "$rlrig" train pretrain --device "$device" "${what[@]}"
}

# NAME and the number of prompts, then the other flags of the evaluation whose pictures are wanted; `wording=plain` before it draws
# plain words.
draw() {
    local run=runs/$1 more=(--limit "${REHEARSE:-$2}")
    shift 2
    [ ! -e "$run/results.json" ] || return 0
    [ ! -d "$run" ] || more+=(--resume)
    # Before version 0.6 nothing guided edits but their words.
    "$rlrig" eval --device "$device" --steps 20 --guidance 3 --image-guidance 1 --wording "${wording:-caption}" \
        --out "$run" "$@" "${more[@]}"
}

# The trainings of the Diffuser read the autoencoder where it is shipped.
autoencoder() {
    cp "runs/$1/model/"* weights/tabletop/vae/
}

# The VLM that the binary carries, without a calibration yet.
vlm() {
    cp "runs/$1/model/"* weights/tabletop/vlm/
    rm -f weights/tabletop/vlm/calibration.json
    cargo build --release
}

cargo build --release
train vae
train vae-coarse
autoencoder vae-coarse
train diffuser
train diffuser-layout
train diffuser-edits
train vlm
draw drawn 240 --split train --mode loop --rounds 3 --accept 0.99 --draws 1 --redraw=false \
    --model runs/diffuser-edits/model --vlm runs/vlm/model
train vlm-drawn
train diffuser-gpu
draw drawn-gpu 1500 --split train --mode loop --subset-seed 11 --rounds 3 --accept 0.99 --draws 1 --redraw=false \
    --model runs/diffuser-gpu/model --vlm runs/vlm-drawn/model
train vlm-gpu
train diffuser-drawn
train vlm-gpu-longer
train vlm-twice
draw drawn-loop 1784 --split train --mode loop --subset-seed 11 --draws 1 \
    --model runs/diffuser-drawn/model --vlm runs/vlm-twice/model
train vlm-varied
train vae-touching
train diffuser-touching
train vlm-imperfect

# What the binary carries. The VLM's last part learns from what these draw.
for part in transformer text_encoder tokenizer scheduler; do
    cp "runs/diffuser-touching/model/$part/"* "weights/tabletop/$part/"
done
autoencoder vae-touching
cp runs/vlm-imperfect/model/* weights/tabletop/vlm/
cargo build --release
draw drawn-first 1056 --split train --mode diffuser --subset-seed 14
draw drawn-depth 512 --split train --mode loop --subset-seed 15 --relation behind "in front of" --rounds 3 \
    --accept 0.97 --draws 1
train vlm-melted

vlm vlm-melted
draw looked-at 160 --split val --mode loop --subset-seed 1
draw looked-at-once 400 --split val --mode diffuser --subset-seed 3
draw looked-at-again 300 --split val --mode loop --subset-seed 5
"$rlrig" eval calibrate runs/looked-at runs/looked-at-once runs/looked-at-again \
    --out weights/tabletop/vlm/calibration.json

train diffuser-longer
for part in transformer text_encoder; do
    cp "runs/diffuser-longer/model/$part/"* "weights/tabletop/$part/"
done
cargo build --release
wording=plain draw drawn-many 560 --split train-4-5 --mode loop --subset-seed 31 --rounds 3 --draws 1 --accept 0.97
draw drawn-again 720 --split train --mode diffuser --subset-seed 14
draw drawn-depth-again 180 --split train --mode loop --subset-seed 15 --relation behind "in front of" --rounds 3 \
    --accept 0.97 --draws 1
train vlm-many

vlm vlm-many
wording=plain draw looked-at-many 110 --split val val-4-5 --mode loop --subset-seed 12 --rounds 3
"$rlrig" eval calibrate runs/looked-at-many --out weights/tabletop/vlm/calibration.json
cargo build --release
