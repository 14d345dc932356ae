#!/bin/sh
# Checks every file of this folder, compiles engines for this Jetson's GPU, and compares them with the golden outputs.
# Run it again at any time: what is up to date is not compiled again. Arguments go to build_engine.py: sh install.sh --target onnx-int8
# PYTHON names another Python than python3. Exit code 0: done. 1: a file, a build or a test failed. 3: this machine lacks something.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python3}
release_file=${NV_TEGRA_RELEASE:-/etc/nv_tegra_release}

stop() {
    echo "install.sh: $2" >&2
    exit "$1"
}

machine=$(uname -m)
[ "$machine" = aarch64 ] || stop 3 "this machine is $machine and a Jetson is aarch64; run bundle/build_engine.py by hand elsewhere"
if [ -r "$release_file" ]; then
    release=$(sed -n 's/^# R\([0-9]*\) (release), REVISION: \([0-9]*\).*/\1 \2/p' "$release_file")
    major=${release% *}
    minor=${release#* }
    if [ -z "$release" ]; then
        echo "$release_file does not tell the release; going on"
    elif [ "$major" -lt 36 ] || { [ "$major" -eq 36 ] && [ "$minor" -lt 4 ]; }; then
        stop 3 "Jetson Linux $major.$minor has a TensorRT older than 10.3; install JetPack 6.1 (Jetson Linux 36.4) or newer"
    else
        echo "Jetson Linux $major.$minor"
    fi
else
    echo "No $release_file (a container?): the JetPack version is not checked"
fi
"$python" -I -c 'import sys; sys.exit(sys.version_info < (3, 9))' || stop 3 "$python is missing or older than 3.9"
"$python" -I -c 'import numpy, PIL' 2>/dev/null || stop 3 "numpy or Pillow is missing; sudo apt-get install python3-numpy python3-pil"
if ! "$python" -I -c 'import tensorrt' 2>/dev/null && ! command -v trtexec >/dev/null && [ ! -x /usr/src/tensorrt/bin/trtexec ]; then
    stop 3 "TensorRT is missing; sudo apt-get install nvidia-jetpack"
fi

echo "1 of 3: hashes"
sha256sum --quiet --check SHA256SUMS || stop 1 "a file is missing or was changed; copy the folder again"
echo "2 of 3: engines (minutes on the first run)"
built=0
"$python" -I -B bundle/build_engine.py --out engines "$@" || built=$?
[ "$built" -le 1 ] || exit "$built"
echo "3 of 3: golden outputs"
tested=0
"$python" -I -B bundle/selftest.py --engines engines || tested=$?
[ "$tested" -ne 3 ] || stop 3 "the engines are built and nothing here can test them; sudo apt-get install python3-libnvinfer"
[ "$tested" -eq 0 ] || exit "$tested"
[ "$built" -eq 0 ] || stop 1 "not every engine could be built; see above, and leave out what this device lacks with --target"
