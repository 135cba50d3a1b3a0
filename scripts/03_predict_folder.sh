#!/usr/bin/env bash
# Predict a folder with several workers: 03_predict_folder.sh -c CONFIG -d IMAGES -n WORKERS [-o OUT] [-e LABELS] [-- OPTIONS]
#   -c  preset or YAML file; none: the model as it is
#   -d  folder of images
#   -n  worker processes (default: 1)
#   -o  folder of results (default: IMAGES with _predicted at its end)
#   -e  folder of label maps: evaluate afterwards, metrics.csv beside the results
# With a configuration of tucker-cnn (configs/predict_config.yml), as there: the configuration names the folders of
# results and of labels, and -e has no argument.
#   --  further options of `nnslim predict`; without -m MODEL or --task TASK there: --task total
# Unlike tucker-cnn's script of this name: one queue, largest case first; a killed worker is replaced; run it again
# and only what is missing is predicted; the exit code is 1 where a case failed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
run=${NNSLIM_RUN:-$here/../run.sh}
config= images= workers=1 output= labels=

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2; }

while getopts ":c:d:n:o:e:h" option; do
    case $option in
        c) config=$OPTARG ;;
        d) images=$OPTARG ;;
        n) workers=$OPTARG ;;
        o) output=$OPTARG ;;
        e)
            labels=$OPTARG
            case $OPTARG in -*) labels=config OPTIND=$((OPTIND - 1)) ;; esac
            ;;
        :)
            if [ "$OPTARG" != e ]; then usage; exit 2; fi
            labels=config
            ;;
        *) usage; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
if [ -z "$images" ]; then usage; exit 2; fi
images=${images%/}
if [ -f "$config" ] && grep -q '^out_root:' "$config"; then  # one of tucker-cnn's files
    files=()
    while IFS= read -r -d '' file; do files+=("$file"); done < <(
        find "$images" -type f \( -name '*.nii.gz' -o -name '*.nii' \) -not -name '.*' -print0
    )
    predict=("$here/03_predict_files.py" "$config" ${files[@]+"${files[@]}"} --workers "$workers" "$@")
    evaluate=("$here/04_eval.py" "$config")
else
    if [ "$labels" = config ]; then usage; exit 2; fi
    output=${output:-${images}_predicted}
    what=(--task total)
    for argument in "$@"; do
        case $argument in -m | --model | --model=* | --task | --task=*) what=() ;; esac
    done
    predict=(-m nnslim.cli predict -i "$images" -o "$output" --workers "$workers" ${config:+-c "$config"})
    predict+=(${what[@]+"${what[@]}"} "$@")
    evaluate=(-m nnslim.cli evaluate -p "$output" -g "$labels" -o "$output/metrics.csv")
fi

started=$SECONDS code=0
"$run" "${predict[@]}" || code=$?
echo "$((SECONDS - started)) s"
if [ "$code" -gt 1 ]; then exit "$code"; fi
if [ -n "$labels" ]; then
    "$run" "${evaluate[@]}" || code=$?
fi
exit "$code"
