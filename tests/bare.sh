# shellcheck shell=sh
# Sourced by servers.sh and fresh.sh: makes bare systems with debootstrap, which needs root.
set -eu
# shellcheck disable=SC2034  # for those that source this
folder=${SERVERS:-${XDG_CACHE_HOME:-$HOME/.cache}/store_study_info}

say() { printf '%s\n' "$*" >&2; }

# Ends with 3 where no bare system can be made.
need_debootstrap() {
    name=${0##*/}
    [ "$(id -u)" = 0 ] || { say "$name needs root: debootstrap and chroot do"; exit 3; }
    if ! command -v debootstrap >/dev/null 2>&1; then
        { apt-get -qq update && apt-get -qq install -y debootstrap; } >/dev/null 2>&1 || true
        command -v debootstrap >/dev/null 2>&1 ||
            { say "$name needs debootstrap, which could not be installed"; exit 3; }
    fi
    mkdir -p "$folder"
}

is_release() { case $1 in '' | *[!a-z]*) return 1 ;; esac; }

# Where this machine's own packages come from, unless MIRROR says it; else debootstrap's default.
mirrors() {
    if [ -n "${MIRROR:-}" ]; then echo "$MIRROR"; return; fi
    # shellcheck disable=SC2016  # apt's own variables
    found=$(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
        sed -n '/^[^ ]*-/d; s/^[^ ]* //p' | uniq)
    echo "${found:-default}"
}

# bare RELEASE ROOT: what `debootstrap --variant=minbase` makes, with apt set up as on this machine.
# The keys of the release may be newer or older than this machine's: what is fetched runs in tests only.
bare() {
    script=/usr/share/debootstrap/scripts/$1
    components=main
    case $1 in jammy | noble) components=main,universe ;; esac
    [ -e "$script" ] || script=/usr/share/debootstrap/scripts/sid
    for mirror in $(mirrors); do
        [ "$mirror" != default ] || mirror=
        rm -rf "$2"
        if debootstrap --variant=minbase --no-check-gpg --components="$components" "$1" "$2" "$mirror" "$script"; then
            set_up_apt "$2"
            return
        fi
    done
    return 1
}

# How this machine reaches its packages: proxies, certificates, whether dates are believed.
set_up_apt() {
    apt-config dump | grep -iE '^Acquire::(https?|Check-|Retries|Force)[^ ]* ".' \
        >"$1/etc/apt/apt.conf.d/90machine" || true
}
