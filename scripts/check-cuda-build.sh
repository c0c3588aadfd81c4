#!/usr/bin/env bash
# Proves that the CUDA build compiles and links from nothing: a toolkit from wheels, an empty target folder, no GPU.
# Says how long it took and how large things are. About 15 minutes on two free cores; not part of CI.
#
#   scripts/check-cuda-build.sh [FOLDER [FEATURE...]]
#
# Everything goes into FOLDER (default: a temporary one, deleted afterwards); FEATUREs default to cuda.
# CUDA_COMPUTE_CAP names the GPU to compile for (default 90).
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -ge 1 ]; then
    mkdir -p "$1"
    folder=$(cd "$1" && pwd)
    shift
else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
features=${*:-cuda}
parts=()
for feature in $features; do
    case $feature in cudnn | nccl) parts+=("$feature") ;; esac
done

start=$SECONDS
scripts/cuda-toolkit.sh "$folder/toolkit" ${parts[@]+"${parts[@]}"}
toolkit=$((SECONDS - start))
. "$folder/toolkit/env.sh"
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90} CARGO_TARGET_DIR=$folder/target
start=$SECONDS
cargo build --release --locked --features "$features"
build=$((SECONDS - start))

binary=$CARGO_TARGET_DIR/release/rlrig
needed=$(readelf -d "$binary" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
for library in libcuda.so libcublas.so libcurand.so; do
    grep -q "^$library" <<< "$needed" || { echo "$binary does not link $library" >&2; exit 1; }
done
# With the stub for a driver it must run, find no device, and say why.
said=$(LD_LIBRARY_PATH=$CUDA_HOME/lib:$CUDA_HOME/lib/stubs "$binary" doctor | grep '^device *cuda') ||
    { echo "rlrig doctor does not run, or says nothing of CUDA" >&2; exit 1; }
grep -q 'not usable' <<< "$said" || { echo "rlrig doctor takes the stub for a driver: $said" >&2; exit 1; }

echo "toolkit: $((toolkit / 60)) min $((toolkit % 60)) s, $(du -sh "$folder/toolkit" | cut -f1)"
echo "build:   $((build / 60)) min $((build % 60)) s with $(nproc) cores for compute capability $CUDA_COMPUTE_CAP"
echo "binary:  $(stat -c %s "$binary") bytes, $(gzip -c "$binary" | wc -c) compressed"
echo "links:   $(tr '\n' ' ' <<< "$needed")"
echo "$said"
