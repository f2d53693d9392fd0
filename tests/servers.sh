#!/bin/sh
# Makes folders with Orthanc of other Debian releases, to run the tests on them too (root, debootstrap):
#     sh tests/servers.sh [release …]      bullseye 1.9.1, bookworm 1.10.1, trixie 1.12.7 (the default), forky 1.13.0
# Prints what ORTHANC_COMMANDS must be. The folders (300 MB each) stay in ~/.cache/store_study_info, or $SERVERS.
# They are fetched from where this machine's own packages come from, or from $MIRROR.
. "$(dirname "$0")/bare.sh"
need_debootstrap

# An old release's lists have expired.
orthanc_in() {
    chroot "$1" sh -c 'apt-get -o Acquire::Check-Valid-Until=false --allow-insecure-repositories update &&
        apt-get -o Acquire::Check-Valid-Until=false install -y --allow-unauthenticated --no-install-recommends orthanc'
}

commands=
for release in "${@:-trixie}"; do
    is_release "$release" || { say "servers.sh: $release is not a release of Debian"; exit 2; }
    root=$folder/$release
    if ! chroot "$root" Orthanc --version >/dev/null 2>&1; then
        say "Making $root …"
        { bare "$release" "$root" && orthanc_in "$root"; } >"$root.log" 2>&1 ||
            { say "$root could not be made, see $root.log"; exit 1; }
    fi
    commands="${commands:+$commands; }chroot $root Orthanc"
done
echo "$commands"
