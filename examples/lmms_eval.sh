#!/usr/bin/env bash
# The table of a paper: eight benchmarks, stock and pruned, relative to stock, above what is answered without looking. Every method
# and ratio runs as published, and with token weights and original positions (docs/weights_and_positions.md), a row each.
#
#     examples/lmms_eval.sh [CHECKPOINT] [FOLDER]
#
# It needs `pip install "hivtp-hf[lmms-eval]"`, `hf auth login`, the network and GPUs. The eight benchmarks have not been run with it
# yet; the tests run it on a task of the project's own. What is finished in FOLDER is not run again. Settings, with their defaults:
#     MODEL=hivtp_llava_next   or hivtp_llava for LLaVA-1.5
#     METHODS="hivtp random"   RATIOS="1/2 2/9 1/9"
#     WEIGHTS_AND_POSITIONS="published both"   or some of published, weights, positions, both
#     PROCESSES=1              one GPU each
#     BATCH_SIZE=4             MORE=""   further arguments of lmms-eval, such as --limit 100
set -euo pipefail
checkpoint=${1:-llava-hf/llava-v1.6-mistral-7b-hf}
folder=${2:-lmms_eval_results}
tasks=${TASKS:-mme,pope,gqa,mmbench_en_dev_static,textvqa_val,scienceqa_img,vqav2_val,seedbench}

run() { # a name, and further model arguments
    if [ -f "$folder/$1/finished" ]; then
        return
    fi
    accelerate launch --num_processes "${PROCESSES:-1}" -m lmms_eval --model "${MODEL:-hivtp_llava_next}" \
        --model_args "pretrained=$checkpoint,$2" --tasks "$tasks" --batch_size "${BATCH_SIZE:-4}" \
        --output_path "$folder/$1" --log_samples ${MORE:-}
    # lmms-eval ends well even where a task could not be loaded: only results count.
    if [ -z "$(find "$folder/$1" -name '*_results.json')" ]; then
        echo "$folder/$1 has no results; see above." >&2
        exit 1
    fi
    touch "$folder/$1/finished"
}

run stock method=none,keep_newlines=true,exact_count=true
# Nothing is kept of any image, and so the model guesses by the words of a question.
run blind method=uniform,retention_ratio=1e-9,keep_newlines=false,exact_count=true
weights=token_weights=cluster_size positions=positions=original
for method in ${METHODS:-hivtp random}; do
    for ratio in ${RATIOS:-1/2 2/9 1/9}; do
        name="$method-${ratio/\//of}" arguments="method=$method,retention_ratio=$ratio"
        for told in ${WEIGHTS_AND_POSITIONS:-published both}; do
            case $told in
                published) run "$name" "$arguments,token_weights=none,positions=packed" ;;
                weights) run "$name-weights" "$arguments,$weights,positions=packed" ;;
                positions) run "$name-positions" "$arguments,token_weights=none,$positions" ;;
                both) run "$name-both" "$arguments,$weights,$positions" ;;
                *)
                    echo "WEIGHTS_AND_POSITIONS has '$told'; give some of published, weights, positions, both." >&2
                    exit 1
                    ;;
            esac
        done
    done
done
python "$(dirname "$0")/lmms_eval_table.py" "$folder"
