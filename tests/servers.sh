#!/bin/sh
# Makes folders with Orthanc of other Debian releases, to run the tests on them too (root, debootstrap):
#     sh tests/servers.sh [release[+postgresql] …]
# bullseye 1.9.1, bookworm 1.10.1, trixie 1.12.7 (the default), forky 1.13.0; trixie+postgresql and forky+postgresql
# are the same Orthancs with their index in a PostgreSQL, which orthanc.py starts with each of them.
# Prints what ORTHANC_COMMANDS must be. The folders (300 MB each) stay in ~/.cache/store_study_info, or $SERVERS.
# They are fetched from where this machine's own packages come from, or from $MIRROR.
. "$(dirname "$0")/bare.sh"
need_debootstrap

# ROOT PACKAGE …; an old release's lists have expired.
# shellcheck disable=SC2016
INSTALL='
export DEBIAN_FRONTEND=noninteractive
apt-get -o Acquire::Check-Valid-Until=false --allow-insecure-repositories update
apt-get -o Acquire::Check-Valid-Until=false install -y --allow-unauthenticated --no-install-recommends "$@"
'
orthanc_in() { chroot "$1" sh -euc "$INSTALL" sh orthanc; }

# Nothing that it brings is started, and /proc, which it must see, is mounted for it alone.
# shellcheck disable=SC2016
postgresql_in() {
    policy=$1/usr/sbin/policy-rc.d
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    status=0
    unshare --mount --pid --fork --kill-child sh -euc '
        mount -t proc proc "$1/proc"
        chroot "$1" sh -euc "$2" sh orthanc-postgresql postgresql' sh "$1" "$INSTALL" || status=$?
    rm "$policy"
    return "$status"
}

has_postgresql() {
    ls "$1"/usr/lib/postgresql/*/bin/postgres "$1/usr/share/orthanc/plugins/libOrthancPostgreSQLIndex.so"
} >/dev/null 2>&1

commands=
for wanted in "${@:-trixie}"; do
    release=${wanted%+postgresql}
    index=${wanted#"$release"}
    is_release "$release" || { say "servers.sh: $wanted is not a release of Debian"; exit 2; }
    root=$folder/$release
    if ! chroot "$root" Orthanc --version >/dev/null 2>&1; then
        say "Making $root …"
        { bare "$release" "$root" && orthanc_in "$root"; } >"$root.log" 2>&1 ||
            { say "$root could not be made, see $root.log"; exit 1; }
    fi
    if [ -n "$index" ] && ! has_postgresql "$root"; then
        say "Adding PostgreSQL to $root …"
        postgresql_in "$root" >"$root$index.log" 2>&1 ||
            { say "PostgreSQL could not be added to $root, see $root$index.log"; exit 1; }
    fi
    commands="${commands:+$commands; }chroot $root Orthanc${index:+ $index}"
done
echo "$commands"
