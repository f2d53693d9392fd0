# shellcheck shell=sh
# Sourced by run.sh and demo.sh: a virtual environment in tests/.env, an Orthanc server where one can be had.
# Sets PYTHON, that of the environment; orthanc.py finds the server, also beside the environment. The caller has set
# `purpose`: the demo needs much less than the tests.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
: "${purpose:?}"

# Loopback is never asked for through a proxy.
export NO_PROXY="127.0.0.1,localhost,::1${NO_PROXY:+,$NO_PROXY}"
export no_proxy="$NO_PROXY"

say() { printf '%s\n' "$*" >&2; }

# Where the environment and Orthanc are: here, or in a folder of this user's own where the clone cannot be written.
find_place() {
    place=$here
    if [ -w "$here" ]; then return; fi
    id=$(id -u)
    place=${TMPDIR:-/tmp}/store_study_info-$id-$(printf %s "$here" | cksum | cut -d ' ' -f 1)
    [ -d "$place" ] ||
        say "$here cannot be written: what is made goes to $place, which may be removed at any time."
    mkdir -m 700 "$place" 2>/dev/null || true
    # What somebody else had put there would be run.
    if [ -z "$(find "$place" -prune -type d -user "$id" 2>/dev/null)" ]; then
        say "$place is not a folder of yours: set TMPDIR to one where you may write."
        return 1
    fi
    export PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_STORAGE_DIRECTORY="$place/.hypothesis"
    export MYPY_CACHE_DIR="$place/.mypy_cache" RUFF_CACHE_DIR="$place/.ruff_cache"
}

may_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; }

# Runs apt-get with what it prints in $apt_log; lists of packages are brought up to date once.
apt() {
    apt_log=${apt_log:-$(mktemp)}
    [ -n "${apt_updated:-}" ] || { apt_get update && apt_updated=yes; } && apt_get "$@"
}
apt_get() {
    LC_ALL=C DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 \
        -o APT::Keep-Downloaded-Packages=false "$@" >"$apt_log" 2>&1 </dev/null
}

# Why apt failed, in one line.
apt_error() { { cat "$apt_log"; grep '^E: ' "$apt_log"; } | sed 's/^E: //' | tail -n 1; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    for candidate in "${PYTHON:-python3}" python3 python3.13 python3.12 python3.11 python3.10; do
        if is_new_enough "$candidate"; then command -v "$candidate"; return; fi
    done
    say "Python 3.10 or newer is needed; name one: PYTHON=/path/to/python3 sh $0"
    return 1
}

has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

# Debian keeps what makes virtual environments in a package of its own.
get_venv() {
    if has_venv "$1"; then return; fi
    apt_said=
    if may_install; then
        say "Installing python3-venv with apt …"
        if apt install -y --no-install-recommends python3-venv; then :; else apt_said=" apt said: $(apt_error)"; fi
        if has_venv "$1"; then return; fi
    fi
    say "$1 cannot make a virtual environment: its module venv has to be installed first (on Debian and Ubuntu" \
        "the package python3-venv).$apt_said"
    return 1
}

# Made once, and again when the requirements or the Python change. The stamp comes last: without it nothing is believed.
make_environment() {
    base=$(find_python)
    env="$place/.env"
    stamp=$(cat "$here/../requirements.txt" "$here/requirements.txt" | cksum)
    stamp="$stamp $("$base" -c 'import sys; print(sys.version, sys.base_prefix)' | tr '\n' ' ')"
    for made in "$here/.env" "$env"; do    # where the clone cannot be written, its owner may have made one
        PYTHON="$made/bin/python"
        stamped=$([ ! -x "$PYTHON" ] || cat "$made/stamp" 2>/dev/null || true)
        case $stamped in "$stamp$purpose" | "${stamp}tests") return ;; esac
    done
    set -- -r "$here/../requirements.txt"
    [ "$purpose" = demo ] || set -- "$@" -r "$here/requirements.txt"
    if [ "$stamped" = "${stamp}demo" ]; then
        say "Adding what the tests need to the virtual environment in $env (only this once) …"
    else
        get_venv "$base"
        say "Preparing a virtual environment in $env (less than a minute, only this once) …"
        unfinished=$env
        rm -rf "$env"
        if ! said=$("$base" -m venv "$env" 2>&1); then
            said=$(printf '%s\n' "$said" | tail -n 1)
            say "$base could not make a virtual environment in $env: $said"
            return 1
        fi
    fi
    if ! "$PYTHON" -m pip install -q --disable-pip-version-check "$@" >&2; then
        say "What is needed for the $purpose could not be installed; pip says why above. Nothing half-made is left:" \
            "call this again once the network and the package registry answer."
        return 1
    fi
    printf '%s\n' "$stamp$purpose" >"$env/stamp"
    unfinished=
}

# Debian's package is unpacked, not installed: it would start a DICOM server at every boot. Only what else apt would
# install with it, its libraries, is installed.
get_orthanc() {
    if ! "$PYTHON" "$here/orthanc.py" --lacking; then return; fi
    if ! may_install; then
        say "No Orthanc that starts was found, and only root can fetch one with apt: a small stand-in takes its place."
        return
    fi
    say "Fetching Debian's Orthanc to try things on: its libraries are installed with apt, the server itself is only" \
        "unpacked, in $place/.orthanc, and starts no service (less than a minute, only this once) …"
    unfinished="$place/.orthanc.new"
    rm -rf "$unfinished" "$place/.orthanc"    # what is there does not start
    mkdir "$unfinished"
    if ! fetch_orthanc "$unfinished"; then
        say "Orthanc could not be fetched ($(apt_error)): a small stand-in takes its place."
    elif ! trial=$("$unfinished/usr/sbin/Orthanc" --version 2>&1); then
        trial=$(printf '%s\n' "$trial" | tail -n 1)
        say "Orthanc was fetched but does not start ($trial): a small stand-in takes its place."
    else
        mv "$unfinished" "$place/.orthanc"
    fi
    rm -rf "$unfinished"
    unfinished=
}

fetch_orthanc() {
    apt install --simulate --no-install-recommends --no-remove orthanc || return 1
    others=$(sed -n '/^Inst orthanc /d; s/^Inst \([^ ]*\) .*/\1/p' "$apt_log")
    # shellcheck disable=SC2086  # a list of names
    [ -z "$others" ] || without_services apt install -y --no-install-recommends --no-remove $others || return 1
    ( cd "$1" && apt download orthanc ) && dpkg-deb -x "$1"/orthanc_*.deb "$1" && rm -f "$1"/orthanc_*.deb
}

# Should one of the packages bring a service, it is not started. A machine with a policy of its own keeps that; ours
# has no effect once this script has ended, even where it was killed.
without_services() {
    if [ -e /usr/sbin/policy-rc.d ]; then "$@"; return; fi
    policy=/usr/sbin/policy-rc.d
    # shellcheck disable=SC2016
    printf '#!/bin/sh\nkill -0 %s 2>/dev/null && exit 101\nrm -f "$0"\n' "$$" >"$policy"
    chmod 755 "$policy"
    "$@" && status=0 || status=$?
    rm -f "$policy"
    policy=
    return "$status"
}

clean() { rm -rf ${unfinished:+"$unfinished"} ${policy:+"$policy"} ${apt_log:+"$apt_log"}; }

unfinished='' policy='' apt_log='' apt_updated=''
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
find_place
make_environment
get_orthanc
trap - EXIT INT TERM HUP
clean
export PYTHON
