#!/usr/bin/env bash
# Installs the Debian packages that system-packages.txt names, where that can be done; never fails: what is missing
# makes its tests skip, with the reason.
set -uo pipefail
list="$(dirname "${BASH_SOURCE[0]}")/system-packages.txt"
wanted=$(sed -e 's/#.*//' "$list")
missing=()
for package in $wanted; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ "${#missing[@]}" -gt 0 ] || exit 0
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "not installed, and it needs root and apt-get: ${missing[*]}: their tests will be skipped"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
install() { apt-get -qq install -y --no-install-recommends "$@" </dev/null >/dev/null; }
apt-get -qq update >/dev/null || echo "apt-get update failed"
install "${missing[@]}" && exit 0
# One that cannot be had must not cost the others.
for package in "${missing[@]}"; do
    install "$package" || echo "could not be installed: $package: its tests will be skipped"
done
exit 0
