#!/bin/sh
# Makes folders with Orthanc of other Debian releases, to run the tests on them too (root, debootstrap):
#     sh tests/servers.sh [release …]       bullseye 1.9.1, bookworm 1.10.1, trixie 1.12.7 (the default), forky 1.13.0
# Prints what ORTHANC_COMMANDS must be. The folders (300 MB each) stay in ~/.cache/store_study_info, or $SERVERS.
set -eu
folder=${SERVERS:-${XDG_CACHE_HOME:-$HOME/.cache}/store_study_info}
mkdir -p "$folder"
[ "$(id -u)" = 0 ] || { echo "servers.sh needs root: debootstrap and chroot do" >&2; exit 1; }
command -v debootstrap >/dev/null 2>&1 || { apt-get -qq update && apt-get -qq install -y debootstrap; } >/dev/null 2>&1 \
    || { echo "servers.sh needs debootstrap, which could not be installed" >&2; exit 1; }

commands=
for release in "${@:-trixie}"; do
    case $release in *[!a-z]*) echo "servers.sh: $release is no release of Debian" >&2; exit 2 ;; esac
    root=$folder/$release
    if ! chroot "$root" Orthanc --version >/dev/null 2>&1; then
        echo "Making $root …" >&2
        rm -rf "$root"
        script=/usr/share/debootstrap/scripts/$release
        [ -e "$script" ] || script=/usr/share/debootstrap/scripts/sid
        # The keys of the release may be newer or older than this machine's, and an old release's lists have expired:
        # what is fetched runs in tests only.
        debootstrap --variant=minbase --no-check-gpg "$release" "$root" "" "$script" >"$root.log" 2>&1 \
            && chroot "$root" sh -c 'apt-get -o Acquire::Check-Valid-Until=false --allow-insecure-repositories update &&
                apt-get -o Acquire::Check-Valid-Until=false install -y --allow-unauthenticated --no-install-recommends orthanc' >>"$root.log" 2>&1 \
            || { echo "$root could not be made, see $root.log" >&2; exit 1; }
    fi
    commands="${commands:+$commands; }chroot $root Orthanc"
done
echo "$commands"
