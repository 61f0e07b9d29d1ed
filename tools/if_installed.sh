#!/bin/sh
# if_installed.sh "cargo clippy" COMMAND...: runs COMMAND where the tool exists. A missing rustup
# component is said and tolerated on a user's machine, and is an error in CI.
tool=$1
shift
if $tool --version >/dev/null 2>&1; then
    exec "$@"
fi
echo "$tool is not installed: not run: $*" >&2
test "${CI:-}" != true
