#!/usr/bin/env bash
# Builds llama.cpp, our peer in benchmarks, from the source distribution of llama-cpp-python.
#
#   benchmarks/peers/llama_cpp_build.sh FOLDER
#
# Leaves the tools in FOLDER/bin (llama-bench, llama-perplexity, llama-quantize, llama-imatrix, llama-tokenize) and the
# shared libraries beside them. PYTHON (python3) needs pip; cmake, ninja and a C++17 compiler must be there. Built for the
# machine it runs on (GGML_NATIVE) and without network use of its own; JOBS (2) compilers at a time, 10 to 20 minutes on two cores.
set -euo pipefail

VERSION=${LLAMA_CPP_PYTHON_VERSION:-0.3.36}
PYTHON=${PYTHON:-python3}
JOBS=${JOBS:-2}
folder=$(mkdir -p "${1:?usage: llama_cpp_build.sh FOLDER}" && cd "$1" && pwd)
archive=$folder/llama_cpp_python-$VERSION.tar.gz
source=$folder/llama_cpp_python-$VERSION/vendor/llama.cpp

if [[ ! -f $archive ]]; then
  "$PYTHON" -m pip download --no-deps --no-binary :all: --dest "$folder" "llama-cpp-python==$VERSION"
fi
[[ -d $source ]] || tar -xzf "$archive" -C "$folder"

cmake -S "$source" -B "$folder/build" -G Ninja \
  -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=ON \
  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \
  -DLLAMA_OPENSSL=OFF
nice -n 10 cmake --build "$folder/build" -j "$JOBS" \
  --target llama-quantize llama-bench llama-perplexity llama-imatrix llama-tokenize

ln -sfn build/bin "$folder/bin"
# The Python binding beside it, as it is in the archive, on the same libraries: PYTHONPATH=FOLDER/python.
ln -sfn "llama_cpp_python-$VERSION" "$folder/python"
ln -sfn "$folder/build/bin" "$folder/python/llama_cpp/lib"
echo "llama.cpp (llama-cpp-python $VERSION) in $folder/bin"
