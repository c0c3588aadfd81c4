#!/usr/bin/env bash
# Sets up a CUDA 13.0 toolkit in a folder from NVIDIA's wheels on PyPI: enough to compile and link `--features cuda`
# without root, a GPU or a driver.
#
#   scripts/cuda-toolkit.sh DIR [cudnn] [nccl]
#   . DIR/env.sh
#   CUDA_COMPUTE_CAP=90 cargo build --release --features cuda
#
# Needs python3 with pip, and a C++ compiler for nvcc to work with. The driver's library (libcuda) is in no wheel: a
# stub that defines its functions stands in for it when linking, and the real one is found when the program runs.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
dir=$(cd "$1" && pwd)
shift

# In the order in which nvcc needs them: driver program, its internal headers, optimiser, runtime, C++ headers; then
# the libraries that candle links.
wheels=(
    nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cublas nvidia-cuda-nvrtc
)
wanted=("${wheels[@]/%/==13.0.*}" nvidia-curand)
for extra in "$@"; do
    case $extra in
        cudnn) wanted+=(nvidia-cudnn-cu13) ;;
        nccl) wanted+=(nvidia-nccl-cu13) ;;
        *) echo "unknown part $extra: cudnn and nccl are the optional ones" >&2; exit 2 ;;
    esac
done
python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps \
    --only-binary :all: --upgrade --target "$dir" "${wanted[@]}"

home=$dir/nvidia/cu13
# cuDNN and NCCL come in folders of their own.
for extra in "$@"; do
    for part in include lib; do
        ln -sf "$dir/nvidia/$extra/$part/"* "$home/$part/"
    done
done
# Wheels carry neither links nor run bits.
for library in "$home"/lib/*.so.*; do
    ln -sf "${library##*/}" "${library%%.so.*}.so"
done
ln -sfn lib "$home/lib64"
chmod +x "$home"/bin/* "$home"/nvvm/bin/*

# The stub: a function for each name of one in the header, which says that there is no device (CUDA_ERROR_NO_DEVICE).
mkdir -p "$home/lib/stubs"
grep -ohE '\bcu[A-Z][A-Za-z0-9_]*' "$home/include/cuda.h" | sort -u |
    sed 's/.*/int &(void) { return 100; }/' > "$dir/libcuda.c"
${CC:-cc} -w -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$home/lib/stubs/libcuda.so" -x c "$dir/libcuda.c"
ln -sf libcuda.so "$home/lib/stubs/libcuda.so.1"

cat > "$dir/env.sh" <<END
export CUDA_HOME=$home CUDA_PATH=$home CUDA_ROOT=$home CUDA_TOOLKIT_ROOT_DIR=$home
export PATH=$home/bin:\$PATH
export LIBRARY_PATH=$home/lib:$home/lib/stubs\${LIBRARY_PATH:+:\$LIBRARY_PATH}
# Where a program finds the libraries when it runs. The stub is not among them: without a driver, add \$CUDA_HOME/lib/stubs
# to run what needs no GPU.
export LD_LIBRARY_PATH=$home/lib\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}
END
"$home/bin/nvcc" --version | tail -n 2
echo "CUDA toolkit in $home ($(du -sh "$dir" | cut -f1)): run '. $dir/env.sh'"
