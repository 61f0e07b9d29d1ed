#!/bin/sh
# The kernels on processors that are not here, under qemu's user-mode emulation: NEON, and an x86-64 from
# before AVX. On Debian: apt install qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross
set -eu
cd "$(dirname "$0")/.."

rustup target add aarch64-unknown-linux-gnu
CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
	cargo test --release --no-default-features --lib --quiet --target aarch64-unknown-linux-gnu

# A processor that the environment names to OpenBLAS is the one that is here.
unset OPENBLAS_CORETYPE
without_avx="qemu-x86_64 -cpu Nehalem .venv/bin/python3"
$without_avx -m tllib_rs.info | grep "instruction set  *baseline (torch: DEFAULT)"
$without_avx -m pytest -p no:cacheprovider \
	tests/test_cc_loss.py tests/test_dst.py tests/test_entropy.py tests/test_flexmatch.py tests/test_losses.py \
	tests/test_mcc.py tests/test_mean_teacher.py tests/test_pi_model.py tests/test_pseudo_label.py \
	tests/test_reid_loss.py tests/test_self_ensemble.py tests/test_self_tuning.py tests/test_uda.py
