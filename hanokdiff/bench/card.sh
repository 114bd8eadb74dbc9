#!/usr/bin/env bash
# The figures of one card in at most eight minutes, those that matter most in the first four: a JSON file for each part
# and card.md, a table with the card's name, in OUT. From the repository's folder, with requirements-dev.txt installed:
#
#     OUT=runs/card bash hanokdiff/bench/card.sh
#     OUT=runs/card CARD_SIZE=tiny DEVICE=cpu ROUNDS=1 TURN=1 bash hanokdiff/bench/card.sh       does it run?
#
# PYTHON (python), ROUNDS (3) of TURN (5) steps, MINUTES (8). Each part has its share of them; what takes longer is
# stopped and keeps the rows that are finished.
set -u
export HF_HUB_OFFLINE=1
OUT=${OUT:?the folder for the figures} SIZE=${CARD_SIZE:-sd15} DEVICE=${DEVICE:-cuda} PYTHON=${PYTHON:-python}
MINUTES=${MINUTES:-8} ROUNDS=${ROUNDS:-3} TURN=${TURN:-5}
END=$((MINUTES * 60 - 10)) # the table takes seconds
CAP=$([[ $DEVICE == cuda* ]] && echo "--cap 44")
mkdir -p "$OUT"

part() { # NAME SECONDS MODULE ARGUMENT ...: run it with so much of 8 minutes, or with what is left
    local name=$1 most=$(($2 * MINUTES / 8)) left=$((END - SECONDS))
    shift 2
    ((left > 10)) || { echo "$name: no time left"; return; }
    echo "== $name, $SECONDS s"
    timeout -s INT -k 10 "$((left < most ? left : most))" "$PYTHON" -m "$@" || echo "$name: ended with $?"
}
bench() { # NAME SECONDS WORK ...
    local name=$1 most=$2
    shift 2
    part "$name" "$most" hanokdiff.bench "$@" --size "$SIZE" --device "$DEVICE" $CAP --share --rounds "$ROUNDS" \
        --json "$OUT/$name.json"
}

# the first four minutes
part 1-agree 45 hanokdiff.bench.card agree "$DEVICE" "$SIZE" "$OUT/1-agree.json"
n=2
for work in lora dreambooth ti hypernet; do
    bench $((n++))-$work 50 $work --batch-size 8 --vs diffusers --turn "$TURN"
done
bench 6-sample 60 sample --batch-size 8 --vs diffusers --turn 1
# the next four
bench 7-photos32 80 dreambooth lora ti hypernet-all --batch-size 32 --turn 1
bench 8-sample1 40 sample --batch-size 1 --vs diffusers --turn 1
bench 9-compile 120 sample lora --batch-size 8 --compile --channels-last --turn 1
bench 9-compile-vs 120 sample --batch-size 8 --compile --vs diffusers --turn 1

"$PYTHON" -m hanokdiff.bench.card table "$OUT" | tee "$OUT/card.md"
